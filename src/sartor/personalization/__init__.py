"""What learning, devices and federation share about the adapter of one user."""
