"""The tables of a team's registry. A row carries the digest of its content, so that one that was changed from outside is
recognised by name and not served.

    agents      one row per agent: what is live, what was before, what is on trial
    versions    immutable: a name and a version mean one Release for ever; only where it lies and its status may change
    events      append-only: who changed what, when, from what to what, and why
    keys        API keys, hashed
    generation  one row: a number that rises with every change, and the lock that makes changes follow each other

Lists and mappings are canonical JSON in text columns, times are UTC text, flags are 0 or 1: every value comes back as it
was written, on SQLite and on Postgres, and a damaged one cannot keep the rows beside it from being read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Integer, MetaData, Table, Text

from sartor.core import records

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

generation = Table(
    "generation",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", BigInteger, nullable=False),
)


def checksum(row: Mapping[str, Any]) -> str:
    """sha256 over every column of a row but `checksum`; an event is digested before the database gives it its number."""
    return records.digest({name: value for name, value in row.items() if name != "checksum"})


def sealed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with its checksum, to be written."""
    return {**row, "checksum": checksum(row)}


def is_whole(row: Mapping[str, Any]) -> bool:
    """Whether a row that was read is the one that was written."""
    try:
        return bool(checksum(row) == row["checksum"])
    except (TypeError, ValueError):  # bytes, or text with a lone surrogate: nothing that was ever written
        return False
