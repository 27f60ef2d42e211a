"""A Release in other formats, measured against the Release in other runtimes."""
