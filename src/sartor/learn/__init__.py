"""Learning from feedback: next versions of agents, personal versions, erasure."""
