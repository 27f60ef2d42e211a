"""Reference kernels in torch, for training and paged serving.

Shapes: N rows of width D; T tokens; a block of H heads and G key heads of width K has qkv rows of (H + 2 G) K.
Arithmetic is in fp32 (fp64 for fp64), results in the dtype of what came in. Backward functions are derived by hand,
save attention's, which computes the forward again under autograd.

In torch's operations, on any device: what `cpu_forward.py` is checked against, and what serves where that cannot. A
row's result is computed from its own numbers alone, in an order that its neighbours do not change.

Shapes: N rows; H heads, G key heads of width K; pages of P tokens; R ranks; D inputs, O outputs of a fused projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from sartor.models.packing import AttentionShape, Segment, SegmentGroup, attend


@dataclass(frozen=True)
class AttentionLayout:
    """Who attends to whom in a pack, in the forms that kernels read. `kernel_cache` is a kernel's own form, made once
    a pack.
    """

    segments: Sequence[Segment]
    rows: Sequence[SegmentGroup]
    tokens: int
    kernel_cache: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Geometry:
    """A layer's attention over a pack. width: K. cos, sin: (T, rotary) of the rotary embedding, both halves written
    out.
    """

    shape: AttentionShape
    width: int
    cos: torch.Tensor
    sin: torch.Tensor
    layout: AttentionLayout


class ReferenceKernels:
    """Torch's operations."""

    name = "torch's own operations"

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x / rms(x) * (offset + weight): x (N, D) -> (N, D) and 1 / rms (N,) for the backward. Zhang & Sennrich
        2019.
        """
        wide = _wide(x)
        rstd = torch.rsqrt(wide.square().mean(-1) + eps)
        return (wide * rstd[:, None] * (offset + _wide(weight))).to(x.dtype), rstd

    def rms_norm_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        rstd: torch.Tensor,
        offset: float,
        add: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The gradient of x, (N, D), with `add` (N, D) added: the gradient that came round the residual."""
        wide, g = _wide(x), _wide(dy) * (offset + _wide(weight))
        dx = g * rstd[:, None] - wide * ((g * wide).mean(-1) * rstd**3)[:, None]
        return (dx if add is None else dx + _wide(add)).to(x.dtype)

    def glu(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """act(gate) * up: (T, 2 I) -> (T, I). Shazeer 2020, arXiv:2002.05202. activation: `silu` or `gelu_tanh`."""
        gate, up = _wide(gate_up).chunk(2, -1)
        return (_act(gate, activation) * up).to(gate_up.dtype)

    def glu_backward(
        self, d: torch.Tensor, gate_up: torch.Tensor, activation: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(act(gate) * up again (T, I), the gradient of gate_up (T, 2 I)). `gate_up` may be overwritten."""
        gate, up = _wide(gate_up).chunk(2, -1)
        value, slope = _act(gate, activation), _slope(gate, activation)
        d = _wide(d)
        gradient = torch.cat([d * up * slope, d * value], -1).to(gate_up.dtype)
        return (value * up).to(gate_up.dtype), gradient

    def cross_entropy(
        self, logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N,) losses in nats of logits (N, V), and d loss / d logits (N, V) if asked. `logits` may be overwritten."""
        wide = _wide(logits)
        if softcap:
            wide = softcap * torch.tanh(wide / softcap)
        losses = F.cross_entropy(wide, targets, reduction="none")
        if not gradient:
            return losses, None
        slope = wide.softmax(-1)
        slope[torch.arange(len(targets), device=targets.device), targets] -= 1
        return losses, (slope * (1 - (wide / softcap) ** 2) if softcap else slope).to(logits.dtype)

    def attention(self, qkv: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(T, (H + 2 G) K) -> the heads' mixtures (T, H K), and what the backward wants besides. Rotates q and k
        itself.
        """
        shape, width = geometry.shape, geometry.width
        query, key, value = (
            part.unflatten(1, (-1, width)).transpose(0, 1)
            for part in qkv.split([shape.heads * width, shape.groups * width, shape.groups * width], 1)
        )
        query, key = (rotate(part, geometry.cos, geometry.sin) for part in (query, key))
        return attend(query, key, value, geometry.layout.rows, shape).flatten(1), None

    def attention_backward(
        self, d: torch.Tensor, qkv: torch.Tensor, mixed: torch.Tensor, lse: torch.Tensor | None, geometry: Geometry
    ) -> torch.Tensor:
        """The gradient of qkv, (T, (H + 2 G) K), from that of the mixtures (T, H K)."""
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            recomputed, _ = ReferenceKernels.attention(self, leaf, geometry)
            # to the bit what `grad(again, leaf, d)` gives, for which torch would load sympy, 35 MB
            (gradient,) = torch.autograd.grad((recomputed * d).sum(), leaf)
        return gradient


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotary embedding (Su et al. 2021, arXiv:2104.09864) of x (heads, T, K); dimensions beyond the cosines'
    pass.
    """
    size = cos.shape[-1]
    rotated, unrotated = x[..., :size], x[..., size:]
    first_half, second_half = rotated.chunk(2, -1)
    rotated = rotated * cos.to(x.dtype) + torch.cat([-second_half, first_half], -1) * sin.to(x.dtype)
    return torch.cat([rotated, unrotated], -1) if unrotated.shape[-1] else rotated


def _act(gate: torch.Tensor, activation: str) -> torch.Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def _slope(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        sigmoid = torch.sigmoid(gate)
        return sigmoid * (1 + gate * (1 - sigmoid))
    a, b = (2 / torch.pi) ** 0.5, 0.044715
    t = torch.tanh(a * (gate + b * gate**3))
    return 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * a * (1 + 3 * b * gate**2)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class Cache:
    """Keys (rotated) and values of one layer: (pages, G, P, K) each."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def page_tokens(self) -> int:
        """P."""
        return self.keys.shape[2]


@dataclass
class PageTable:
    """Who looks where: each row's newest token at `positions` (N,), -1 for padding; `table` (N, most): its pages."""

    table: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class RotaryTable:
    """Rotary embedding of every position: cos, sin (positions, rotary), fp32, both halves written out."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass
class LoraStack:
    """The factors of every adapter on one fused projection, side by side.

    ranks: room of each fused module. low, high: its outputs. a (slots, sum of ranks, D); b (slots, sum of rank *
    outputs), each module's as (rank, outputs), which is B transposed; scales (slots, modules), 0 where a module has no
    factors.
    """

    ranks: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor

    def module_b(self, index: int) -> slice:
        """Where a module's B stands in a row of `b`."""
        sizes = [rank * (high - low) for rank, low, high in zip(self.ranks, self.low, self.high, strict=True)]
        return slice(sum(sizes[:index]), sum(sizes[: index + 1]))

    def module_a(self, index: int) -> slice:
        """Where a module's A stands in `a`."""
        return slice(sum(self.ranks[:index]), sum(self.ranks[: index + 1]))


class PagedKernels:
    """Torch's operations."""

    def attend(
        self, qkv: torch.Tensor, cache: Cache, page_table: PageTable, shape: AttentionShape, rotary: RotaryTable
    ) -> torch.Tensor:
        """qkv (N, (H + 2 G) K) of each row's newest token -> (N, H K); its key and value are put into the cache."""
        out = qkv.new_zeros(len(qkv), shape.heads * cache.keys.shape[3])
        for row, position in enumerate(page_table.positions.tolist()):
            if position >= 0:
                pages = page_table.table[row, : position // cache.page_tokens + 1]
                out[row] = self.attend_row(qkv[row : row + 1], cache, pages, position, shape, rotary)[0]
        return out

    def attend_row(
        self,
        qkv: torch.Tensor,
        cache: Cache,
        pages: torch.Tensor,
        first: int,
        shape: AttentionShape,
        rotary: RotaryTable,
    ) -> torch.Tensor:
        """The T tokens of one row from position `first` on: qkv (T, (H + 2 G) K) -> (T, H K). pages: up to the last
        token's.
        """
        width, count = cache.keys.shape[3], len(qkv)
        query, key, value = (
            part.unflatten(1, (-1, width)).transpose(0, 1)
            for part in qkv.split([shape.heads * width, shape.groups * width, shape.groups * width], 1)
        )
        cos, sin = rotary.cos[first : first + count], rotary.sin[first : first + count]
        query, key = rotate(query.float(), cos, sin).to(qkv.dtype), rotate(key.float(), cos, sin).to(qkv.dtype)
        positions = torch.arange(first, first + count, device=qkv.device)
        location = pages[positions // cache.page_tokens], positions % cache.page_tokens
        cache.keys[location[0], :, location[1]] = key.transpose(0, 1)
        cache.values[location[0], :, location[1]] = value.transpose(0, 1)
        end = first + count
        keys, values = (
            part[pages].transpose(0, 1).flatten(1, 2)[:, :end].repeat_interleave(shape.heads // shape.groups, 0)
            for part in (cache.keys, cache.values)
        )
        return _mixed(query, keys, values, _sees(positions, end, shape), shape).transpose(0, 1).flatten(1)

    def adapt(self, y: torch.Tensor, x: torch.Tensor, stack: LoraStack, slots: torch.Tensor) -> None:
        """y (N, O) += scale x A^T B^T of each row's own adapter: x (N, D), slots (N,), -1 for none."""
        adapter_slots = slots.clamp(min=0)
        scales = torch.where(slots[:, None] < 0, 0.0, stack.scales[adapter_slots])
        low = torch.bmm(stack.a[adapter_slots], x[:, :, None])[:, :, 0]
        for index, rank in enumerate(stack.ranks):
            if rank:
                b = stack.b[adapter_slots, stack.module_b(index)].unflatten(1, (rank, -1))
                part = torch.bmm(low[:, None, stack.module_a(index)], b)[:, 0].float() * scales[:, index, None]
                y[:, stack.low[index] : stack.high[index]] += part.to(y.dtype)


def _sees(positions: torch.Tensor, end: int, shape: AttentionShape) -> torch.Tensor:
    """(T, end) bool: which positions each query looks at."""
    keys = torch.arange(end, device=positions.device)
    sees = keys <= positions[:, None]
    return sees if shape.window is None else sees & (keys > positions[:, None] - shape.window)


def _mixed(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sees: torch.Tensor, shape: AttentionShape
) -> torch.Tensor:
    """(H, T, K) queries, (H, L, K) keys and values -> (H, T, K)."""
    if shape.softcap is None:
        return F.scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=sees, scale=shape.scale
        )[0]
    scores = query.float() @ keys.float().transpose(1, 2) * shape.scale
    scores = shape.softcap * torch.tanh(scores / shape.softcap)
    return (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ values.float()).to(query.dtype)
