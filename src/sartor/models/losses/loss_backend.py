"""LossBackend protocol, fused backend, frozen-activation cache.

Rows are grouped into packs of about PACK_TOKENS once, in an order that depends on the rows alone. A pack is computed
and stored as a whole, so a row's activations have the same bits whichever update reads them first. A killed and
resumed run therefore ends as an uninterrupted one does. A pack's file name is a digest of the base, the layer, the
arithmetic and the tokens. So another run on the same base and rows (with another learning rate or rank) finds it, and
activations of another version's arithmetic are computed anew (`tensor_files.py`).

Files are below SARTOR_HOME/activations; the least recently used are deleted first when the limit is reached. Rows for
which the limit leaves no space are computed with each update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path as Folder
from typing import Any, Protocol

import torch

from sartor.core.home import folder
from sartor.models import packing
from sartor.models.losses.fused_decoder import FusedDecoder
from sartor.models.losses.row_gradients import RowGradientObserver
from sartor.models.packing import Pack, TokenizedExample, group_by_capacity, pack
from sartor.models.tensor_files import SCHEMA, TensorCache

PACK_TOKENS = 2048


@dataclass
class CachedPack:
    """Stored pack of frozen activations.

    rows: its examples.
    places: slice of each example's tokens in `hidden`, by token ids.
    name: file name in the cache.
    hidden: (tokens, D), opened at the first use.
    """

    rows: list[TokenizedExample]
    places: dict[tuple[int, ...], slice]
    name: str
    hidden: Any = None


@dataclass
class ActivationCache:
    """Bounded cache of frozen activations on disk, for one model and its rows.

    shelf: the files. identity: digest of the base.
    parts: the pack of each cached row, by token ids.
    computed, reused: packs computed and packs read from disk so far.
    """

    fast: FusedDecoder
    device: torch.device
    shelf: TensorCache
    identity: str
    parts: dict[tuple[int, ...], CachedPack] = field(default_factory=dict)
    computed: int = 0
    reused: int = 0

    def plan(self, rows: Sequence[TokenizedExample]) -> None:
        """Group `rows` into packs, as many as the size limit holds."""
        unique_rows = {tuple(row.ids): row for row in rows}
        ordered = [unique_rows[ids] for ids in sorted(unique_rows)]  # sorted, so that neighbours share beginnings
        lengths = [len(row.ids) for row in ordered]
        free_bytes = self.shelf.limit_bytes
        for group in group_by_capacity(lengths, max(PACK_TOKENS, *lengths)) if lengths else []:
            free_bytes -= sum(lengths[index] for index in group) * self._token_bytes
            if free_bytes < 0:
                n_uncached = len(ordered) - len(self.parts)
                self.shelf.notice(
                    f"compute.cache_gb holds {len(self.parts):,} rows' frozen activations; {n_uncached:,} are "
                    "computed anew"
                )
                break
            self._add([ordered[index] for index in group])

    @property
    def _token_bytes(self) -> int:
        return int(self.fast.head.shape[1] * self.fast.head.element_size())

    def _add(self, rows: list[TokenizedExample]) -> None:
        end, places = 0, {}
        for row in rows:
            places[tuple(row.ids)] = slice(end, end + len(row.ids))
            end += len(row.ids)
        key_fields = (
            SCHEMA,
            self.identity,
            self.fast.lowest,
            str(self.fast.head.dtype),
            self.fast.kernels.name,
            torch.__version__,
            torch.get_num_threads(),
            list(places),
        )
        name = hashlib.sha256(repr(key_fields).encode()).hexdigest()
        self.shelf.keep(name)
        self.parts.update(dict.fromkeys(places, CachedPack(rows, places, name)))

    def inputs(self, rows: Sequence[TokenizedExample], batch: Pack) -> torch.Tensor:
        """Return the input of the lowest adapted layer, (T, D), for a pack of `rows`. Call under no_grad."""
        x = torch.zeros(batch.tokens, self.fast.head.shape[1], dtype=self.fast.head.dtype, device=self.device)
        unknown = [index for index, row in enumerate(rows) if tuple(row.ids) not in self.parts]
        for row, places in zip(rows, batch.places, strict=True):
            ids = tuple(row.ids)
            if ids in self.parts:
                part = self.parts[ids]
                x[places] = self._hidden(part)[part.places[ids]].to(self.device)
        if unknown:
            unknown_batch = pack([rows[index] for index in unknown], self.device, share=True)
            hidden = self._compute(unknown_batch)
            for index, places in zip(unknown, unknown_batch.places, strict=True):
                x[batch.places[index]] = hidden[places]
        return x

    def _compute(self, batch: Pack) -> torch.Tensor:
        return self.fast.frozen(self.fast.embed(batch.ids[0]), self.fast.geometries(batch))

    def _hidden(self, part: CachedPack) -> Any:
        """Return a pack's activations, (tokens, D), one example after another, read from disk or computed."""
        if part.hidden is None:
            shape = (sum(len(row.ids) for row in part.rows), self.fast.head.shape[1])
            part.hidden = self.shelf.read(part.name, shape)
            self.reused += part.hidden is not None
        if part.hidden is None:
            batch = pack(part.rows, self.device, share=True)
            hidden = self._compute(batch)[torch.cat(batch.places)].cpu()
            self.computed += 1
            part.hidden = self.shelf.write(part.name, hidden)
        return part.hidden


Notice = Callable[[str], object]


@dataclass(frozen=True)
class LossOptions:
    """Options of a loss backend. None of them changes losses beyond rounding.

    fast: false takes transformers' module in any case.
    recompute: keep one tensor per layer and compute the other activations again in the backward.
    share: compute common beginnings of rows once.
    reuse_bytes: disk space for frozen activations; 0 for none.
    identity: digest of the base, part of the cached files' names.
    store: directory of the cached files; None for SARTOR_HOME/activations.
    """

    fast: bool = True
    recompute: bool = False
    share: bool = True
    reuse_bytes: int = 0
    identity: str = ""
    store: Folder | None = None
    notice: Notice = field(default=lambda line: None, compare=False)


WISH = LossOptions()


class LossBackend(Protocol):
    """Protocol of an implementation that computes training losses.

    reason: explanation of the choice, for the log.
    packing_difference: largest difference in nats between packed and single rows; None if not measured.
    """

    name: str
    reason: str
    packing_difference: float | None

    def losses(self, rows: Sequence[TokenizedExample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses (S,) in nats and weights (S,) of the supervised tokens of `rows`, in the rows' order.

        The losses are differentiable.
        """
        ...

    def plain(self) -> LossBackend | None:
        """Return this backend without shared prefixes and stored activations, for comparison.

        None if it uses neither.
        """
        ...

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Parameters that are trained through this backend."""
        ...


@dataclass
class FusedBackend:
    """Losses by the hand-written forward and backward of `FusedDecoder`."""

    fast: FusedDecoder
    device: torch.device
    reason: str
    share: bool
    frozen: ActivationCache | None = None
    packing_difference: float | None = None
    name: str = "fast"
    observer: RowGradientObserver | None = None

    def losses(self, rows: Sequence[TokenizedExample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses (S,) in nats and weights (S,), as `LossBackend.losses` specifies."""
        batch = self.pack(rows)
        if self.observer is not None and torch.is_grad_enabled():
            self.observer.begin(batch)
        if self.frozen is None:
            return self.fast.losses(batch), batch.weights
        with torch.no_grad():
            x = self.frozen.inputs(rows, batch)
        return self.fast.tuned(x, batch, self.fast.geometries(batch)), batch.weights

    def pack(self, rows: Sequence[TokenizedExample]) -> Pack:
        """Return rows as the pack that `losses` computes."""
        return packing.pack(rows, self.device, share=self.share, multiple=self.fast.token_multiple)

    def plain(self) -> LossBackend:
        """Return this backend without shared prefixes and stored activations."""
        return FusedBackend(self.fast, self.device, "", share=False)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """LoRA factors that require gradients."""
        return [part for block in self.fast.blocks for part in block.parameters if part.requires_grad]


def activation_cache_for(
    fast: FusedDecoder, rows: Sequence[TokenizedExample], device: torch.device, options: LossOptions
) -> ActivationCache | None:
    """Return a cache of the outputs of the layers below the lowest adapted one for `rows`.

    None if there is no such layer, if no layer is adapted, or if `options` allows no disk space.
    """
    if not (options.reuse_bytes and 0 < fast.lowest < len(fast.blocks)):
        return None
    store = options.store or folder("activations")
    shelf = TensorCache(store, options.reuse_bytes, options.notice, dtype=str(fast.head.dtype))
    frozen = ActivationCache(fast, device, shelf, options.identity)
    frozen.plan(rows)
    return frozen


def measure_savings_error(backend: LossBackend, rows: Sequence[TokenizedExample]) -> dict[str, float]:
    """Return the relative error of a backend's savings against its plain computation on `rows`.

    The savings are shared prefixes and frozen activations. {"loss", "gradient"}: norm of the difference over norm, of
    the losses and of the worst gradient tensor. B is 0 at a run's start, which would hide A's gradient; so parameters
    that are all zero are set to small random numbers during the measurement.
    """
    plain, parameters = backend.plain(), backend.trained
    if plain is None:
        return {"loss": 0.0, "gradient": 0.0}
    originals = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * (0.02 if not parameter.any() else 0.0))
    try:
        (saved, saved_gradients), (full, gradients) = (
            _loss_and_gradients(variant, rows, parameters) for variant in (backend, plain)
        )
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)
    worst = max(_relative_error(actual, expected) for actual, expected in zip(saved_gradients, gradients, strict=True))
    return {"loss": _relative_error(saved, full), "gradient": worst}


def _loss_and_gradients(
    backend: LossBackend, rows: Sequence[TokenizedExample], parameters: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, Any]:
    """Return losses (S,), and the gradients of their weighted mean for each parameter."""
    losses, weights = backend.losses(rows)
    return losses.detach(), torch.autograd.grad((losses * weights).sum() / weights.sum(), parameters)


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of `expected`."""
    return float((actual - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))
