"""The tables of a team's registry. A row carries the digest of its content, so that one that was changed from outside is
recognised by name and not served.

    agents      one row per agent: what is live, what was before, what is on trial
    versions    immutable: a name and a version mean one Release for ever; only where it lies and its status may change
    events      append-only: who changed what, when, from what to what, and why
    keys        API keys, hashed
    people      personal versions: whose (an HMAC, never a name), of which agent, tuned on which version
    speakers    which key may speak for whom
    generation  one row: a number that rises with every change, and the lock that makes changes follow each other

Lists and mappings are canonical JSON in text columns, times are UTC text, flags are 0 or 1: every value comes back as it
was written, on SQLite and on Postgres, and a damaged one cannot keep the rows beside it from being read.
"""

from __future__ import annotations

from pathlib import Path

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

from sartor.core import database
from sartor.core.database import Database, Form

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
    found = connection.execute(select(generation.c.value)).scalar_one_or_none()
    return int(found if found is not None else connection.execute(select(func.max(events.c.generation))).scalar() or 0)


def next_generation(connection: Connection) -> int:
    """The number of the change that is being made."""
    number = generation_of(connection) + 1
    if not connection.execute(update(generation).values(value=number)).rowcount:
        connection.execute(insert(generation).values(id=1, value=number))
    return number
