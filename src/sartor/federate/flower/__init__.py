"""Rounds over Flower (flwr 1.42, Message API)."""
