"""Verbs around a team: the registry of agents, ask, replay, receipts."""
