"""What a device learns from its owner: rows that never leave it, and an adapter on the shipped Release."""
