"""Registry of agents and their versions, in SQL."""
