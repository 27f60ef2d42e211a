"""Worker processes: start, schedule, watch, replay after a death."""
