"""Feedback to a better version of an agent, or a refusal with reasons; personal versions; erasure."""
