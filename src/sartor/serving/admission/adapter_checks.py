"""adapter_config.json of plain LoRA, and nothing else: what peft could be talked into by another key is refused by name.

A key that is not known here is let pass only while it is off (null, false, empty), so that a method of a newer peft is not
served as if it were none. Patterns are regular expressions to peft; here they are names with dots, so that none can be slow.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.errors import AdmissionError

MOST_BYTES = 1 << 20
MOST_RANK = 256
MOST_NAMES = 100_000
MOST_PATTERNS = 2_000
_NAMES = re.compile(r"[\w.-]{1,300}", re.ASCII)
_PATTERN = re.compile(r"\^?[\w.-]{1,300}", re.ASCII)
# peft changes the base's own weights for the others (PiSSA, OLoRA, CorDA, LoftQ), which nobody else's adapter survives
_INITS = (True, False, "gaussian", "eva", "orthogonal")
# says nothing of how the adapter computes
_FREE = frozenset({
    "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
})  # fmt: skip
_READ = frozenset({
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "layers_to_transform",
    "layers_pattern", "use_rslora", "fan_in_fan_out", "bias",
})  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """What a LoRA's config says of how it computes. Patterns: name or end of a name -> rank or alpha, first match counts."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: frozenset[str]
    layers: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    is_rank_stabilised: bool
    is_transposed: bool

    def rank_of(self, module: str) -> int:
        """The rank that is declared for a module."""
        return int(_of(self.ranks, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What B A is multiplied with: alpha / rank, or alpha / sqrt(rank) when rank-stabilised (arXiv:2312.03732)."""
        alpha, rank = float(_of(self.alphas, module, self.alpha)), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilised else rank)

    def targets_module(self, module: str) -> bool:
        """Whether peft would put factors on the base's module of that name."""
        if module in self.targets:
            return True
        is_named = any(end in self.targets for end in _ends(module))
        return is_named and (self.layers is None or self._layer_of(module) in self.layers)

    def _layer_of(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        found = (re.match(rf"{pattern}\.(\d+)\.", module) for pattern in patterns)
        return next((int(match[1]) for match in found if match), None)


def _ends(module: str) -> list[str]:
    """a.b.c -> a.b.c, b.c, c."""
    parts = module.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


def _of(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that is the module's name or an end of it; with ^ the name alone."""
    names = {f"^{module}", *_ends(module)} if patterns else ()
    return next((value for key, value in patterns.items() if key in names), default)


def read_config(file: Path) -> LoraConfig:
    """The config of a plain LoRA. Raises AdmissionError naming the key that says otherwise, its value and what is taken."""
    said = _read(file)
    if said.get("peft_type") != "LORA":
        raise _refusal("peft_type", said.get("peft_type"), "LORA")
    if said.get("bias", "none") != "none":
        raise _refusal("bias", said["bias"], "none")
    if said.get("task_type") not in (None, "CAUSAL_LM"):
        raise _refusal("task_type", said["task_type"], "CAUSAL_LM")
    if not any(said.get("init_lora_weights", True) is one or said["init_lora_weights"] == one for one in _INITS):
        raise _refusal("init_lora_weights", said["init_lora_weights"], "a start that leaves the base as it is: true, gaussian")
    for key in sorted(set(said) - _FREE - _READ):
        if said[key] not in (None, False, "", [], {}):
            raise _refusal(key, said[key], "nothing: plain LoRA alone is served")
    return _config(said)


def _config(said: Mapping[str, Any]) -> LoraConfig:
    rank, layers = _rank("r", said.get("r")), said.get("layers_to_transform")
    pattern = said.get("layers_pattern") or []
    pattern = [pattern] if isinstance(pattern, str) else pattern
    targets = said.get("target_modules")
    for key, names in (("target_modules", targets), ("layers_pattern", pattern)):
        if not isinstance(names, list) or len(names) > MOST_NAMES or not all(_is(_NAMES, name) for name in names):
            raise _refusal(key, names, "a list of names of modules; no regular expression")
    if not targets:
        raise _refusal("target_modules", targets, "at least one name of a module")
    layers = [layers] if type(layers) is int else layers
    if layers and not (isinstance(layers, list) and all(type(one) is int and one >= 0 for one in layers)):
        raise _refusal("layers_to_transform", layers, "numbers of layers")
    return LoraConfig(
        rank=rank,
        alpha=_alpha("lora_alpha", said.get("lora_alpha")),
        ranks={key: _rank("rank_pattern", value) for key, value in _patterns(said, "rank_pattern").items()},
        alphas={key: _alpha("alpha_pattern", value) for key, value in _patterns(said, "alpha_pattern").items()},
        targets=frozenset(targets),
        layers=frozenset(layers) if layers else None,
        layers_pattern=tuple(pattern),
        is_rank_stabilised=_flag(said, "use_rslora"),
        is_transposed=_flag(said, "fan_in_fan_out"),
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {file.stat().st_size:,} bytes; {MOST_BYTES:,} are the limit")
        said = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise AdmissionError(f"{file} is no adapter config: {error}", _REMEDY, "config") from None
    return said


_REMEDY = "release an adapter that `sartor tune` wrote, or any plain LoRA in PEFT's form"


def _refusal(key: str, value: Any, taken: str) -> AdmissionError:
    return AdmissionError(f"adapter_config.json has {key} {str(value)[:120]!a}; what is served is {taken}", _REMEDY, "config")


def _is(pattern: re.Pattern[str], said: Any) -> bool:
    return isinstance(said, str) and pattern.fullmatch(said) is not None


def _rank(key: str, said: Any) -> int:
    if type(said) is not int or not 1 <= said <= MOST_RANK:
        raise _refusal(key, said, f"a rank from 1 to {MOST_RANK}")
    return said


def _alpha(key: str, said: Any) -> float:
    if isinstance(said, bool) or not isinstance(said, (int, float)) or not abs(said) < 1e9:  # a NaN is not below either
        raise _refusal(key, said, "a finite number")
    return float(said)


def _flag(said: Mapping[str, Any], key: str) -> bool:
    if not isinstance(value := said.get(key, False), bool):
        raise _refusal(key, value, "true or false")
    return value


def _patterns(said: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = said.get(key) or {}
    if not isinstance(value, dict) or len(value) > MOST_PATTERNS or not all(_is(_PATTERN, name) for name in value):
        raise _refusal(key, value, "names of modules with a number each; no regular expression")
    return value
