"""Release -> Reply."""
