"""Alembic environment of the registry."""

from __future__ import annotations

from sartor.core.database import run_revisions

run_revisions()
