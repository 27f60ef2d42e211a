"""Alembic revisions of the registry; `registry_schema` runs those that are lacking."""
