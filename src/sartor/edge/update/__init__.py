"""Signed updates: publishing, downloading, checking, activating."""
