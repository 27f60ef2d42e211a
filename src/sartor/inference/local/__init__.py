"""The local engine: continuous batching over one base with many adapters."""
