"""Part of edge.personal.local."""

from __future__ import annotations

MANIFEST, WEIGHTS, CONFIG = "local.json", "adapter_model.safetensors", "adapter_config.json"
