"""Alembic migrations of the studio's accounts."""
