"""LoRA factors of one adapter, read from a PEFT directory for a base whose linear modules have known places.

    y += B' (A x)    with B' = scale B, scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA

Taken is what is a sum of two factors and nothing else: LoRA and rsLoRA on linear modules of the blocks, with any targets and
a rank and alpha of its own for each. Everything else that an adapter_config.json can ask for is refused by name, since
leaving it out would answer as another model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from sartor.core.errors import ModelError
from sartor.models.adapters import read_weights
from sartor.models.base import quiet

# What a config may say otherwise than peft's default without changing what is computed.
_HARMLESS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_core", "runtime_config", "eva_config", "qalora_group_size",
}  # fmt: skip
# Ways to begin that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ) take their factors out of its weights.
_HARMLESS_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")
_REMEDY = "give an adapter as `sartor tune` writes it, or merge it into its base and serve that as a base"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Place:
    """Where a linear module stands: its layer, and its number among the layer's linear modules."""

    layer: int
    part: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Factor:
    """Of one module: a (R, in); b (R, out), scaled."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class Factors:
    """Of one adapter, by (layer, part)."""

    parts: Mapping[tuple[int, int], Factor]
    rank: int

    @property
    def bytes(self) -> int:
        """What they take."""
        return sum(tensor.nbytes for part in self.parts.values() for tensor in (part.a, part.b))


def read_factors(path: Path, places: Mapping[str, Place], dtype: torch.dtype, device: torch.device) -> Factors:
    """The factors in a PEFT directory, in the base's dtype. `places`: the base's linear modules by name.

    Raises ModelError when files cannot be read, when the config asks for more than LoRA, when a tensor has no place, is
    missing, or is not of the config's rank or the base's shape.
    """
    weights = read_weights(path)
    config = _read_config(path)
    wanted = {name for name in places if check_target_module_exists(config, name)}
    found: dict[tuple[int, int], Factor] = {}
    for name in sorted({_module(key, path) for key in weights}):
        if name not in places:
            raise ModelError(f"the adapter {path} changes {name!r}, which is no linear module in a layer of this base", _REMEDY)
        place = places[name]
        pair = [weights[key] for key in (f"{_PREFIX}{name}.lora_{letter}.weight" for letter in "AB") if key in weights]
        if len(pair) != 2:
            raise ModelError(f"the adapter {path} has only one of the two factors of {name!r}", _REMEDY)
        rank, scale = _rank_and_scale(config, name)
        shapes = [tuple(tensor.shape) for tensor in pair]
        if shapes != [(rank, place.inputs), (place.outputs, rank)]:
            raise ModelError(
                f"the adapter {path} has factors of shapes {shapes} for {name!r}, where its config and this base say "
                f"{[(rank, place.inputs), (place.outputs, rank)]}",
                _REMEDY,
            )
        found[place.layer, place.part] = _factor(path, name, pair, scale, dtype, device)
        wanted.discard(name)
    if wanted:
        raise ModelError(
            f"the adapter {path} lacks the factors of {len(wanted)} modules, the first is {min(wanted)!r}", _REMEDY
        )
    return Factors(found, max(len(part.a) for part in found.values()))


def _read_config(path: Path) -> Any:
    try:
        with quiet():
            config = peft.PeftConfig.from_pretrained(str(path))
    except Exception as error:  # unknown kinds are KeyError, wrong types TypeError or ValueError
        raise ModelError(
            f"the config of the adapter {path} cannot be read: {' '.join(str(error).split())[:200]}", _REMEDY
        ) from None
    if type(config) is not peft.LoraConfig:
        raise ModelError(f"the adapter {path} is of kind {config.peft_type}, not LoRA", _REMEDY)
    if config.init_lora_weights not in _HARMLESS_BEGINNINGS:
        raise ModelError(f"the adapter {path} began as {config.init_lora_weights!r}, which changed its base", _REMEDY)
    plain = peft.LoraConfig()
    for field in dataclasses.fields(config):
        said = getattr(config, field.name)
        if field.name not in _HARMLESS | {"init_lora_weights"} and said and said != getattr(plain, field.name):
            raise ModelError(f"the adapter {path} has {field.name}: {said}, which is more than LoRA", _REMEDY)
    if not config.target_modules:
        raise ModelError(f"the adapter {path} names no target_modules", _REMEDY)
    return config


def _module(key: str, path: Path) -> str:
    for end in (".lora_A.weight", ".lora_B.weight"):
        if key.startswith(_PREFIX) and key.endswith(end):
            return key[len(_PREFIX) : -len(end)]
    raise ModelError(f"the adapter {path} holds {key!r}, which is no factor of LoRA", _REMEDY)


def _rank_and_scale(config: Any, name: str) -> tuple[int, float]:
    """As peft resolves the patterns."""
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _factor(path: Path, name: str, pair: list[Any], scale: float, dtype: torch.dtype, device: torch.device) -> Factor:
    a, b = pair[0].to(device, dtype), (pair[1].float() * scale).T.to(device, dtype).contiguous()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ModelError(f"the adapter {path} holds values in {name!r} that are not finite in {dtype}", "tune it again")
    return Factor(a.contiguous(), b)
