"""Tuning on a device within limits that the system enforces."""
