"""Duplicates: exact, near, and what is kept of them. Arrays in, arrays out."""
