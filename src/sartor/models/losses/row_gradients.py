"""Gradients of LoRA factors row by row, from one backward pass of a pack.

The gradient of a factor is a sum over tokens of outer products, and each token belongs to one row:

    dA = sum_t (scale B^T dy_t) x_t^T  (R, D)        dB = sum_t (scale dy_t) (A x_t)^T  (outs, R)

`RowGradientObserver` reads both sides of each product in the backward pass and hands them to a `TokenSketcher`, which
projects each side to a few numbers; their products are summed by row. So no row needs a pass of its own, and no
gradient of a row is ever in memory (Choe et al. 2024, arXiv:2405.13954, section 3.2). The observer only reads: no bit
of a loss or a gradient changes.

With shared prefixes (packing.py) a token may belong to several rows, and its gradient is their sum. Such a token
counts for each of its rows in equal parts. With `is_masked`, only tokens that predict a supervised token count, so
this concerns only rows with the same prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sartor.models.losses.lora_linear import LoraFactors, Projection
from sartor.models.packing import Pack

# factors whose projections wait for one batched product a row; a product a factor takes longer
_WAITING_FACTORS = 64


class TokenSketcher(Protocol):
    """Projections of both sides of a token's part of a factor's gradient.

    size: numbers of a row's sketch, K.
    """

    @property
    def size(self) -> int:
        """Numbers of a row's sketch, K."""
        ...

    def is_sketched(self, factor: torch.nn.Parameter) -> bool:
        """Return whether `project` returns something for a factor."""
        ...

    def project(
        self, factor: torch.nn.Parameter, left: torch.Tensor, right: torch.Tensor
    ) -> tuple[slice, torch.Tensor, torch.Tensor] | None:
        """Return the place of a factor (m, n) in a row's sketch, and P left^T (k_m, S) and Q right^T (k_n, S).

        left: (S, m). right: (S, n). The sketch of a token is the outer product of its projections, flattened.
        None for a factor that is not sketched.
        """
        ...


@dataclass(frozen=True)
class _Tokens:
    """Tokens that count, of a pack, row after row.

    index: (S,) places in the pack. rows: slice of each row's tokens. weights: (S,) one over the number of rows of the
    token; None if no token has several.
    """

    index: torch.Tensor
    rows: list[slice]
    weights: torch.Tensor | None

    @classmethod
    def of(cls, index: torch.Tensor, counts: Sequence[int]) -> _Tokens:
        """Return the tokens at `index`. counts: of each row's."""
        ends = list(itertools.accumulate(counts))
        _, inverse, owners = torch.unique(index, return_inverse=True, return_counts=True)
        weights = 1.0 / owners[inverse].float() if len(owners) < len(index) else None
        return cls(index, [slice(end - count, end) for end, count in zip(ends, counts, strict=True)], weights)

    def select(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values (S, .) of the tokens that count, in fp32. values: (N, .) of all tokens of a module."""
        return values.index_select(0, self.index).float()


@dataclass(frozen=True)
class _Projections:
    """Projections of a factor's tokens. left: (k_m, S). right: (k_n, S). place: of the factor in a row's sketch."""

    tokens: _Tokens
    place: slice
    left: torch.Tensor
    right: torch.Tensor


@dataclass
class _ObservedPack:
    """Pack between its forward and its backward pass.

    by_length: tokens that count, by the number of tokens that a module computes.
    sums: (rows, K) sketches so far. waiting: projections that are not summed yet.
    """

    example_ids: tuple[str, ...]
    by_length: dict[int, _Tokens]
    sums: torch.Tensor
    waiting: list[_Projections]

    def add(self, tokens: _Tokens, place: slice, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add a factor's projections, left (k_m, S) and right (k_n, S), to the sketches."""
        if tokens.weights is not None:
            left = left * tokens.weights
        self.waiting.append(_Projections(tokens, place, left, right))
        if len(self.waiting) >= _WAITING_FACTORS:
            self.add_up()

    def add_up(self) -> None:
        """Sum the products of the waiting projections by row: one batched product a row and shape of factors."""
        alike: dict[tuple[int, int, int], list[_Projections]] = {}
        for factor in self.waiting:
            alike.setdefault((id(factor.tokens), len(factor.left), len(factor.right)), []).append(factor)
        self.waiting = []
        for factors in alike.values():
            # (F, k_m, S) and (F, S, k_n) of F factors
            left = torch.stack([factor.left for factor in factors])
            right = torch.stack([factor.right for factor in factors]).transpose(1, 2)
            # (rows, F k_m k_n)
            rows = factors[0].tokens.rows
            products = torch.stack([(left[:, :, row] @ right[:, row]).flatten() for row in rows])
            columns = torch.cat([torch.arange(factor.place.start, factor.place.stop) for factor in factors])
            self.sums.index_add_(1, columns.to(self.sums.device), products)


class RowGradientObserver:
    """Observer of a loss backend that sums the sketches of each row of its packs.

    is_masked: count only the tokens that predict a supervised one. Otherwise every token counts, and a row's sketch is
        that of its whole gradient.
    """

    def __init__(self, sketcher: TokenSketcher, *, is_masked: bool = True) -> None:
        self.sketcher, self.is_masked = sketcher, is_masked
        self._packs: list[_ObservedPack] = []

    def begin(self, batch: Pack) -> None:
        """Prepare for the backward pass of a pack. The backend calls it before the forward pass."""
        device = batch.ids.device
        # the last layer's tail computes these tokens alone
        output_rows, places = batch.output_rows
        by_length = {len(output_rows): _Tokens.of(places, batch.supervised)}
        if self.is_masked:
            by_length[batch.tokens] = _Tokens.of(batch.predict, batch.supervised)
        else:
            by_length[batch.tokens] = _Tokens.of(torch.cat(batch.places), [len(places) for places in batch.places])
        sums = torch.zeros(len(batch.example_ids), self.sketcher.size, device=device)
        self._packs.append(_ObservedPack(batch.example_ids, by_length, sums, []))

    def take(self) -> tuple[list[str], torch.Tensor]:
        """Return the example ids and sketches (N, K), fp32, of the rows since the last call."""
        packs, self._packs = self._packs, []
        for pack in packs:
            pack.add_up()
        ids = [id for pack in packs for id in pack.example_ids]
        return ids, torch.cat([pack.sums for pack in packs]) if packs else torch.zeros(0, self.sketcher.size)

    @torch.no_grad()
    def observe(
        self,
        factors: Sequence[LoraFactors],
        dy: torch.Tensor,
        x: torch.Tensor,
        low_rank: torch.Tensor,
        lowered: torch.Tensor,
    ) -> None:
        """Add the tokens' parts of all factors of a projection; arguments as of `Projection.factor_gradients`."""
        pack = self._packs[-1]
        tokens = pack.by_length.get(len(x))
        if tokens is None:  # a module of a media tower, whose tokens are no rows of the pack
            return
        if not any(self.sketcher.is_sketched(pair.a) or self.sketcher.is_sketched(pair.b) for pair in factors):
            return
        x, low_rank, dy, lowered = (tokens.select(part) for part in (x, low_rank, dy, lowered))
        rank = 0
        for pair in factors:
            ranks = slice(rank, rank + len(pair.a))
            self._add(pack, tokens, pair.a, left=lowered[:, ranks], right=x)
            self._add(pack, tokens, pair.b, left=dy[:, pair.low : pair.high], right=low_rank[:, ranks] * pair.scale)
            rank += len(pair.a)

    def _add(
        self,
        pack: _ObservedPack,
        tokens: _Tokens,
        factor: torch.nn.Parameter,
        *,
        left: torch.Tensor,
        right: torch.Tensor,
    ) -> None:
        projected = self.sketcher.project(factor, left, right)
        if projected is not None:
            pack.add(tokens, *projected)

    @contextmanager
    def attached(self, backend: Any) -> Iterator[None]:
        """Observe every backward pass of a loss backend inside the `with` block."""
        projections, layers = _parts_of(backend)
        backend.observer = self
        handles = [handle for layer in layers for handle in self._hook(layer)]
        for projection in projections:
            projection.observer = self.observe
        try:
            yield
        finally:
            backend.observer = None
            for projection in projections:
                projection.observer = None
            for handle in handles:
                handle.remove()

    def _hook(self, layer: Any) -> list[Any]:
        """Observe a LoRA layer that computes by peft's own forward: both factors are modules there."""

        def listen(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.requires_grad or not self._packs:
                return
            pack, right = self._packs[-1], inputs[0].detach().flatten(0, -2)
            tokens = pack.by_length.get(len(right))
            if tokens is None:
                return
            right = tokens.select(right)

            def add(gradient: torch.Tensor) -> None:
                left = tokens.select(gradient.detach().flatten(0, -2))
                self._add(pack, tokens, module.weight, left=left, right=right)

            output.register_hook(add)

        modules = [part["default"] for part in (layer.lora_A, layer.lora_B)]
        return [module.register_forward_hook(listen) for module in modules if self.sketcher.is_sketched(module.weight)]


def _parts_of(backend: Any) -> tuple[list[Projection], list[Any]]:
    """Return the projections that compute a backend's factor gradients, and the LoRA layers that peft computes."""
    if hasattr(backend, "fast"):
        blocks = backend.fast.blocks
        parts = [(block.attention_in, block.attention_out, block.mlp_in, block.mlp_out) for block in blocks]
        return list(itertools.chain.from_iterable(parts)), []
    layers = [module for module in backend.model.modules() if hasattr(module, "lora_A") and len(module.lora_A)]
    projections = [layer.projection for layer in layers if hasattr(layer, "projection")]
    return projections, [layer for layer in layers if not hasattr(layer, "projection")]
