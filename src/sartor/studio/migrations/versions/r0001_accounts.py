"""Alembic revision 1 of the studio's accounts: users, invitations, sessions, failed logins, settings."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _texts(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.Text, nullable=False) for name in names]


def _times(*names: str) -> list[sa.Column[float]]:
    return [sa.Column(name, sa.Float, nullable=False) for name in names]


def upgrade() -> None:
    """Create the tables of the first version."""
    op.create_table(
        "users", sa.Column("name", sa.Text, primary_key=True), *_texts("role", "password"), *_times("created_at")
    )
    op.create_table(
        "invitations",
        sa.Column("token_digest", sa.Text, primary_key=True),
        *_texts("name", "role"),
        *_times("expires_at"),
    )
    op.create_table(
        "sessions",
        sa.Column("token_digest", sa.Text, primary_key=True),
        *_texts("name"),
        *_times("created_at", "seen_at"),
    )
    op.create_index("sessions_by_name", "sessions", ["name"])
    op.create_table(
        "failed_logins",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("failures", sa.Integer, nullable=False),
        *_times("last_at", "locked_until"),
    )
    op.create_table("settings", sa.Column("name", sa.Text, primary_key=True), *_texts("value"))
    counter = op.create_table(
        "counter",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(counter, [{"id": 1, "value": 0}])
