"""A way to compute losses, what a run asks of one, and the fast one: our own forward and backward. Torch alone is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path as Folder
from typing import Any, Protocol

import torch

from sartor.core.home import folder
from sartor.models import batches
from sartor.models.batches import Encoded
from sartor.models.forward import Fast
from sartor.models.frozen import Frozen
from sartor.models.shelf import Shelf

Notice = Callable[[str], object]


@dataclass(frozen=True)
class Wish:
    """What a run asks of a path. Nothing here changes losses, but by rounding.

    fast: false takes transformers' module anyway. recompute: keep a tensor a layer and compute the rest again. share:
    compute common beginnings of rows once. reuse_bytes: room on disk for frozen activations, 0 for none; identity: the
    base's digest, under which they are kept; store: where, if not in SARTOR_HOME/activations.
    """

    fast: bool = True
    recompute: bool = False
    share: bool = True
    reuse_bytes: int = 0
    identity: str = ""
    store: Folder | None = None
    notice: Notice = field(default=lambda line: None, compare=False)


WISH = Wish()


class Path(Protocol):
    """A way to compute losses."""

    name: str
    reason: str
    packing_difference: float | None

    def losses(self, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """((S,) losses in nats, (S,) weights) of the supervised tokens of `rows`, in the rows' order; differentiable."""
        ...

    def plain(self) -> Path | None:
        """The same without shared prefixes and stored activations, to prove it by; None where it saves nothing."""
        ...

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """What learns through it."""
        ...


@dataclass
class FastPath:
    """Our own forward and backward."""

    fast: Fast
    device: torch.device
    reason: str
    share: bool
    frozen: Frozen | None = None
    packing_difference: float | None = None
    name: str = "fast"

    def losses(self, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Path`."""
        batch = batches.pack(rows, self.device, share=self.share)
        if self.frozen is None:
            return self.fast.losses(batch), batch.weights
        with torch.no_grad():
            x = self.frozen.inputs(rows, batch)
        return self.fast.tuned(x, batch, self.fast.geometries(batch)), batch.weights

    def plain(self) -> Path:
        """See `Path`."""
        return FastPath(self.fast, self.device, "", share=False)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """See `Path`."""
        return [part for block in self.fast.blocks for part in block.parameters if part.requires_grad]


def reuse(fast: Fast, rows: Sequence[Encoded], device: torch.device, wish: Wish) -> Frozen | None:
    """The cache of what layers below the lowest adapted one make of `rows`, if there is such a layer and room for it."""
    if not (wish.reuse_bytes and 0 < fast.lowest < len(fast.blocks)):
        return None
    store = wish.store or folder("activations")
    shelf = Shelf(store, wish.reuse_bytes, wish.notice, dtype=str(fast.head.dtype))
    frozen = Frozen(fast, device, shelf, wish.identity)
    frozen.plan(rows)
    return frozen


def prove(path: Path, rows: Sequence[Encoded]) -> dict[str, float]:
    """How far a path's savings (shared prefixes, frozen activations) are from the plain computation on `rows`.

    {loss, gradient}: norm of the difference over norm, of the losses and of the worst gradient tensor. B is 0 at a run's
    start and would hide A's gradient, so it is set to small random numbers meanwhile.
    """
    plain, parameters = path.plain(), path.trained
    if plain is None:
        return {"loss": 0.0, "gradient": 0.0}
    held = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * (0.02 if not parameter.any() else 0.0))
    try:
        (saved, saved_gradients), (full, gradients) = (_loss_and_gradients(way, rows, parameters) for way in (path, plain))
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, held, strict=True):
                parameter.copy_(before)
    worst = max(_apart(got, wanted) for got, wanted in zip(saved_gradients, gradients, strict=True))
    return {"loss": _apart(saved, full), "gradient": worst}


def _loss_and_gradients(path: Path, rows: Sequence[Encoded], parameters: Sequence[torch.Tensor]) -> tuple[torch.Tensor, Any]:
    losses, weights = path.losses(rows)
    return losses.detach(), torch.autograd.grad((losses * weights).sum() / weights.sum(), parameters)


def _apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm().clamp_min(torch.finfo(wanted.dtype).tiny))
