"""Agent, Version, Event and their SQL tables.

The changes are functions from one Agent to the next and know nothing of a database: `registry` runs them in a
transaction.

    agents      one row per agent: what is live, what was before, what is on trial
    versions    immutable: a name and a version mean one Release for ever; only where it lies and its status may change
    events      append-only: who changed what, when, from what to what, and why
    keys        API keys, hashed
    people      personal versions: whose (an HMAC, never a name), of which agent, tuned on which version
    speakers    which key may speak for whom
    generation  one row: a number that rises with every change, and the lock that makes changes follow each other

Lists and mappings are canonical JSON in text columns, times are UTC text, flags are 0 or 1: every value comes back as
it was written, on SQLite and on Postgres, and a damaged one cannot keep the rows beside it from being read.
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
    func,
    insert,
    select,
    update,
)

from sartor.core import database, records
from sartor.core.database import Database, Form, sealed
from sartor.core.errors import ConfigError, ConflictError

# versions that were live before, the newest last: how often one may go back
MOST_EARLIER = 8
State = Literal["serving", "draining", "removed"]


@dataclass(frozen=True)
class Agent:
    """One agent: the version that answers, those that did, and the one on trial.

    earlier: formerly live, the newest last. state: a draining agent ends what it began and takes nothing new.
    candidate: answers `canary_fraction` of the requests, and `shadow_fraction` of them unseen. generation: of its last
    change.
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
        """The version that was live before, which steps in first; empty if there is none."""
        return self.earlier[-1] if self.earlier else ""

    @property
    def is_blank(self) -> bool:
        """Whether it is a name alone: what was to answer was refused, and nothing else was ever added."""
        return not self.live and self.state != "removed"

    @property
    def versions(self) -> tuple[str, ...]:
        """What a server has to hold ready: live, previous, candidate."""
        return tuple(dict.fromkeys(version for version in (self.live, self.previous, self.candidate) if version))

    def expecting(self, version: str | None, trial: str | None = None) -> Agent:
        """Itself, if `version` is live and `trial` on trial (None expects nothing). Raises ConflictError with what
        stands.
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
        """`version` live, the one before it previous, and no trial: what it was compared with is no longer there."""
        earlier = self.earlier if self.live in ("", version) else (*self.earlier, self.live)[-MOST_EARLIER:]
        return replace(self.without_trial(), live=version, earlier=earlier, state="serving")

    def rolled_back(self) -> Agent:
        """Without its trial, if one runs; else with the version that was live before. Raises ConflictError if there is
        none.
        """
        if self.candidate:
            return self.without_trial()
        if not self.earlier:
            raise ConflictError(
                f"{self.name}@{self.live} has no previous version to go back to", f"sartor agents remove {self.name}"
            )
        return replace(self, live=self.earlier[-1], earlier=self.earlier[:-1], state="serving")

    def with_trial(self, version: str, *, canary_fraction: float = 0.0, shadow_fraction: float = 0.0) -> Agent:
        """With `version` on trial. Raises ConflictError while another is, ConfigError for a fraction out of range."""
        for name, fraction in (("canary", canary_fraction), ("shadow", shadow_fraction)):
            if not 0 <= fraction <= 1:
                raise ConfigError(f"the {name} fraction is {fraction}; it lies in 0..1", f"--{name} 0.1")
        if not (canary_fraction or shadow_fraction):
            raise ConfigError("a trial of no request at all shows nothing", "--canary 0.1, or --shadow 0.1")
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
        """Without a trial."""
        return replace(self, candidate="", canary_fraction=0.0, shadow_fraction=0.0)

    def as_row(self) -> dict[str, Any]:
        """The row, sealed."""
        return sealed({**self.as_json(), "earlier": _json(self.earlier), "fallback": _json(self.fallback)})

    def as_json(self) -> dict[str, Any]:
        """Every field, as an event and `agents list` say it."""
        return {**vars(self), "earlier": list(self.earlier), "fallback": list(self.fallback)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Agent:
        """The agent of a row that is whole."""
        return cls.from_json({**row, "earlier": json.loads(row["earlier"]), "fallback": json.loads(row["fallback"])})

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Agent:
        """The agent that `as_json` said."""
        lists = {name: tuple(fields[name]) for name in ("earlier", "fallback")}
        return cls(**{**{name: value for name, value in fields.items() if name != "checksum"}, **lists})


@dataclass(frozen=True)
class AgentVersion:
    """One version of an agent: a Release that was admitted, and what is known of it.

    release: the directory; the same Release may move. adapter: the digest under which engines attach it. facts: what a
    request needs of the Release without opening it: system_prompt, sampling, base and template digest, licence, rank.
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
        """`agent@version`."""
        return f"{self.agent}@{self.version}"

    def as_row(self) -> dict[str, Any]:
        """The row, sealed."""
        return sealed({**vars(self), "facts": _json(self.facts)})

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> AgentVersion:
        """The version of a row that is whole."""
        return cls(**{**{name: row[name] for name in row if name != "checksum"}, "facts": json.loads(row["facts"])})


@dataclass(frozen=True)
class Event:
    """One change: who made it, why, and the agent before and after it (`{}` where there was none). numbers: what
    decided.
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
        """A row of `sartor agents events`."""
        live = {"from": self.was.get("live", ""), "to": self.became.get("live", "")}
        fields = {name: getattr(self, name) for name in ("id", "at", "who", "what", "agent", "version", "why")}
        return {**fields, **live, "numbers": dict(self.numbers)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Event:
        """The event of a row that is whole."""
        plain = {name: row[name] for name in row if name != "checksum"}
        return cls(**{**plain, **{name: json.loads(row[name]) for name in ("was", "became", "numbers")}})


def _json(value: Any) -> str:
    return records.canonical(
        list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value
    ).decode()


metadata = MetaData()


def _text(name: str, *, key: bool = False) -> Column[str]:
    return Column(name, Text, primary_key=key, nullable=False)


# SQLite numbers rows by itself only where the key is exactly INTEGER
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

generation = Table(
    "generation",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", BigInteger, nullable=False),
)

MIGRATIONS = Path(__file__).parent / "migrations"


def open_database(url: str) -> Database:
    """The database of a team's registry at a SQLAlchemy URL. Raises as `sartor.core.database.open_database`."""
    return database.open_database(url, Form("registry", "registry: ", MIGRATIONS, generation.c.value))


def generation_of(connection: Connection) -> int:
    """The number of the newest change; of a registry that lost its counter, the one that its log knows."""
    value = connection.execute(select(generation.c.value)).scalar_one_or_none()
    return int(value if value is not None else connection.execute(select(func.max(events.c.generation))).scalar() or 0)


def next_generation(connection: Connection) -> int:
    """The number of the change that is being made."""
    number = generation_of(connection) + 1
    if not connection.execute(update(generation).values(value=number)).rowcount:
        connection.execute(insert(generation).values(id=1, value=number))
    return number
