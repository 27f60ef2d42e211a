"""The registry of agents and their versions, in SQL."""
