"""Checks of a Release or adapter before it is loaded."""
