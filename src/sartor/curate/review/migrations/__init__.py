"""Alembic revisions of the review database; `review_store` runs those that are lacking."""
