"""Alembic revisions of the registry; `registry_schema` runs the missing ones."""
