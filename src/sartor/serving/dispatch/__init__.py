"""Dispatch of requests to replies: version, fallback, rollout and receipt."""
