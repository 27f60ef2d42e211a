"""Verbs of a team: registry of agents, ask, replay, receipts."""
