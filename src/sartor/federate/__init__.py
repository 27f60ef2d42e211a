"""Many devices, one Adapter: rounds, exact aggregation, secure summation, accounted privacy."""
