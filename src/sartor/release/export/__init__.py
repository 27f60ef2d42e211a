"""Export of a Release to other formats, measured against the Release in other runtimes."""
