"""Alembic revisions of the review database; `review_store` applies missing ones."""
