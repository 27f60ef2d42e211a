"""Routing of `auto` requests: one classifier per agent, shared weights, a threshold."""
