"""Worker processes: start, scheduling, supervision, and replay after a worker's death."""
