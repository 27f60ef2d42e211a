"""Predicted peak memory of a tuning setting.

    peak = floor + rows + factors and moments + the largest of (head, backward pass, forward pass)

floor: Python with torch, measured once (`memory_plan.py`). The rest is counted: every tensor that
`models/losses/fused_decoder.py` holds at each possible peak. Counting works because the tuner returns freed memory at
once (`tuner_process.py`). No torch.

Symbols in comments: T tokens of a micro-batch, W of them read by the last layer, D width, I inner width of the MLP, H
heads, M = H K mixed (K a head's width), Q = M + 2 G K queries, keys and values (G key-value heads).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.errors import ConfigError, ModelError
from sartor.core.remedies import restore_command
from sartor.tune.methods.lora import Lora
from sartor.tune.recipe import Method, ResolvedRecipe

FLOAT_BYTES = 4
# Bytes of a row's token: an entry of its list and an int in it, an entry of the mask's list (CPython, 64 bits)
ROW_TOKEN_BYTES = 48
# Rows of the head's weight, and bytes of logits, at once: `models/losses/fused_decoder.py`, `tuner_process.py`
HEAD_SLICE, LOGITS_BYTES = 2048, 8 << 20
# Packed operands of matrix products, beyond those of the floor's small base, and half-used pages
SLACK_BYTES = 6 << 20
# `models/packing.py`: above this row length torch's own attention keeps no weights
BLOCKED_TOKENS = 512
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class DeviceModelShape:
    """Facts of a base and a recipe that decide memory. Widths are in elements.

    targets: modules of a block that have factors.
    adapted: layers that have factors.
    base_bytes: size of the safetensors files.
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
        """Width of the queries, keys and values of a token, side by side."""
        return (self.heads + 2 * self.groups) * self.head_width

    @property
    def mixed(self) -> int:
        """Width of attention's output."""
        return self.heads * self.head_width

    @property
    def layer_factors(self) -> int:
        """Number of elements in the factors of one layer."""
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
    """The largest micro-batch.

    tokens, supervised: its tokens, and those of them that have a loss.
    longest: tokens of its longest row.
    is_part: whether an update has more than one micro-batch.
    rows_tokens: tokens of all rows.
    """

    tokens: int
    supervised: int
    longest: int
    is_part: bool
    rows_tokens: int


@dataclass(frozen=True)
class MemoryMode:
    """Way in which a rung computes.

    learning: layers that learn.
    recompute: as in `tune.recipe.Compute`.
    zeroth: as in `tuning_job.TuningJob`.
    native: whether the C++ kernels compute.
    """

    learning: int
    recompute: bool
    zeroth: bool = False
    native: bool = True


def device_lora(method: Method) -> Lora:
    """Return the method, which must be LoRA without dropout. Raises ConfigError."""
    if not isinstance(method, Lora) or method.dropout:
        raise ConfigError(f"a device tunes plain LoRA without dropout, not {method.kind}", "method: {kind: lora}")
    return method


def shape_of(base: Path, recipe: ResolvedRecipe) -> DeviceModelShape:
    """Return the shape from config.json in a base's directory.

    Raises ModelError if the file is not whole, ConfigError for a method that a device does not tune.
    """
    method = device_lora(recipe.method)
    try:
        fields: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
        heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
        modules = method.targets.modules
        return DeviceModelShape(
            layers=layers,
            width=fields["hidden_size"],
            inner=fields["intermediate_size"],
            heads=heads,
            groups=fields.get("num_key_value_heads") or heads,
            head_width=fields.get("head_dim") or fields["hidden_size"] // heads,
            vocabulary=fields["vocab_size"],
            rank=method.rank,
            targets=(*ATTENTION, *MLP) if modules == "all-linear" else tuple(modules),
            adapted=min(method.targets.top or layers, layers),
            base_bytes=sum(file.stat().st_size for file in base.glob("*.safetensors")),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{base / 'config.json'} is not whole: {error!r}", restore_command(base / "config.json")
        ) from None


def peak(shape: DeviceModelShape, load: DeviceLoad, mode: MemoryMode, floor_bytes: int) -> dict[str, int]:
    """Return the bytes held at the peak, by category; their sum is the peak."""
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
    """Return the bytes of a checkpoint."""
    factors, learnt = shape.adapted * shape.layer_factors, mode.learning * shape.layer_factors
    return FLOAT_BYTES * (factors + (0 if mode.zeroth else 2 * learnt))


def _saved_for_backward(shape: DeviceModelShape, tokens: int, tail: int) -> int:
    """Return the elements that a block keeps for its backward pass.

    tail: tokens that go on after attention.
    """
    low = shape.rank * sum(name in ("q_proj", "k_proj", "v_proj") for name in shape.targets)
    low_tail = shape.rank * (len(shape.targets)) - low
    # T (rstd 1 + qkv Q + lse H + mixed M + low-rank inputs R_in)
    #   + W (middle D + rstd 1 + gate and up 2 I + low-rank inputs R_tail)
    head = tokens * (1 + shape.qkv + shape.heads + shape.mixed + low)
    return head + tail * (shape.width + 1 + 2 * shape.inner + low_tail)


def _attention(shape: DeviceModelShape, load: DeviceLoad, mode: MemoryMode) -> int:
    """Return the elements that attention holds besides its input and result.

    Up to BLOCKED_TOKENS, torch's own operations keep two numbers for each head and pair of tokens.
    """
    if mode.native:
        return 0
    copied = 5 * load.tokens * shape.qkv
    return copied + (0 if load.longest > BLOCKED_TOKENS else 2 * shape.heads * load.tokens * load.longest)


def _forward(shape: DeviceModelShape, load: DeviceLoad, mode: MemoryMode) -> int:
    """Return the elements at the peak of a block's forward pass, without its input."""
    t, d, i = load.tokens, shape.width, shape.inner
    # first: qkv, mixed, middle, normed middle, gate and up; the widened weight of gate and up (2 I, D)
    # second: what is kept; the activated product (T, I); the widened weight of down (D, I); the output (T, D)
    attention = t * (shape.qkv + shape.mixed) + _attention(shape, load, mode)
    first = t * (shape.qkv + shape.mixed + d + d + 2 * i) + 2 * i * d
    second = _saved_for_backward(shape, t, t) + t * i * (1 if mode.native else 2) + d * i + t * d
    return max(attention, first, second)


def _backward(shape: DeviceModelShape, load: DeviceLoad, mode: MemoryMode) -> int:
    """Return the elements at the peak of a block's backward pass.

    They include the gradient that it gets, but not its input and what the forward pass kept.
    """
    t, d, i = load.tokens, shape.width, shape.inner
    # in the order of the pass: down, GLU, gate and up, attention, qkv; each with its widened weight if it has one.
    # - 2 T I: gate and up (T, 2 I), counted as kept, are freed after the GLU
    through_down = d * i + t * i
    through_glu = (2 if mode.native else 7) * t * i
    through_gate_up = 2 * t * d + 2 * i * d
    attention = t * (d + shape.mixed + shape.qkv) - 2 * t * i + _attention(shape, load, mode)
    through_qkv = t * (d + shape.mixed + shape.qkv + 2 * d) + shape.qkv * d - 2 * t * i
    return t * d + max(through_down, through_glu, through_gate_up, attention, through_qkv)


def _head(shape: DeviceModelShape, load: DeviceLoad, with_gradients: bool) -> int:
    """Return the elements of the head.

    They are the hidden rows twice, their normed copy and their gradient, a slice of the head's weight, a slice of the
    logits, and a (rows, D) buffer for that slice.
    """
    rows = min(load.supervised, LOGITS_BYTES // (HEAD_SLICE * FLOAT_BYTES))
    chunk = min(HEAD_SLICE, shape.vocabulary)
    hidden = load.supervised * shape.width * (4 if with_gradients else 3)
    return hidden + chunk * shape.width + rows * chunk + rows * shape.width


def _gradients(shape: DeviceModelShape, load: DeviceLoad, mode: MemoryMode, learnt: int) -> dict[str, int]:
    """Return the elements at the largest of the possible peaks, by category.

    The candidates are the head, the first and the last block of the backward pass, and a block of the forward pass.
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
    # possible peaks: the head; the last block, before other gradients exist; the first block, with all gradients;
    # the last block of the forward pass
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
    """Return the elements at the peak of zeroth-order tuning, by category: no gradients and no moments."""
    x = load.tokens * shape.width
    direction = shape.rank * max(shape.width, shape.inner)
    forward: dict[str, int] = {"activations": x, "block": _forward(shape, load, mode)}
    head: dict[str, int] = {"head": _head(shape, load, False)}
    fullest = max([forward, head], key=total)
    return {**fullest, "direction": direction}


def total(breakdown: Mapping[str, int]) -> int:
    """Return the sum of a breakdown: the peak."""
    return sum(breakdown.values())
