"""Rounds that tune a LoRA adapter: a client's work, and whole runs in one process."""
