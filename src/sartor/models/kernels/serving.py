"""What serving computes besides matrix products: attention over a paged cache, and LoRA of many adapters in one batch.

In torch's operations, on any device: what `walk.py` is checked against, and what serves where that cannot. A row's result is
computed from its own numbers alone, in an order that its neighbours do not change.

Shapes: N rows; H heads, G key heads of width K; pages of P tokens; R ranks; D inputs, O outputs of a fused projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from sartor.models.attention import Shape
from sartor.models.kernels.eager import rotate


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
class Looks:
    """Who looks where: each row's newest token at `positions` (N,), -1 for padding; `table` (N, most): its pages."""

    table: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True)
class Turns:
    """Rotary embedding of every position: cos, sin (positions, rotary), fp32, both halves written out."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass
class Stack:
    """The factors of every adapter on one fused projection, side by side.

    ranks: room of each fused module. low, high: its outputs. a (slots, sum of ranks, D); b (slots, sum of rank * outputs), each
    module's as (rank, outputs), which is B transposed; scales (slots, modules), 0 where a module has no factors.
    """

    ranks: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]
    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor

    def module_b(self, place: int) -> slice:
        """Where a module's B stands in a row of `b`."""
        sizes = [rank * (high - low) for rank, low, high in zip(self.ranks, self.low, self.high, strict=True)]
        return slice(sum(sizes[:place]), sum(sizes[: place + 1]))

    def module_a(self, place: int) -> slice:
        """Where a module's A stands in `a`."""
        return slice(sum(self.ranks[:place]), sum(self.ranks[: place + 1]))


class Serving:
    """Torch's operations."""

    def attend(self, qkv: torch.Tensor, cache: Cache, looks: Looks, shape: Shape, turns: Turns) -> torch.Tensor:
        """qkv (N, (H + 2 G) K) of each row's newest token -> (N, H K); its key and value are put into the cache."""
        out = qkv.new_zeros(len(qkv), shape.heads * cache.keys.shape[3])
        for row, position in enumerate(looks.positions.tolist()):
            if position >= 0:
                pages = looks.table[row, : position // cache.page_tokens + 1]
                out[row] = self.attend_row(qkv[row : row + 1], cache, pages, position, shape, turns)[0]
        return out

    def attend_row(
        self, qkv: torch.Tensor, cache: Cache, pages: torch.Tensor, first: int, shape: Shape, turns: Turns
    ) -> torch.Tensor:
        """The T tokens of one row from position `first` on: qkv (T, (H + 2 G) K) -> (T, H K). pages: up to the last token's."""
        width, count = cache.keys.shape[3], len(qkv)
        query, key, value = (
            part.unflatten(1, (-1, width)).transpose(0, 1)
            for part in qkv.split([shape.heads * width, shape.groups * width, shape.groups * width], 1)
        )
        cos, sin = turns.cos[first : first + count], turns.sin[first : first + count]
        query, key = rotate(query.float(), cos, sin).to(qkv.dtype), rotate(key.float(), cos, sin).to(qkv.dtype)
        places = torch.arange(first, first + count, device=qkv.device)
        where = pages[places // cache.page_tokens], places % cache.page_tokens
        cache.keys[where[0], :, where[1]] = key.transpose(0, 1)
        cache.values[where[0], :, where[1]] = value.transpose(0, 1)
        end = first + count
        keys, values = (
            part[pages].transpose(0, 1).flatten(1, 2)[:, :end].repeat_interleave(shape.heads // shape.groups, 0)
            for part in (cache.keys, cache.values)
        )
        return _mixed(query, keys, values, _sees(places, end, shape), shape).transpose(0, 1).flatten(1)

    def adapt(self, y: torch.Tensor, x: torch.Tensor, stack: Stack, slots: torch.Tensor) -> None:
        """y (N, O) += scale x A^T B^T of each row's own adapter: x (N, D), slots (N,), -1 for none."""
        own = slots.clamp(min=0)
        scales = torch.where(slots[:, None] < 0, 0.0, stack.scales[own])
        low = torch.bmm(stack.a[own], x[:, :, None])[:, :, 0]
        for place, rank in enumerate(stack.ranks):
            if rank:
                b = stack.b[own, stack.module_b(place)].unflatten(1, (rank, -1))
                part = torch.bmm(low[:, None, stack.module_a(place)], b)[:, 0].float() * scales[:, place, None]
                y[:, stack.low[place] : stack.high[place]] += part.to(y.dtype)


def _sees(places: torch.Tensor, end: int, shape: Shape) -> torch.Tensor:
    """(T, end) bool: which positions each query looks at."""
    keys = torch.arange(end, device=places.device)
    sees = keys <= places[:, None]
    return sees if shape.window is None else sees & (keys > places[:, None] - shape.window)


def _mixed(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sees: torch.Tensor, shape: Shape) -> torch.Tensor:
    """(H, T, K) queries, (H, L, K) keys and values -> (H, T, K)."""
    if shape.softcap is None:
        return F.scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=sees, scale=shape.scale)[0]
    scores = query.float() @ keys.float().transpose(1, 2) * shape.scale
    scores = shape.softcap * torch.tanh(scores / shape.softcap)
    return (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ values.float()).to(query.dtype)
