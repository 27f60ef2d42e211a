"""Audits of the tuned model itself, base beside tuned."""
