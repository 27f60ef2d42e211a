"""Predicted peak memory of a tuning setting.

    peak = floor + rows + factors and moments + the largest of (head, backward pass, forward pass)

floor: Python with torch, measured once (`memory_plan.py`). The rest is counted: every tensor that
`models/losses/fused_decoder.py` holds at the moments that can be the fullest. That works since the tuner gives memory
back at once (`tuner_process.py`). No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.errors import ModelError
from sartor.core.remedies import restore_command
from sartor.tune.recipe import ResolvedRecipe

FLOAT_BYTES = 4
# A token of the rows: an entry of its list and an int in it, an entry of the mask's list (CPython, 64 bits)
ROW_TOKEN_BYTES = 48
# Rows of the head, and bytes of logits, at once: `models/losses/fused_decoder.py`, `tuner_process.py`
HEAD_SLICE, LOGITS_BYTES = 2048, 8 << 20
# What products pack their operands into, beyond those of the floor's small ones, and pages that are half used
SLACK_BYTES = 6 << 20
# `models/packing.py`: above this row length torch's own attention keeps no weights
BLOCKED_TOKENS = 512
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class DeviceModelShape:
    """What of a base and a recipe decides memory. Widths in elements; targets: modules of a block that have
    factors.
    """

    layers: int
    width: int
    inner: int
    heads: int
    groups: int
    head_width: int
    vocabulary: int
    rank: int
    targets: tuple[str, ...]
    adapted: int
    base_bytes: int

    @property
    def qkv(self) -> int:
        """Queries, keys and values of a token, side by side."""
        return (self.heads + 2 * self.groups) * self.head_width

    @property
    def mixed(self) -> int:
        """What the heads give."""
        return self.heads * self.head_width

    @property
    def layer_factors(self) -> int:
        """Numbers in the factors of one layer."""
        key = self.groups * self.head_width
        sizes = {
            "q_proj": self.width + self.mixed,
            "k_proj": self.width + key,
            "v_proj": self.width + key,
            "o_proj": self.mixed + self.width,
            "gate_proj": self.width + self.inner,
            "up_proj": self.width + self.inner,
            "down_proj": self.inner + self.width,
        }
        return self.rank * sum(sizes[name] for name in self.targets)


@dataclass(frozen=True)
class DeviceLoad:
    """The fullest micro-batch: tokens, of them supervised; its longest row; whether an update has more than one;
    tokens of all rows.
    """

    tokens: int
    supervised: int
    longest: int
    is_part: bool
    rows_tokens: int


@dataclass(frozen=True)
class MemoryMode:
    """How a rung computes. learning: layers that learn. recompute, zeroth: see `tune.recipe.Compute`,
    `tuning_job.TuningJob`. native: by the C++ kernels.
    """

    learning: int
    recompute: bool
    zeroth: bool = False
    native: bool = True


def shape_of(base: Path, recipe: ResolvedRecipe) -> DeviceModelShape:
    """From config.json below a base's directory. Raises ModelError where it is not whole."""
    try:
        fields: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
        heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
        modules = recipe.method.targets.modules
        return DeviceModelShape(
            layers=layers,
            width=fields["hidden_size"],
            inner=fields["intermediate_size"],
            heads=heads,
            groups=fields.get("num_key_value_heads") or heads,
            head_width=fields.get("head_dim") or fields["hidden_size"] // heads,
            vocabulary=fields["vocab_size"],
            rank=recipe.method.rank,
            targets=(*ATTENTION, *MLP) if modules == "all-linear" else tuple(modules),
            adapted=min(recipe.method.targets.top or layers, layers),
            base_bytes=sum(file.stat().st_size for file in base.glob("*.safetensors")),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{base / 'config.json'} is not whole: {error!r}", restore_command(base / "config.json")
        ) from None


def peak(shape: DeviceModelShape, load: DeviceLoad, mode: MemoryMode, floor_bytes: int) -> dict[str, int]:
    """What is held at the peak, by what it is, in bytes; its sum is the peak."""
    factors, learnt = shape.adapted * shape.layer_factors, mode.learning * shape.layer_factors
    moments = 0 if mode.zeroth else 2 * learnt
    peak_work = _zeroth(shape, load, mode) if mode.zeroth else _gradients(shape, load, mode, learnt)
    return {
        "floor": floor_bytes + SLACK_BYTES,
        "rows": ROW_TOKEN_BYTES * load.rows_tokens,
        "factors": FLOAT_BYTES * factors,
        "moments": FLOAT_BYTES * moments,
        **{name: FLOAT_BYTES * size for name, size in peak_work.items()},
    }


def state_bytes(shape: DeviceModelShape, mode: MemoryMode) -> int:
    """A checkpoint."""
    factors, learnt = shape.adapted * shape.layer_factors, mode.learning * shape.layer_factors
    return FLOAT_BYTES * (factors + (0 if mode.zeroth else 2 * learnt))


def _saved_for_backward(shape: DeviceModelShape, tokens: int, tail: int) -> int:
    """What a block keeps for its backward pass; `tail` of its tokens go on after attention."""
    low = shape.rank * sum(name in ("q_proj", "k_proj", "v_proj") for name in shape.targets)
    low_tail = shape.rank * (len(shape.targets)) - low
    head = tokens * (1 + shape.qkv + shape.heads + shape.mixed + low)
    return head + tail * (shape.width + 1 + 2 * shape.inner + low_tail)


def _attention(shape: DeviceModelShape, load: DeviceLoad, mode: MemoryMode) -> int:
    """What attention holds besides its input and result: torch's own operations keep two numbers for each two
    tokens.
    """
    if mode.native:
        return 0
    copied = 5 * load.tokens * shape.qkv
    return copied + (0 if load.longest > BLOCKED_TOKENS else 2 * shape.heads * load.tokens * load.longest)


def _forward(shape: DeviceModelShape, load: DeviceLoad, mode: MemoryMode) -> int:
    """The fullest moment of a block's forward pass, without its input."""
    t, d, i = load.tokens, shape.width, shape.inner
    attention = t * (shape.qkv + shape.mixed) + _attention(shape, load, mode)
    first = t * (shape.qkv + shape.mixed + d + d + 2 * i) + 2 * i * d
    second = _saved_for_backward(shape, t, t) + t * i * (1 if mode.native else 2) + d * i + t * d
    return max(attention, first, second)


def _backward(shape: DeviceModelShape, load: DeviceLoad, mode: MemoryMode) -> int:
    """The fullest moment of a block's backward pass, with the gradient that it gets, without its input and what is
    kept.
    """
    t, d, i = load.tokens, shape.width, shape.inner
    through_down = d * i + t * i
    through_glu = (2 if mode.native else 7) * t * i
    through_gate_up = 2 * t * d + 2 * i * d
    attention = t * (d + shape.mixed + shape.qkv) - 2 * t * i + _attention(shape, load, mode)
    through_qkv = t * (d + shape.mixed + shape.qkv + 2 * d) + shape.qkv * d - 2 * t * i
    return t * d + max(through_down, through_glu, through_gate_up, attention, through_qkv)


def _head(shape: DeviceModelShape, load: DeviceLoad, with_gradients: bool) -> int:
    """Hidden rows twice, normed, their slopes and aims; a slice of the head and one of the logits."""
    rows = min(load.supervised, LOGITS_BYTES // (HEAD_SLICE * FLOAT_BYTES))
    chunk = min(HEAD_SLICE, shape.vocabulary)
    hidden = load.supervised * shape.width * (4 if with_gradients else 3)
    return hidden + chunk * shape.width + rows * chunk + rows * shape.width


def _gradients(shape: DeviceModelShape, load: DeviceLoad, mode: MemoryMode, learnt: int) -> dict[str, int]:
    """Of the moments that can be the fullest, the fullest: the head, the first and the last block of the backward
    pass.
    """
    x, tokens = load.tokens * shape.width, load.tokens
    gradients_before = learnt if load.is_part else 0
    if mode.recompute:
        activations, block_activations, block = mode.learning * x, x, _saved_for_backward(shape, tokens, tokens)
        block = max(block + _backward(shape, load, mode), _forward(shape, load, mode) + x)
    else:
        saved = _saved_for_backward(shape, tokens, tokens)
        last = _saved_for_backward(shape, tokens, min(tokens, load.supervised))
        activations, block_activations, block = (
            mode.learning * x + (mode.learning - 1) * saved + last,
            x + saved,
            _backward(shape, load, mode),
        )
    moments: list[dict[str, int]] = [
        {"activations": activations, "head": _head(shape, load, True), "gradients": gradients_before},
        {"activations": activations, "block": block, "gradients": gradients_before},
        {"activations": block_activations, "block": block, "gradients": learnt},
        {
            "activations": x + activations - block_activations,
            "block": _forward(shape, load, mode),
            "gradients": gradients_before,
        },
    ]
    return max(moments, key=total)


def _zeroth(shape: DeviceModelShape, load: DeviceLoad, mode: MemoryMode) -> dict[str, int]:
    x = load.tokens * shape.width
    direction = shape.rank * max(shape.width, shape.inner)
    forward: dict[str, int] = {"activations": x, "block": _forward(shape, load, mode)}
    head: dict[str, int] = {"head": _head(shape, load, False)}
    fullest = max([forward, head], key=total)
    return {**fullest, "direction": direction}


def total(breakdown: Mapping[str, int]) -> int:
    """The peak."""
    return sum(breakdown.values())
