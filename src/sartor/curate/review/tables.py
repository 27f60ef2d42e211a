"""The tables of the queue. `said` is the canonical JSON of an Item, a Decision or a sample's plan, and every row of these
carries the digest of its content.

    review_items      what was found, each once
    review_found      in which Dataset (by its id) an item was found
    review_decisions  append-only: who decided what, when and why; the same one is written once
    review_samples    which rows were drawn, for which bound
    review_counter    one row, which every change locks
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, MetaData, Table, Text

from sartor.core.database import Form

metadata = MetaData()
MIGRATIONS = Path(__file__).parent / "migrations"


def _text(name: str, *, key: bool = False) -> Column[str]:
    return Column(name, Text, primary_key=key, nullable=False)


items = Table("review_items", metadata, _text("id", key=True), _text("said"), _text("checksum"))

found = Table(
    "review_found",
    metadata,
    Column("item", Text, ForeignKey("review_items.id"), primary_key=True),
    _text("dataset", key=True),
)

decisions = Table(
    "review_decisions",
    metadata,
    # SQLite numbers rows by itself only where the key is exactly INTEGER
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    _text("key"),
    Column("item", Text, ForeignKey("review_items.id"), nullable=False),
    _text("said"),
    _text("checksum"),
)

samples = Table("review_samples", metadata, _text("id", key=True), _text("dataset"), _text("said"), _text("checksum"))

counter = Table(
    "review_counter",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("value", BigInteger, nullable=False),
)


def form() -> Form:
    """What a database of the queue holds."""
    return Form("review queue", "--queue ", MIGRATIONS, counter.c.value, "review_version")
