"""Privacy budget, client noise, DP-SGD, and attacks that measure what an adapter reveals."""
