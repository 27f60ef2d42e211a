"""Quickstart verbs: from own data to a tested specialist by one command."""
