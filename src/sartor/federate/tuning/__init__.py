"""Rounds that tune a LoRA adapter: what a client does, and whole runs in one process."""
