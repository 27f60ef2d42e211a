"""Federated tuning: rounds in which no device shares its rows."""
