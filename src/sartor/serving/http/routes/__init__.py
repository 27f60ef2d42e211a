"""HTTP routes, one file for each resource. Each file has a `router`."""
