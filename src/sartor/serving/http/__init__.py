"""OpenAI-compatible HTTP in front of `dispatch`: no torch, no model in this process."""
