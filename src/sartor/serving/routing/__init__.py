"""Routing of `auto` requests: one classifier an agent, shared figures, a threshold."""
