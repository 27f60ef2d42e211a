"""Gradients of LoRA factors row by row, from one backward pass of a pack.

The gradient of a factor is a sum over tokens of outer products, and each token belongs to one row:

    dA = sum_t (scale B^T dy_t) x_t^T  (R, D)        dB = sum_t (scale dy_t) (A x_t)^T  (outs, R)

`RowGradientObserver` reads both sides of each product in the backward pass and hands them to a `TokenSketcher`, which
reduces each token's product to a few numbers; they are summed by row. So no row needs a pass of its own, and no
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


class TokenSketcher(Protocol):
    """Reduction of a token's part of a factor's gradient.

    size: numbers of a row's sketch, K.
    """

    @property
    def size(self) -> int:
        """Numbers of a row's sketch, K."""
        ...

    def is_sketched(self, factor: torch.nn.Parameter) -> bool:
        """Return whether `sketch` returns something for a factor."""
        ...

    def sketch(
        self, factor: torch.nn.Parameter, left: torch.Tensor, right: torch.Tensor
    ) -> tuple[slice, torch.Tensor] | None:
        """Return the place in a row's sketch and the sketches (S, k) of the S products left_s right_s^T.

        factor: (m, n). left: (S, m). right: (S, n). None for a factor that is not sketched.
        """
        ...


@dataclass(frozen=True)
class _Tokens:
    """Tokens that count, of a pack.

    index: (S,) places in the pack. owners: (S,) row of each. weights: (S, 1) one over the number of rows of the token.
    """

    index: torch.Tensor
    owners: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, index: torch.Tensor, owners: torch.Tensor) -> _Tokens:
        _, inverse, counts = torch.unique(index, return_inverse=True, return_counts=True)
        return cls(index, owners, 1.0 / counts[inverse].float()[:, None])


@dataclass
class _ObservedPack:
    """Pack between its forward and its backward pass.

    by_length: tokens that count, by the number of tokens that a module computes.
    sums: (rows, K) sketches so far.
    """

    example_ids: tuple[str, ...]
    by_length: dict[int, _Tokens]
    sums: torch.Tensor


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
        counts = torch.tensor(batch.supervised)
        predict_owners = torch.repeat_interleave(torch.arange(len(counts)), counts).to(device)
        # the last layer's tail computes these tokens alone
        output_rows, places = batch.output_rows
        by_length = {len(output_rows): _Tokens.of(places, predict_owners)}
        if self.is_masked:
            by_length[batch.tokens] = _Tokens.of(batch.predict, predict_owners)
        else:
            lengths = torch.tensor([len(places) for places in batch.places])
            owners = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device)
            by_length[batch.tokens] = _Tokens.of(torch.cat(batch.places), owners)
        sums = torch.zeros(len(batch.example_ids), self.sketcher.size, device=device)
        self._packs.append(_ObservedPack(batch.example_ids, by_length, sums))

    def take(self) -> tuple[list[str], torch.Tensor]:
        """Return the example ids and sketches (N, K), fp32, of the rows since the last call."""
        packs, self._packs = self._packs, []
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
        # (S, .) of the tokens that count, in fp32
        x, low_rank = x[tokens.index].float(), low_rank[tokens.index].float()
        dy, lowered = (part[tokens.index].float().mul_(tokens.weights) for part in (dy, lowered))
        rank = 0
        for pair in factors:
            ranks = slice(rank, rank + len(pair.a))
            self._add(pack, tokens, pair.a, left=lowered[:, ranks], right=x)
            left = dy[:, pair.low : pair.high] * pair.scale
            self._add(pack, tokens, pair.b, left=left, right=low_rank[:, ranks])
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
        sketched = self.sketcher.sketch(factor, left, right)
        if sketched is not None:
            place, sketches = sketched
            pack.sums[:, place].index_add_(0, tokens.owners, sketches)

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
            right = right[tokens.index].float()

            def add(gradient: torch.Tensor) -> None:
                left = gradient.detach().flatten(0, -2)[tokens.index].float() * tokens.weights
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
