"""OpenAI-compatible HTTP server in front of `dispatch`. This process imports no torch and holds no model."""
