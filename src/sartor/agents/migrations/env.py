"""What alembic runs: the revisions, on the connection and in the transaction of `sartor.agents.database`."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
