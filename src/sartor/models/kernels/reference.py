"""Reference kernels in torch, for training and paged serving.

They run on any device. The compiled kernels are checked against them, and they serve where those cannot. Arithmetic is
in fp32 (fp64 for fp64); results have the dtype of the inputs. Backward functions are derived by hand, except that of
attention, which computes the forward again under autograd.

Training (`ReferenceKernels`): N rows of width D; T tokens; H heads and G key heads of width K, so a row of qkv has (H
+ 2 G) K numbers; I is the width of the MLP and V the vocabulary.

Paged serving (`PagedKernels`): N rows; H heads, G key heads of width K; pages of P tokens; R ranks; D inputs and O
outputs of a fused projection. A row's result is computed from its own numbers alone, in an order that does not depend
on its neighbours.
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
    """Attention structure of a pack, in the forms that kernels read.

    segments: the forest of segments. rows: the same, grouped for batched products. tokens: T.
    kernel_cache: a kernel's own form of the layout, made once per pack.
    """

    segments: Sequence[Segment]
    rows: Sequence[SegmentGroup]
    tokens: int
    kernel_cache: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Geometry:
    """Attention of one layer over one pack.

    width: K. cos, sin: (T, rotary) of the rotary embedding, both halves written out.
    """

    shape: AttentionShape
    width: int
    cos: torch.Tensor
    sin: torch.Tensor
    layout: AttentionLayout


class ReferenceKernels:
    """Training kernels by torch's operations."""

    name = "torch's own operations"

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y = x / rms(x) * (offset + weight), (N, D), and 1 / rms(x), (N,), for the backward.

        x: (N, D). weight: (D,). rms(x) = sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019).
        """
        # r (N,) = (mean_i x_i^2 + eps)^(-1/2);  y (N, D) = x r (offset + w)
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
        """Return dloss/dx, (N, D), plus `add` (N, D), the gradient of the residual path, if given.

        dy, x: (N, D). weight: (D,). rstd: (N,) from `rms_norm`.
        """
        # y_i = x_i r (offset + w_i), r = (mean_j x_j^2 + eps)^(-1/2), so dr/dx_j = -x_j r^3 / D
        # g (N, D) = dy (offset + w)
        # dx_j = g_j r + sum_i g_i x_i dr/dx_j = g_j r - x_j r^3 mean_i(g_i x_i), (N, D)
        wide, g = _wide(x), _wide(dy) * (offset + _wide(weight))
        dx = g * rstd[:, None] - wide * ((g * wide).mean(-1) * rstd**3)[:, None]
        return (dx if add is None else dx + _wide(add)).to(x.dtype)

    def glu(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """Return act(gate) * up, (T, I), of gate_up (T, 2 I) (Shazeer 2020, arXiv:2002.05202).

        activation: `silu` or `gelu_tanh`.
        """
        gate, up = _wide(gate_up).chunk(2, -1)
        return (_act(gate, activation) * up).to(gate_up.dtype)

    def glu_backward(
        self, d: torch.Tensor, gate_up: torch.Tensor, activation: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return act(gate) * up again, (T, I), and dloss/dgate_up, (T, 2 I). `gate_up` may be overwritten.

        d: (T, I) gradient of `glu`'s output. gate_up: (T, 2 I).
        """
        # out = act(gate) up, each (T, I):  dgate = d up act'(gate);  dup = d act(gate)
        gate, up = _wide(gate_up).chunk(2, -1)
        value, slope = _act(gate, activation), _slope(gate, activation)
        d = _wide(d)
        gradient = torch.cat([d * up * slope, d * value], -1).to(gate_up.dtype)
        return (value * up).to(gate_up.dtype), gradient

    def cross_entropy(
        self, logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return losses (N,) in nats, and dloss/dlogits (N, V) if `gradient`. `logits` may be overwritten.

        logits: (N, V). targets: (N,) token ids. softcap: c of c tanh(logits / c), applied before; None for none.
        """
        # y (N, V) = c tanh(z / c), or z without a soft-cap;  loss (N,) = logsumexp(y) - y_target
        wide = _wide(logits)
        if softcap:
            wide = softcap * torch.tanh(wide / softcap)
        losses = F.cross_entropy(wide, targets, reduction="none")
        if not gradient:
            return losses, None
        # dloss/dz (N, V) = (softmax(y) - onehot(target)) (1 - (y / c)^2)
        slope = wide.softmax(-1)
        slope[torch.arange(len(targets), device=targets.device), targets] -= 1
        return losses, (slope * (1 - (wide / softcap) ** 2) if softcap else slope).to(logits.dtype)

    def attention(self, qkv: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attention output (T, H K), and a tensor that the backward needs; None here.

        qkv: (T, (H + 2 G) K). Queries and keys are rotated here.
        """
        shape, width = geometry.shape, geometry.width
        # query (H, T, K);  key, value (G, T, K)
        query, key, value = (
            part.unflatten(1, (-1, width)).transpose(0, 1)
            for part in qkv.split([shape.heads * width, shape.groups * width, shape.groups * width], 1)
        )
        query, key = (rotate(part, geometry.cos, geometry.sin) for part in (query, key))
        return attend(query, key, value, geometry.layout.rows, shape).flatten(1), None

    def attention_backward(
        self, d: torch.Tensor, qkv: torch.Tensor, mixed: torch.Tensor, lse: torch.Tensor | None, geometry: Geometry
    ) -> torch.Tensor:
        """Return dloss/dqkv, (T, (H + 2 G) K).

        d: (T, H K) gradient of the attention output. qkv: (T, (H + 2 G) K). mixed: (T, H K) attention output. lse:
        second result of `attention`.
        """
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            recomputed, _ = ReferenceKernels.attention(self, leaf, geometry)
            # dqkv = d/dqkv sum(attention(qkv) * d), (T, (H + 2 G) K). `grad(recomputed, leaf, d)` gives the same bits,
            # but torch would load sympy for it, 35 MB
            (gradient,) = torch.autograd.grad((recomputed * d).sum(), leaf)
        return gradient


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return the rotary embedding (Su et al. 2021, arXiv:2104.09864) of x, of shape (heads, T, K).

    cos, sin: (T, rotary). Dimensions of x beyond `rotary` stay unchanged.
    """
    size = cos.shape[-1]
    # (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the two halves of the rotary dimensions
    rotated, unrotated = x[..., :size], x[..., size:]
    first_half, second_half = rotated.chunk(2, -1)
    rotated = rotated * cos.to(x.dtype) + torch.cat([-second_half, first_half], -1) * sin.to(x.dtype)
    return torch.cat([rotated, unrotated], -1) if unrotated.shape[-1] else rotated


def _act(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """Return the activation of `gate`, elementwise."""
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def _slope(gate: torch.Tensor, activation: str) -> torch.Tensor:
    """Return the derivative of the activation at `gate`, elementwise."""
    # silu(g) = g s(g), s the sigmoid, s' = s (1 - s):  silu'(g) = s (1 + g (1 - s))
    if activation == "silu":
        sigmoid = torch.sigmoid(gate)
        return sigmoid * (1 + gate * (1 - sigmoid))
    # gelu(g) = g (1 + t) / 2 with t = tanh(a (g + b g^3)), t' = (1 - t^2) a (1 + 3 b g^2)
    # gelu'(g) = (1 + t) / 2 + g t' / 2
    a, b = (2 / torch.pi) ** 0.5, 0.044715
    t = torch.tanh(a * (gate + b * gate**3))
    return 0.5 * (1 + t) + 0.5 * gate * (1 - t * t) * a * (1 + 3 * b * gate**2)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Return x in fp32, or unchanged if it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class Cache:
    """Key-value cache of one layer: rotated keys and values, (pages, G, P, K) each."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def page_tokens(self) -> int:
        """Tokens per page, P."""
        return self.keys.shape[2]


@dataclass
class PageTable:
    """Position and pages of each row in a paged cache.

    table: (N, most) page numbers of each row. positions: (N,) position of each row's newest token; -1 for padding.
    """

    table: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class RotaryTable:
    """Rotary embedding of every position: cos and sin, (positions, rotary), fp32, both halves written out."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass
class LoraStack:
    """LoRA factors of every adapter on one fused projection, stacked.

    ranks: space for each fused module's rank. low, high: its range of outputs.
    a: (slots, sum of ranks, D).
    b: (slots, sum of rank * outputs), each module's as (rank, outputs), which is B transposed.
    scales: (slots, modules), 0 where a module has no factors.
    """

    ranks: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor

    def module_b(self, index: int) -> slice:
        """Return the slice of a module's B in a row of `b`."""
        sizes = [rank * (high - low) for rank, low, high in zip(self.ranks, self.low, self.high, strict=True)]
        return slice(sum(sizes[:index]), sum(sizes[: index + 1]))

    def module_a(self, index: int) -> slice:
        """Return the slice of a module's A in the rank dimension of `a`."""
        return slice(sum(self.ranks[:index]), sum(self.ranks[: index + 1]))


class PagedKernels:
    """Serving kernels on a paged cache, by torch's operations."""

    def attend(
        self, qkv: torch.Tensor, cache: Cache, page_table: PageTable, shape: AttentionShape, rotary: RotaryTable
    ) -> torch.Tensor:
        """Return the attention output (N, H K) of each row's newest token, and store its key and value.

        qkv: (N, (H + 2 G) K). Keys and values go to `cache`. Padding rows give zeros.
        """
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
        """Return the attention output (T, H K) of T tokens of one row, from position `first` on.

        qkv: (T, (H + 2 G) K). pages: page numbers of the row up to the last token's. Their keys and values are stored
        in `cache`.
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
        # causal (and window) mask (T, end), true where a query sees a key
        key_positions = torch.arange(end, device=qkv.device)
        sees = key_positions <= positions[:, None]
        if shape.window is not None:
            sees = sees & (key_positions > positions[:, None] - shape.window)
        return _mixed(query, keys, values, sees, shape).transpose(0, 1).flatten(1)

    def adapt(self, y: torch.Tensor, x: torch.Tensor, stack: LoraStack, slots: torch.Tensor) -> None:
        """Add scale x A^T B^T of each row's own adapter to y (N, O), in place.

        x: (N, D). slots: (N,) slot of each row's adapter, -1 for none.
        """
        # low (N, sum of ranks) = x A^T;  y[:, module's outputs] += scale low_module B^T, per row with its own A and B
        adapter_slots = slots.clamp(min=0)
        scales = torch.where(slots[:, None] < 0, 0.0, stack.scales[adapter_slots])
        low = torch.bmm(stack.a[adapter_slots], x[:, :, None])[:, :, 0]
        for index, rank in enumerate(stack.ranks):
            if rank:
                b = stack.b[adapter_slots, stack.module_b(index)].unflatten(1, (rank, -1))
                part = torch.bmm(low[:, None, stack.module_a(index)], b)[:, 0].float() * scales[:, index, None]
                y[:, stack.low[index] : stack.high[index]] += part.to(y.dtype)


def _mixed(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sees: torch.Tensor, shape: AttentionShape
) -> torch.Tensor:
    """Return the attention output (H, T, K).

    query: (H, T, K). keys, values: (H, L, K). sees: (T, L) mask.
    """
    if shape.softcap is None:
        return F.scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=sees, scale=shape.scale
        )[0]
    scores = query.float() @ keys.float().transpose(1, 2) * shape.scale
    scores = shape.softcap * torch.tanh(scores / shape.softcap)
    return (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ values.float()).to(query.dtype)
