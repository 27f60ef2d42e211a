"""Commands of a team: agent registry, ask, replay, receipts."""
