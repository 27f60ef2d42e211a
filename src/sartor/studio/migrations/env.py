"""Alembic environment of the studio's accounts.

Revisions run on the connection and in the transaction of `sartor.core.database`.
"""

from __future__ import annotations

from sartor.core.database import run_revisions

run_revisions()
