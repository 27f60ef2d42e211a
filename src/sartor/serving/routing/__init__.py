"""How `auto` chooses an agent: one classifier an agent, shared figures, a threshold."""
