"""Which way a model's losses are computed: decided once per run, measured, and said with the reason.

    fast       our own forward and backward of the Llama-shaped block (`forward.py`), frozen layers from disk (`frozen.py`)
    general    transformers' own module, with our packing and loss (`batches.py`)
    one-row    transformers' own module, a row at a time: for models that do not pack exactly

Every path gives the same losses up to rounding; what differs is time and memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path as Folder
from typing import Any, Protocol

import torch

from sartor.core.home import folder
from sartor.models import batches, general, kernels
from sartor.models.adapters import without_peft
from sartor.models.batches import Encoded
from sartor.models.forward import Fast
from sartor.models.frozen import Frozen
from sartor.models.general import decoder, packing
from sartor.models.linear import Unsupported
from sartor.models.loading import quiet
from sartor.models.shelf import Shelf

Notice = Callable[[str], object]
RECOMPUTED = "activations are computed again in the backward pass"


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


class Path(Protocol):
    """A way to compute losses."""

    name: str
    reason: str
    packing_difference: float | None

    def losses(self, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """((S,) losses in nats, (S,) weights) of the supervised tokens of `rows`, in the rows' order; differentiable."""
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


@dataclass
class General:
    """Transformers' module, packed exactly."""

    model: Any
    device: torch.device
    reason: str
    share: bool = False
    packing_difference: float | None = None
    name: str = "general"

    def losses(self, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Path`."""
        batch = batches.pack(rows, self.device, share=self.share)
        with packing(self.model):
            return general.pack_losses(self.model, batch), batch.weights


@dataclass
class OneRow:
    """Transformers' module, a row at a time."""

    model: Any
    device: torch.device
    reason: str
    packing_difference: float | None = None
    name: str = "one-row"

    def losses(self, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Path`."""
        losses = general.row_losses(self.model, rows, self.device)
        weights = [row.weight for row in rows for _ in range(row.supervised_tokens)]
        return losses, torch.tensor(weights, device=losses.device)


def choose(model: Any, rows: Sequence[Encoded], device: torch.device, wish: Wish = Wish()) -> Path:
    """The fastest path that is right for `model`, measured on a few of `rows`. The model should be in eval mode."""
    try:
        if not wish.fast:
            raise Unsupported("compute.path is general")
        made, why = kernels.choose(device)
        fast = Fast(without_peft(model), made, recompute=wish.recompute)
        is_exact, difference = general.agrees(model, rows, device, lambda few: fast.losses(batches.pack(few, device)))
        if not is_exact:
            how = f"differs from the model's own losses by {difference:.2g} nats" if math.isfinite(difference) else "fails"
            raise Unsupported(f"it {how} on rows of this run")
    except Unsupported as error:
        return _general(model, rows, device, wish, f"not the fast path: {error}")
    reason = f"{fast.family_name} block by hand, {why}"
    if wish.recompute:
        reason += f"; {RECOMPUTED}"
    return FastPath(fast, device, reason, wish.share, _frozen(fast, rows, device, wish), difference)


def _frozen(fast: Fast, rows: Sequence[Encoded], device: torch.device, wish: Wish) -> Frozen | None:
    if not (wish.reuse_bytes and 0 < fast.lowest < len(fast.blocks)):
        return None
    store = wish.store or folder("activations")
    frozen = Frozen(fast, device, Shelf(store, wish.reuse_bytes, wish.notice), wish.identity)
    frozen.plan(rows)
    return frozen


def _general(model: Any, rows: Sequence[Encoded], device: torch.device, wish: Wish, reason: str) -> Path:
    is_exact, difference = general.packs_exactly(model, rows, device)
    if not is_exact:
        how = f"differ by {difference:.2g} nats from single rows" if math.isfinite(difference) else "cannot be computed"
        return OneRow(model, device, f"{reason}; packed losses {how}", difference)
    path = General(model, device, reason, wish.share, difference)
    return with_recompute(path) if wish.recompute else path


def with_recompute(path: General) -> General:
    """`path` keeping one tensor a layer and computing the rest again in the backward pass; its reason says whether it can.

    Transformers' own checkpointing, which hands our `rows` on to each layer; it holds in training mode only.
    """
    model = path.model
    if not model.supports_gradient_checkpointing:
        path.reason += "; this architecture cannot compute activations again, so all are kept"
        return path
    with quiet():  # the name of transformers 5.0, deprecated by later ones
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Only the reentrant kind needs it; here it would send gradients below the lowest adapted layer
    model.disable_input_require_grads()
    # the layers are called again in the backward pass, when `packing` has long been left
    decoder(model).set_attn_implementation("sartor_packed")
    path.reason += f"; {RECOMPUTED}"
    return path


def prove(path: Path, rows: Sequence[Encoded]) -> dict[str, float]:
    """How far a path's savings (shared prefixes, frozen activations) are from the plain computation on `rows`.

    {loss, gradient}: norm of the difference over norm, of the losses and of the worst gradient tensor. B is 0 at a run's
    start and would hide A's gradient, so it is set to small random numbers meanwhile.
    """
    if isinstance(path, FastPath):
        plain: Path = FastPath(path.fast, path.device, "", share=False)
        parameters = [parameter for block in path.fast.blocks for parameter in block.parameters]
    elif isinstance(path, General):
        plain = General(path.model, path.device, "")
        parameters = [parameter for parameter in path.model.parameters() if parameter.requires_grad]
    else:
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
