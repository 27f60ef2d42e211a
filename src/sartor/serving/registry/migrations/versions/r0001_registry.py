"""Alembic revision 1: registry tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_KEEP_SQLITE = (
    "create trigger events_{verb} before {verb} on events begin select raise(abort, 'the log of events is "
    "append-only'); end"
)
_KEEP_POSTGRES = (
    "create function events_are_kept() returns trigger language plpgsql as "
    "$$ begin raise exception 'the log of events is append-only'; end $$",
    "create trigger events_kept before update or delete on events for each row execute function events_are_kept()",
)


def _texts(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, nullable=False) for name in names]


def upgrade() -> None:
    """Create the tables of the first version."""
    number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "agents",
        sa.Column("name", sa.Text, primary_key=True),
        *_texts("live", "earlier", "state", "fallback", "candidate"),
        sa.Column("canary_fraction", sa.Double, nullable=False),
        sa.Column("shadow_fraction", sa.Double, nullable=False),
        sa.Column("generation", sa.BigInteger, nullable=False),
        *_texts("changed", "note", "checksum"),
    )
    op.create_table(
        "versions",
        sa.Column("agent", sa.Text, sa.ForeignKey("agents.name"), primary_key=True),
        sa.Column("version", sa.Text, primary_key=True),
        *_texts("release", "release_id", "adapter", "facts", "status", "added", "checksum"),
    )
    op.create_table(
        "events",
        sa.Column("id", number, primary_key=True, autoincrement=True),
        sa.Column("generation", sa.BigInteger, nullable=False),
        *_texts("at", "who", "what", "agent", "version", "why", "was", "became", "numbers", "checksum"),
    )
    op.create_index("events_by_agent", "events", ["agent", "id"])
    op.create_table(
        "keys",
        sa.Column("id", sa.Text, primary_key=True),
        *_texts("name", "agents"),
        sa.Column("admin", sa.Integer, nullable=False),
        *_texts("digest", "created", "expires", "revoked", "checksum"),
    )
    generation = op.create_table(
        "generation",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(generation, [{"id": 1, "value": 0}])
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("update", "delete"):
            op.execute(_KEEP_SQLITE.format(verb=verb))
    else:
        for statement in _KEEP_POSTGRES:
            op.execute(statement)
