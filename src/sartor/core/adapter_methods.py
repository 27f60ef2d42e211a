"""Tuning method of an adapter, by its adapter_config.json in PEFT's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Methods whose file holds plain factors, added as scale * B A; `pissa` is stored as `lora`
SERVED = ("lora", "rslora")
# peft's name for an adapter without adapted modules; `full` has trained copies of modules alone
NO_TARGETS = "dummy-target-modules"
REMEDY = "sartor export RELEASE --to merged --out DIR, and serve DIR as a base; or tune with method: {kind: lora}"


def method_of(config: Mapping[str, Any]) -> str:
    """Return the `method.kind` of an adapter: `lora`, `dora`, `full`, ...; peft's name for a method of others."""
    if config.get("peft_type") != "LORA":
        return str(config.get("peft_type")).lower()
    if config.get("target_modules") == NO_TARGETS:
        return "full"
    if config.get("use_dora"):
        return "dora"
    return "rslora" if config.get("use_rslora") else "lora"
