"""What serving computes besides matrix products: attention over a paged cache, and LoRA of many adapters in one batch.

`Serving` is in torch's operations, on any device; `NativeServing` calls `serving.cpp` on a CPU. In both a row's result is
computed from its own numbers alone, in an order that its neighbours do not change.

Shapes: N rows; H heads, G key heads of width K; pages of P tokens; R ranks; D inputs, O outputs of a fused projection.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from sartor.models.attention import Shape
from sartor.models.kernels import native
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
    """Who looks where in a step: each row's newest token at `positions` (N,), -1 for padding; `table` (N, most): its pages."""

    table: torch.Tensor
    positions: torch.Tensor
    structures: dict[int, ctypes.Structure] = field(default_factory=dict)


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


class NativeServing(Serving):
    """`serving.cpp`."""

    def __init__(self, kernels: native.Native) -> None:
        self._kernels = kernels

    def attend(self, qkv: torch.Tensor, cache: Cache, looks: Looks, shape: Shape, turns: Turns) -> torch.Tensor:
        """See `Serving`."""
        qkv, out = qkv.contiguous(), qkv.new_zeros(len(qkv), shape.heads * cache.keys.shape[3])
        key = id(turns) ^ hash(shape)
        if key not in looks.structures:
            looks.structures[key] = _paged(cache, looks, shape, turns)
        self._kernels.call("paged_attention", qkv.dtype, looks.structures[key], qkv, cache.keys, cache.values, out)
        return out

    def adapt(self, y: torch.Tensor, x: torch.Tensor, stack: Stack, slots: torch.Tensor) -> None:
        """See `Serving`."""
        modules, _alive = _modules(stack)
        sizes = (len(x), x.shape[1], y.shape[1])
        self._kernels.call("lora_rows", y.dtype, modules, x.contiguous(), y, stack.a, stack.b, slots, stack.scales, *sizes)


class _Paged(ctypes.Structure):
    """`Paged` of serving.cpp."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "most", "page", "heads", "groups", "width", "rotary", "window")),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("scale", ctypes.c_double),
        ("cap", ctypes.c_double),
    )


class _Modules(ctypes.Structure):
    """`Modules` of serving.cpp."""

    _fields_ = (("count", ctypes.c_int64), *((name, ctypes.c_void_p) for name in ("ranks", "low", "high")))


def _paged(cache: Cache, looks: Looks, shape: Shape, turns: Turns) -> _Paged:
    rows, most = looks.table.shape
    return _Paged(
        looks.table.data_ptr(), looks.positions.data_ptr(), rows, most, cache.page_tokens, shape.heads, shape.groups,
        cache.keys.shape[3], turns.cos.shape[1], shape.window or 0, turns.cos.data_ptr(), turns.sin.data_ptr(), shape.scale,
        shape.softcap or 0.0,
    )  # fmt: skip


def _modules(stack: Stack) -> tuple[_Modules, Sequence[ctypes.Array[ctypes.c_int64]]]:
    count = len(stack.ranks)
    arrays = [(ctypes.c_int64 * count)(*column) for column in (stack.ranks, stack.low, stack.high)]
    return _Modules(count, *(ctypes.addressof(array) for array in arrays)), arrays


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


def choose(device: torch.device, dtype: torch.dtype) -> Serving:
    """The fastest for a device, checked against torch's operations."""
    if device.type != "cpu" or dtype not in native.SUFFIX:
        return Serving()
    try:
        made = NativeServing(native.load())
    except native.NoKernels:
        return Serving()
    return made if is_right(made) else Serving()


def is_right(kernels: Serving) -> bool:
    """Whether `kernels` compute what `Serving` does, on small cases in fp32."""
    state = torch.get_rng_state()
    try:
        torch.manual_seed(0)
        return all(
            (got - wanted).norm() <= 1e-5 * wanted.norm()
            for got, wanted in zip(_small_cases(kernels), _small_cases(Serving()), strict=True)
        )
    finally:
        torch.set_rng_state(state)


def _small_cases(kernels: Serving) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=source)

    angles = random(16, 4).repeat(1, 2)
    turns = Turns(angles.cos(), angles.sin())
    found = []
    for shape in (Shape(4, 2, 0.3), Shape(4, 2, 0.3, 2.0, 3)):
        cache = Cache(random(6, 2, 4, 12), random(6, 2, 4, 12))
        looks = Looks(torch.tensor([[0, 5], [1, 2], [3, 4]]), torch.tensor([6, -1, 2]))
        found += [kernels.attend(random(3, 8 * 12), cache, looks, shape, turns), cache.keys, cache.values]
    stack = Stack((3, 0, 2), (0, 5, 6), (5, 6, 10), random(2, 5, 7), random(2, 3 * 5 + 2 * 4), random(2, 3))
    y = random(3, 10)
    kernels.adapt(y, random(3, 7), stack, torch.tensor([1, -1, 0]))
    return [*found, y]
