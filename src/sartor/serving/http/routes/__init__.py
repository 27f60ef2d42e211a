"""The routes, one file a noun: models, replies, vectors, feedback, admin, health. Each has a `router`."""
