"""Routes, one file a noun; each has a `router`."""
