"""Agent, version and event of the registry, and its SQL tables.

A change is a function from one Agent to the next and knows nothing of a database; `registry` runs it in a transaction.

    agents      one row per agent: live version, earlier ones, candidate on trial
    versions    immutable: a name and a version always mean one Release; only its path, facts and status may change
    events      append-only: who changed what, when, from what to what, and why
    keys        API keys, hashed
    people      personal versions: the user (an HMAC, never a name), the agent, the version that it was tuned on
    speakers    users for whom each key may speak
    heads       which rows are the newest (`registry_head`)
    generation  one row: a number that rises with every change, and the lock that serialises changes

Lists and mappings are canonical JSON in text columns, times are UTC text, flags are 0 or 1. So every value is read as
it was written, on SQLite and on Postgres, and a damaged row does not prevent reading the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    ForeignKey,
    Integer,
    MetaData,
    Table,
    Text,
    insert,
    update,
)

from sartor.core import database, records
from sartor.core.database import Database, Form
from sartor.core.errors import ConfigError, ConflictError
from sartor.serving.registry.registry_head import RegistryHead, transaction_of
from sartor.serving.registry.registry_seals import use_key, use_no_key

# formerly live versions that are recorded, which is how often a rollback can be repeated
MOST_EARLIER = 8
State = Literal["serving", "draining", "removed"]


@dataclass(frozen=True)
class Agent:
    """Agent with its live version, earlier versions, and the candidate on trial.

    earlier: formerly live versions, newest last.
    state: a draining agent finishes its running requests and accepts no new ones.
    candidate: answers `canary_fraction` of the requests, and `shadow_fraction` of them without sending its replies.
    generation: of its last change.
    """

    name: str
    live: str
    earlier: tuple[str, ...] = ()
    state: State = "serving"
    fallback: tuple[str, ...] = ("previous", "base")
    candidate: str = ""
    canary_fraction: float = 0.0
    shadow_fraction: float = 0.0
    generation: int = 0
    changed: str = ""
    note: str = ""

    @property
    def previous(self) -> str:
        """Version that was live before, the first fallback; empty if there is none."""
        return self.earlier[-1] if self.earlier else ""

    @property
    def is_blank(self) -> bool:
        """Whether it is a name without any version, because its first Release was refused."""
        return not self.live and self.state != "removed"

    @property
    def versions(self) -> tuple[str, ...]:
        """Versions that a server must have loaded: live, previous, candidate."""
        return tuple(dict.fromkeys(version for version in (self.live, self.previous, self.candidate) if version))

    def expecting(self, version: str | None, trial: str | None = None) -> Agent:
        """Return the agent if `version` is live and `trial` is on trial (None: any).

        Raises ConflictError with the actual state.
        """
        if version is not None and version != self.live:
            raise ConflictError(
                f"{self.name} has the version {self.live!r} live, not {version!r}; nothing was changed",
                f"see `sartor agents events {self.name}`; then --expected-version {self.live}",
            )
        if trial is not None and trial != self.candidate:
            raise ConflictError(
                f"{self.name} has {self.candidate or 'nothing'} on trial, not {trial}; nothing was changed",
                f"see `sartor agents events {self.name}`",
            )
        return self

    def promoted(self, version: str) -> Agent:
        """Return the agent with `version` live, the old live version as previous, and no trial.

        A trial ends, because the version that it was compared with is no longer live.
        """
        earlier = self.earlier
        if self.live not in ("", version):
            earlier = (*earlier, self.live)[-MOST_EARLIER:]
        return replace(self.without_trial(), live=version, earlier=earlier, state="serving")

    def rolled_back(self) -> Agent:
        """Return the agent without its running trial, or else with the previous version live.

        Raises ConflictError if there is no previous version.
        """
        if self.candidate:
            return self.without_trial()
        if not self.earlier:
            raise ConflictError(
                f"{self.name}@{self.live} has no previous version to go back to",
                f"sartor agents promote {self.name} VERSION, of another registered one; or sartor agents drain "
                f"{self.name}",
            )
        return replace(self, live=self.earlier[-1], earlier=self.earlier[:-1], state="serving")

    def with_trial(self, version: str, *, canary_fraction: float = 0.0, shadow_fraction: float = 0.0) -> Agent:
        """Return the agent with `version` on trial.

        Raises ConflictError if another version is on trial or this one is live, ConfigError for an invalid fraction.
        """
        for name, fraction in (("canary", canary_fraction), ("shadow", shadow_fraction)):
            if not 0 <= fraction <= 1:
                raise ConfigError(f"the {name} fraction is {fraction}; it lies in 0..1", "a fraction of 0.1")
        if not (canary_fraction or shadow_fraction):
            raise ConfigError("a trial of no request at all shows nothing", "a fraction of 0.1")
        if version == self.live:
            raise ConflictError(f"{self.name}@{version} is live already", "give the version that is to be tried")
        if self.candidate not in ("", version):
            raise ConflictError(
                f"{self.name}@{self.candidate} is on trial", f"end it first: sartor agents rollback {self.name}"
            )
        return replace(
            self,
            candidate=version,
            canary_fraction=canary_fraction or self.canary_fraction,
            shadow_fraction=shadow_fraction or self.shadow_fraction,
        )

    def without_trial(self) -> Agent:
        """Return the agent without a trial."""
        return replace(self, candidate="", canary_fraction=0.0, shadow_fraction=0.0)

    def as_row(self) -> dict[str, Any]:
        """Return the table row, to be sealed."""
        return {**self.as_json(), "earlier": _json(self.earlier), "fallback": _json(self.fallback)}

    def as_json(self) -> dict[str, Any]:
        """Return every field, as in an event and in `agents list`."""
        return {**vars(self), "earlier": list(self.earlier), "fallback": list(self.fallback)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Agent:
        """Return the agent of an intact row."""
        return cls.from_json({**row, "earlier": json.loads(row["earlier"]), "fallback": json.loads(row["fallback"])})

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Agent:
        """Return the agent that `as_json` describes."""
        lists = {name: tuple(fields[name]) for name in ("earlier", "fallback")}
        return cls(**{**{name: value for name, value in fields.items() if name != "checksum"}, **lists})


@dataclass(frozen=True)
class AgentVersion:
    """Version of an agent: an admitted Release, with facts about it.

    release: its directory, which may move.
    adapter: digest under which engines attach the adapter.
    facts: what a request needs without opening the Release: system_prompt, sampling, tools, licence and others.
    """

    agent: str
    version: str
    release: str
    release_id: str
    adapter: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    status: Literal["admitted", "rolled_back"] = "admitted"
    added: str = ""

    @property
    def name(self) -> str:
        """Full name, `agent@version`."""
        return f"{self.agent}@{self.version}"

    def as_row(self) -> dict[str, Any]:
        """Return the table row, to be sealed."""
        return {**vars(self), "facts": _json(self.facts)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> AgentVersion:
        """Return the version of an intact row."""
        return cls(**{**{name: row[name] for name in row if name != "checksum"}, "facts": json.loads(row["facts"])})


@dataclass(frozen=True)
class Event:
    """Change of an agent, with its author and reason.

    was, became: the agent before and after (`{}` if it did not exist).
    numbers: figures behind the decision.
    """

    id: int
    generation: int
    at: str
    who: str
    what: str
    agent: str
    version: str
    why: str
    was: Mapping[str, Any]
    became: Mapping[str, Any]
    numbers: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Return the event as a row of `sartor agents events`."""
        live = {"from": self.was.get("live", ""), "to": self.became.get("live", "")}
        fields = {name: getattr(self, name) for name in ("id", "at", "who", "what", "agent", "version", "why")}
        return {**fields, **live, "numbers": dict(self.numbers)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Event:
        """Return the event of an intact row."""
        plain = {name: row[name] for name in row if name != "checksum"}
        return cls(**{**plain, **{name: json.loads(row[name]) for name in ("was", "became", "numbers")}})


def _json(value: Any) -> str:
    if isinstance(value, tuple):
        value = list(value)
    elif isinstance(value, Mapping):
        value = dict(value)
    return records.canonical(value).decode()


metadata = MetaData()


def _text(name: str, *, key: bool = False) -> Column[str]:
    return Column(name, Text, primary_key=key, nullable=False)


# SQLite assigns row numbers only to a key whose type is exactly INTEGER
_NUMBER = BigInteger().with_variant(Integer, "sqlite")

agents = Table(
    "agents",
    metadata,
    _text("name", key=True),
    _text("live"),
    _text("earlier"),
    _text("state"),
    _text("fallback"),
    _text("candidate"),
    Column("canary_fraction", Double, nullable=False),
    Column("shadow_fraction", Double, nullable=False),
    Column("generation", BigInteger, nullable=False),
    _text("changed"),
    _text("note"),
    _text("checksum"),
)

versions = Table(
    "versions",
    metadata,
    Column("agent", Text, ForeignKey("agents.name"), primary_key=True),
    _text("version", key=True),
    _text("release"),
    _text("release_id"),
    _text("adapter"),
    _text("facts"),
    _text("status"),
    _text("added"),
    _text("checksum"),
)

events = Table(
    "events",
    metadata,
    Column("id", _NUMBER, primary_key=True, autoincrement=True),
    Column("generation", BigInteger, nullable=False),
    _text("at"),
    _text("who"),
    _text("what"),
    _text("agent"),
    _text("version"),
    _text("why"),
    _text("was"),
    _text("became"),
    _text("numbers"),
    _text("checksum"),
)

keys = Table(
    "keys",
    metadata,
    _text("id", key=True),
    _text("name"),
    _text("agents"),
    Column("admin", Integer, nullable=False),
    _text("digest"),
    _text("created"),
    _text("expires"),
    _text("revoked"),
    _text("checksum"),
)

people = Table(
    "people",
    metadata,
    _text("person", key=True),
    _text("agent", key=True),
    _text("version"),
    _text("release_id"),
    _text("adapter"),
    _text("artifact"),
    _text("path"),
    _text("facts"),
    _text("note"),
    _text("added"),
    _text("checksum"),
)

speakers = Table("speakers", metadata, _text("key", key=True), _text("person", key=True), _text("checksum"))

heads = Table(
    "heads",
    metadata,
    _text("name", key=True),
    Column("number", BigInteger, nullable=False),
    _text("entries"),
    _text("checksum"),
)

generation = Table(
    "generation",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", BigInteger, nullable=False),
)

MIGRATIONS = Path(__file__).parent / "migrations"


# tables whose newest rows alone count
CURRENT = (agents, versions, keys, people, speakers)
# tables whose rows are sealed
SEALED = (*CURRENT, events)


def open_database(url: str, state: Path | None = None) -> Database:
    """Open the database of a team's registry at a SQLAlchemy URL.

    state: the team's directory, which holds the key of the seals; by default that of a SQLite file. Without one, on
    Postgres, rows have plain checksums.
    Raises as `sartor.core.database.open_database` and `use_key`.
    """
    opened = open_unsealed(url)
    directory = state or opened.directory
    try:
        if directory is None:
            use_no_key(opened, head_of(opened), SEALED)
        else:
            use_key(opened, head_of(opened, directory), directory, SEALED)
    except BaseException:
        opened.close()
        raise
    return opened


def open_unsealed(url: str) -> Database:
    """Open the database without the key of its seals, whose rows then count as changed from outside."""
    form = Form("registry", "registry: ", MIGRATIONS, generation.c.value, is_private=True)
    opened = database.open_database(url, form)
    opened.observer = head_of(opened)
    return opened


def head_of(opened: Database, state: Path | None = None) -> RegistryHead:
    """Return the head of a registry, with the file that a state directory has for it."""
    return RegistryHead(heads, CURRENT, events, opened.name, state)


def generation_of(connection: Connection) -> int:
    """Return the number of the newest change, as the head has it; the counter of the table can be set from outside."""
    return transaction_of(connection).generation


def next_generation(connection: Connection) -> int:
    """Increment the change counter and return it."""
    number = generation_of(connection) + 1
    transaction_of(connection).generation = number
    if not connection.execute(update(generation).values(value=number)).rowcount:
        connection.execute(insert(generation).values(id=1, value=number))
    return number
