"""Personal versions and keyed user ids.

A change raises the registry's generation, so servers learn of it within a second. The log records that a user was
forgotten, when, by whom, and under which digest; it never held a name.

The same digest identifies the user in the inbox (`Feedback.by`), the registry, receipts and folder names.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Table, select

from sartor.core import records
from sartor.core.database import Database
from sartor.core.errors import ConfigError, RequestError
from sartor.serving.receipts import Digest
from sartor.serving.registry import registry_schema
from sartor.serving.registry.registry import NOBODY, ChangeCause
from sartor.serving.registry.registry_head import FORGOTTEN, is_current, put_row, remove_rows, transaction_of
from sartor.serving.registry.registry_schema import AgentVersion

SUFFIX = "+personal"
ANYBODY = "*"
MOST_CHARACTERS = 256
FOLDER, ADAPTER = "people", "adapter"
# lock in a person's folder for an agent, held while their version is tuned or they are forgotten
TUNING = "tuning"


def user_digest(user: str, digest: Digest) -> str:
    """Return the digest of a user's id, 64 hex digits; empty for an empty id.

    Raises RequestError if the id is too long.
    """
    if len(user) > MOST_CHARACTERS:
        raise RequestError(
            f"the user's id has {len(user)} characters; the limit is {MOST_CHARACTERS}",
            f'"user" of at most {MOST_CHARACTERS} characters',
        )
    return digest("user", user)


def required_user_digest(user: str, digest: Digest) -> str:
    """Return the digest of a user's id. Raises ConfigError for an empty or too long id."""
    if not user or len(user) > MOST_CHARACTERS:
        raise ConfigError(f"{user[:40]!r} cannot be a user's id", f"--user ID, of 1 to {MOST_CHARACTERS} characters")
    return user_digest(user, digest)


def folder_of(state: Path, person: str, agent: str = "") -> Path:
    """Return the folder of a person's files, or of those for one agent."""
    folder = state / FOLDER / person
    return folder / agent if agent else folder


def is_personal(path: Path, state: Path) -> bool:
    """Return whether a directory is that of a personal adapter of this team."""
    return path.absolute().is_relative_to((state / FOLDER).absolute())


TUNED, REFUSED, ALLOWED = "personal tuned", "personal refused", "key speaks"
WITHDRAWN = "key speaks no more"


@dataclass(frozen=True)
class UserVersion:
    """Person's own version of an agent.

    version, release_id: the version that it was tuned on; it answers only while that is live.
    adapter: digest under which engines attach it.
    artifact: id of the Adapter in `path`. Adapter, artifact and path are empty until a tuning passes the gate.
    facts: rows and the gate's figures.
    note: reason why the newest tuning was refused, if it was.
    """

    person: str
    agent: str
    version: str
    release_id: str
    adapter: str = ""
    artifact: str = ""
    path: str = ""
    facts: Mapping[str, Any] | None = None
    note: str = ""
    added: str = ""

    @property
    def name(self) -> str:
        """Name in replies: `faq@1.0+personal`."""
        return f"{self.agent}@{self.version}{SUFFIX}"

    def on(self, live: AgentVersion) -> AgentVersion:
        """Return the version for loading: its own adapter, with the live version's prompt, sampling and tools."""
        return replace(
            live, version=f"{self.version}{SUFFIX}", release=self.path, release_id=self.artifact, adapter=self.adapter
        )

    def as_row(self) -> dict[str, Any]:
        """Return the table row, to be sealed."""
        return {**asdict(self), "facts": records.canonical(dict(self.facts or {})).decode()}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> UserVersion:
        """Return the personal version of an intact row."""
        return cls(**{**{name: row[name] for name in row if name != "checksum"}, "facts": json.loads(row["facts"])})


@dataclass(frozen=True)
class People:
    """Personal versions at one generation.

    versions: by (person, agent).
    damaged_count: rows that were changed from outside and are not used.
    """

    generation: int
    versions: Mapping[tuple[str, str], UserVersion]
    damaged_count: int = 0


class UserVersionStore:
    """Personal versions in one team's registry. Safe to use from several threads and processes."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def read(self, person: str = "") -> People:
        """Return the personal versions of everybody, or of one person."""
        query = select(registry_schema.people)
        if person:
            query = query.where(registry_schema.people.c.person == person)
        with self.database.read() as connection:
            generation = registry_schema.generation_of(connection)
            rows = [dict(row) for row in connection.execute(query).mappings()]
            intact = [UserVersion.from_row(row) for row in rows if is_current(connection, registry_schema.people, row)]
        return People(
            generation, {(version.person, version.agent): version for version in intact}, len(rows) - len(intact)
        )

    def put(self, personal: UserVersion, cause: ChangeCause = NOBODY, *, since: int | None = None) -> None:
        """Store a personal version, which replaces the person's earlier one of the agent.

        since: generation at which its tuning began. Raises ConfigError if the person was forgotten after that, else as
        `Database.change`.
        """
        with self.database.change() as connection:
            _check_not_forgotten(connection, personal.person, since)
            put_row(connection, registry_schema.people, replace(personal, added=_now()).as_row())
            note(
                connection,
                TUNED,
                agent=personal.agent,
                version=personal.version,
                cause=cause,
                numbers={"person": personal.person},
            )

    def refuse(
        self, personal: UserVersion, reason: str, cause: ChangeCause = NOBODY, *, since: int | None = None
    ) -> None:
        """Store the reason why a tuning was refused. The person's current version stays.

        since: as in `put`.
        """
        with self.database.change() as connection:
            _check_not_forgotten(connection, personal.person, since)
            key = {"person": personal.person, "agent": personal.agent}
            row = connection.execute(select(registry_schema.people).filter_by(**key)).mappings().first()
            current = personal
            if row is not None and is_current(connection, registry_schema.people, dict(row)):
                current = UserVersion.from_row(dict(row))
            refused = replace(current, note=reason, added=current.added or _now())
            put_row(connection, registry_schema.people, refused.as_row())
            note(
                connection,
                REFUSED,
                agent=personal.agent,
                version=personal.version,
                cause=cause,
                numbers={"person": personal.person},
            )

    def forget(self, person: str, cause: ChangeCause = NOBODY) -> tuple[int, dict[str, int]]:
        """Remove every row of a person.

        Returns the generation of the change, and the number of rows removed by table.
        """
        with self.database.change() as connection:
            removed = {
                table.name: remove_rows(connection, table, person=person)
                for table in (registry_schema.people, registry_schema.speakers)
            }
            return note(connection, FORGOTTEN, agent="", version="", cause=cause, numbers={"person": person}), removed

    def forgotten_since(self, generation: int) -> list[str]:
        """Return the persons that changes after this generation forget."""
        with self.database.read() as connection:
            return _forgotten_since(connection, generation)

    def check_not_forgotten(self, person: str, since: int) -> None:
        """Raise ConfigError if a person was forgotten after the generation `since`."""
        with self.database.read() as connection:
            _check_not_forgotten(connection, person, since)

    def allow(self, key: str, person: str, cause: ChangeCause = NOBODY) -> None:
        """Let a key speak for a person, or for anybody (`ANYBODY`)."""
        with self.database.change() as connection:
            put_row(connection, registry_schema.speakers, {"key": key, "person": person})
            note(connection, ALLOWED, agent="", version="", cause=cause, numbers={"key": key})

    def withdraw(self, key: str, person: str, cause: ChangeCause = NOBODY) -> bool:
        """Let a key speak for a person, or for anybody, no more. Returns whether it could."""
        with self.database.change() as connection:
            rows = remove_rows(connection, registry_schema.speakers, key=key, person=person)
            if rows:
                note(connection, WITHDRAWN, agent="", version="", cause=cause, numbers={"key": key})
            return bool(rows)

    def mentions(self, person: str) -> dict[str, int]:
        """Return the number of a person's rows by table."""

        def count(connection: Connection, table: Table) -> int:
            return len(connection.execute(select(table.c.person).where(table.c.person == person)).all())

        with self.database.read() as connection:
            return {
                table.name: count(connection, table) for table in (registry_schema.people, registry_schema.speakers)
            }


def speakers(connection: Connection) -> dict[str, frozenset[str]]:
    """Return the persons for whom each key may speak; rows that were changed from outside do not count."""
    result: dict[str, frozenset[str]] = {}
    for row in connection.execute(select(registry_schema.speakers)).mappings():
        if is_current(connection, registry_schema.speakers, dict(row)):
            result[row["key"]] = result.get(row["key"], frozenset()) | {row["person"]}
    return result


def _forgotten_since(connection: Connection, generation: int) -> list[str]:
    forgotten = transaction_of(connection).log.forgotten
    return [forgotten[number] for number in sorted(forgotten, key=int) if int(number) > generation]


def _check_not_forgotten(connection: Connection, person: str, since: int | None) -> None:
    if since is not None and person in _forgotten_since(connection, since):
        raise ConfigError(
            "that user was forgotten while this ran; nothing of them is stored",
            "sartor personal tune again, if there is new feedback of that user",
        )


def note(
    connection: Connection, action: str, agent: str, version: str, cause: ChangeCause, numbers: Mapping[str, Any]
) -> int:
    """Write an event into the log under the next generation, and return that."""
    generation = registry_schema.next_generation(connection)
    event = {
        "generation": generation,
        "at": _now(),
        "who": cause.by,
        "what": action,
        "agent": agent,
        "version": version,
        "why": cause.reason,
        "was": "{}",
        "became": "{}",
        "numbers": records.canonical({**cause.numbers, **numbers}).decode(),
    }
    transaction_of(connection).write_event(event)
    return generation


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
