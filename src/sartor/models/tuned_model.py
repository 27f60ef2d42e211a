"""The base that an Adapter or Release is bound to, and the model with the adapter on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from sartor.core.adapter_methods import method_of
from sartor.core.artifacts import Artifact
from sartor.core.errors import ModelError
from sartor.models import adapters, composed_model
from sartor.models.base import Base, open_base

Notice = Callable[[str], object]


def open_tuned(
    adapter: Artifact,
    notice: Notice = lambda line: None,
    base_name: str = "",
    *,
    bits: int | str = "auto",
    device: torch.device | None = None,
) -> tuple[Base, Any]:
    """Return the base that an Adapter or Release is bound to, and the model with the adapter on it.

    Takes and raises what `open_bound_base` does.
    """
    base = open_bound_base(adapter, notice, base_name, bits=bits, device=device)
    return base, adapters.open_adapter(base.model, adapter.path)


def open_bound_base(
    adapter: Artifact,
    notice: Notice = lambda line: None,
    base_name: str = "",
    *,
    bits: int | str = "auto",
    device: torch.device | None = None,
) -> Base:
    """Return the base that an Adapter or Release is bound to, with its towers.

    `base_name` gives another location of the same base. `bits`: 32 or 16; by default those of a quantised base that it
    was tuned on, else what this machine computes best. `device`: by default the best one.
    Raises ModelError if the base there is not the one that the adapter was tuned on, or if its chat template differs.
    """
    base_manifest = adapter.manifest["base"]
    # a quantised base answers a little differently, so an adapter tuned on one is measured on one
    if bits == "auto" and base_manifest.get("quantisation", "none") != "none":
        bits = base_manifest["bits"]
    if bits == "auto" and _is_full(adapter):
        bits = 32  # as its copies of the weights, so that base and tuned model differ by what was learnt alone
    name = base_name or base_manifest["name"]
    licence = base_manifest["licence"]
    base = open_base(name, licence=licence, bits=bits, device=device, notice=notice, option="--base")
    check_base(adapter, base.ref.digest, base.chat.template_digest, base.ref.name)
    if towers := composed_model.read_towers(adapter.path):
        names = {kind: tower.name for kind, tower in towers.items()}
        base = composed_model.compose_base(base, composed_model.open_towers(names, base.device, notice))
    return base


def _is_full(adapter: Artifact) -> bool:
    """Return whether the adapter holds the base's weights themselves, tuned."""
    try:
        config = json.loads((adapter.path / adapters.CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # `open_adapter` says what is wrong with it
    return isinstance(config, dict) and method_of(config) == "full"


def check_base(adapter: Artifact, digest: str, template_digest: str, name: str) -> None:
    """Raise ModelError unless a base and its chat template are those that `adapter` is bound to."""
    base = adapter.manifest["base"]
    for part, bound, actual in (
        ("base", base["digest"], digest),
        ("chat template", base["template_digest"], template_digest),
    ):
        if bound != actual:
            raise ModelError(
                f"{adapter.path.name} is bound to the {part} {bound[:12]} of {base['name']!r}; {name!r} here has "
                f"{actual[:12]}",
                f"use the {part} that it was tuned on, or tune again on this one",
            )
