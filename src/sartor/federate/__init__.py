"""Many devices, one adapter: rounds in which no device shares its rows."""
