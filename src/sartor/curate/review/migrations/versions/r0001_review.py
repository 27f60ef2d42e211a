"""Alembic revision 1 of the review tables, with triggers that keep decisions append-only."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_KEEP_SQLITE = (
    "create trigger review_decisions_{verb} before {verb} on review_decisions "
    "begin select raise(abort, 'decisions are append-only'); end"
)
_KEEP_POSTGRES = (
    "create function review_decisions_are_kept() returns trigger language plpgsql as "
    "$$ begin raise exception 'decisions are append-only'; end $$",
    "create trigger review_decisions_kept before update or delete on review_decisions "
    "for each row execute function review_decisions_are_kept()",
)


def _texts(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, nullable=False) for name in names]


def upgrade() -> None:
    """Create the tables of the first version."""
    number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table("review_items", sa.Column("id", sa.Text, primary_key=True), *_texts("said", "checksum"))
    op.create_table(
        "review_found",
        sa.Column("item", sa.Text, sa.ForeignKey("review_items.id"), primary_key=True),
        sa.Column("dataset", sa.Text, primary_key=True),
    )
    op.create_index("review_found_by_dataset", "review_found", ["dataset"])
    op.create_table(
        "review_decisions",
        sa.Column("number", number, primary_key=True, autoincrement=True),
        sa.Column("key", sa.Text, nullable=False, unique=True),
        sa.Column("item", sa.Text, sa.ForeignKey("review_items.id"), nullable=False),
        *_texts("said", "checksum"),
    )
    op.create_index("review_decisions_by_item", "review_decisions", ["item"])
    op.create_table(
        "review_samples", sa.Column("id", sa.Text, primary_key=True), *_texts("dataset", "said", "checksum")
    )
    counter = op.create_table(
        "review_counter",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(counter, [{"id": 1, "value": 0}])
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("update", "delete"):
            op.execute(_KEEP_SQLITE.format(verb=verb))
    else:
        for statement in _KEEP_POSTGRES:
            op.execute(statement)
