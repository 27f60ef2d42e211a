"""Stacked LoRA factors of all attached adapters.

A slot is an adapter's index in every stack. Ranks may differ: a stack has room for the largest, and the rest of a
smaller one is zero. Stacks grow by doubling; freed slots are reused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists

from sartor.core.adapter_methods import REMEDY, SERVED, method_of
from sartor.core.errors import ModelError
from sartor.models.adapters import CONFIG, read_weights
from sartor.models.kernels.reference import LoraStack

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight$")
# options of peft's LoraConfig under which the update is still scale * B A
_HARMLESS = {
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "use_rslora",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "runtime_config",
    "eva_config",
    "auto_mapping",
    "init_lora_weights",
}
# initialisations that leave the base unchanged; others (PiSSA, OLoRA, CorDA, LoftQ) subtract the factors from its
# weights
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Site:
    """A fused projection of one or more linear modules.

    width: number of inputs D.
    modules: names of its modules.
    low, high: module i has the outputs [low[i], high[i]).
    """

    width: int
    modules: tuple[str, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]


@dataclass(frozen=True)
class ModuleLora:
    """LoRA factors of one module: y += scale B A x.

    a: (R, D).
    b: (O, R).
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class LoraStacks:
    """LoRA stacks of every site, and the slot of each adapter.

    With S slots, a stack holds a: (S, sum of ranks, D), b: (S, sum over modules of rank * outputs) and scales: (S,
    modules).
    """

    def __init__(self, sites: Sequence[Site], dtype: torch.dtype, device: torch.device) -> None:
        self.sites, self._dtype, self._device = sites, dtype, device
        self._slots: dict[str, int] = {}
        self.stacks = [self._empty(site, (0,) * len(site.modules), 0) for site in sites]

    def __contains__(self, adapter: str) -> bool:
        return adapter in self._slots

    def slot(self, adapter: str) -> int:
        """Return the slot of an adapter; -1 for the base."""
        return self._slots[adapter] if adapter else -1

    def bytes_of(self, adapter: str) -> int:
        """Return the bytes of an adapter's slot, which has room for the largest rank attached."""
        tensors = (part for stack in self.stacks for part in (stack.a, stack.b, stack.scales))
        return sum(part[0].nbytes for part in tensors) if adapter else 0

    def put(self, adapter: str, path: Path) -> int:
        """Load the PEFT directory `path` under a name; return its bytes. Raises ModelError if it does not fit."""
        shapes = {}
        for site in self.sites:
            for index, module in enumerate(site.modules):
                shapes[module] = self._shape(site, index)
        return self.add(adapter, read_pairs(path, shapes))

    def add(self, adapter: str, pairs: Mapping[str, ModuleLora]) -> int:
        """Add an adapter given as factors by module; return its bytes."""
        used_slots = set(self._slots.values())
        slot = next(stack_index for stack_index in range(len(used_slots) + 1) if stack_index not in used_slots)
        for stack_index, site in enumerate(self.sites):
            self._make_room(
                stack_index, site, [len(pairs[module].a) if module in pairs else 0 for module in site.modules], slot
            )
            self._write(self.stacks[stack_index], site, pairs, slot)
        self._slots[adapter] = slot
        return self.bytes_of(adapter)

    def drop(self, adapter: str) -> None:
        """Free an adapter's slot."""
        slot = self._slots.pop(adapter)
        for stack in self.stacks:
            stack.scales[slot] = 0

    @staticmethod
    def _shape(site: Site, index: int) -> tuple[int, int]:
        return site.high[index] - site.low[index], site.width

    def _empty(self, site: Site, ranks: tuple[int, ...], slots: int) -> LoraStack:
        wide = sum(rank * (high - low) for rank, low, high in zip(ranks, site.low, site.high, strict=True))
        options = {"dtype": self._dtype, "device": self._device}
        compute = torch.promote_types(self._dtype, torch.float32)
        scales = torch.zeros(slots, len(site.modules), dtype=compute, device=self._device)
        a, b = torch.zeros(slots, sum(ranks), site.width, **options), torch.zeros(slots, wide, **options)
        return LoraStack(ranks, low=site.low, high=site.high, a=a, b=b, scales=scales)

    def _make_room(self, stack_index: int, site: Site, ranks: Sequence[int], slot: int) -> None:
        """Replace a stack by a larger copy if the slot or a rank does not fit."""
        old = self.stacks[stack_index]
        new_ranks = tuple(max(have, need) for have, need in zip(old.ranks, ranks, strict=True))
        slots = len(old.scales)
        if new_ranks == old.ranks and slot < slots:
            return
        new = self._empty(site, new_ranks, slots if slot < slots else max(4, 2 * slots))
        new.scales[:slots] = old.scales
        for index, rank in enumerate(old.ranks):
            span = site.high[index] - site.low[index]
            start, b_start = new.module_a(index).start, new.module_b(index).start
            new.a[:slots, start : start + rank] = old.a[:, old.module_a(index)]
            new.b[:slots, b_start : b_start + rank * span] = old.b[:, old.module_b(index)]
        self.stacks[stack_index] = new

    @staticmethod
    def _write(stack: LoraStack, site: Site, pairs: Mapping[str, ModuleLora], slot: int) -> None:
        for index, module in enumerate(site.modules):
            pair = pairs.get(module)
            stack.scales[slot, index] = pair.scale if pair else 0.0
            if pair is None:
                continue
            rank = len(pair.a)
            a, b = (
                stack.a[slot, stack.module_a(index)],
                stack.b[slot, stack.module_b(index)].view(stack.ranks[index], -1),
            )
            a[:rank], a[rank:] = pair.a.to(a.dtype), 0
            b[:rank], b[rank:] = pair.b.T.to(b.dtype), 0


def read_pairs(path: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, ModuleLora]:
    """Return the factors in a PEFT directory by module.

    shapes: (outputs, inputs) of the modules that may have factors.
    Raises ModelError for an adapter that is not plain LoRA, tensors without a module or a partner, and wrong shapes.
    """
    weights = read_weights(path)
    config = _plain_config(path)
    results: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        match = _KEY.match(key)
        if match is None or match["module"] not in shapes:
            raise ModelError(f"the adapter {path} holds {key!r}, which has no place in this base", REMEDY)
        results.setdefault(match["module"], {})[match["factor"]] = tensor
    pairs = {
        module: _pair(path, config, module, factors=factors, shape=shapes[module])
        for module, factors in results.items()
    }
    if not pairs:
        raise ModelError(f"the adapter {path} holds no factors", "sartor tune RECIPE --out ADAPTER --replace")
    if missing := [module for module in shapes if module not in pairs and _is_target(config, module)]:
        raise ModelError(
            f"the adapter {path} lacks the factors of {len(missing)} modules, the first is {missing[0]}",
            "sartor tune RECIPE --out ADAPTER --replace",
        )
    return pairs


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    """Return whether the config adapts a module; peft only warns if its factors are missing."""
    names = (
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "target_parameters",
        "layers_to_transform",
        "layers_pattern",
    )
    fields = {name: config.get(name) for name in names}
    return fields["target_modules"] not in (None, "all-linear") and bool(
        check_target_module_exists(SimpleNamespace(**fields), module)
    )


def _plain_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind, alpha = config["peft_type"], float(config.get("lora_alpha", 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path / CONFIG} is no PEFT config: {error}", "sartor tune RECIPE --out ADAPTER --replace"
        ) from None
    if not math.isfinite(alpha):
        raise ModelError(f"the adapter {path} has alpha {alpha}; it must be finite", REMEDY)
    if (method := method_of(config)) not in SERVED:
        detail = {"dora": "use_dora", "full": "modules_to_save"}.get(method, f"peft_type {kind}")
        raise ModelError(
            f"the adapter {path} is of method {method} ({detail}); the engine computes LoRA alone", REMEDY
        )
    for name, value in config.items():
        # a flag, a list or a mapping switches on each unsupported feature; numbers and strings only parametrise one
        switches = (isinstance(value, bool | list | dict) and bool(value)) or (name == "bias" and value != "none")
        if switches and name not in _HARMLESS:
            raise ModelError(f"the adapter {path} has {name} {value!r:.80}, which the engine does not compute", REMEDY)
    if (init_weights := config.get("init_lora_weights")) not in _BEGINNINGS:
        raise ModelError(
            f"the adapter {path} has init_lora_weights {init_weights!r:.80}, which changed its base", REMEDY
        )
    return dict(config)


def _pair(
    path: Path, config: Mapping[str, Any], module: str, factors: Mapping[str, torch.Tensor], shape: tuple[int, int]
) -> ModuleLora:
    if set(factors) != {"A", "B"}:
        raise ModelError(
            f"the adapter {path} has only factor {''.join(factors)} of {module}",
            "sartor tune RECIPE --out ADAPTER --replace",
        )
    a, b = factors["A"], factors["B"]
    rank = int(_pattern(config.get("rank_pattern"), module, config.get("r", 0)))
    if a.shape != (rank, shape[1]) or b.shape != (shape[0], rank):
        raise ModelError(
            f"the adapter {path} has factors {tuple(a.shape)} and {tuple(b.shape)} on {module}; rank {rank} on a "
            "module of "
            f"{shape[1]} inputs and {shape[0]} outputs needs {(rank, shape[1])} and {(shape[0], rank)}",
            "use the base that it was tuned on",
        )
    # scale = alpha / r; with rank-stabilised LoRA alpha / sqrt(r)
    alpha = float(_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank)))
    return ModuleLora(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that matches, or `otherwise`.

    peft's rank_pattern and alpha_pattern are regular expressions over the end of a module's name.
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise
