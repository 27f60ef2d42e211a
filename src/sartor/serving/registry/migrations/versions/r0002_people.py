"""Alembic revision 2: personal versions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the tables of personal versions."""
    texts = ("version", "release_id", "adapter", "artifact", "path", "facts", "note", "added", "checksum")
    op.create_table(
        "people",
        sa.Column("person", sa.Text, primary_key=True),
        sa.Column("agent", sa.Text, primary_key=True),
        *(sa.Column(name, sa.Text, nullable=False) for name in texts),
    )
    op.create_table(
        "speakers",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("person", sa.Text, primary_key=True),
        sa.Column("checksum", sa.Text, nullable=False),
    )
