"""Which way a model's losses are computed: decided once per run, measured, and said with the reason.

    fast       our own forward and backward of the Llama-shaped block (`forward.py`)
    general    transformers' own module, with our packing and loss (`batches.py`)
    one-row    transformers' own module, a row at a time: for models that do not pack exactly

Every path gives the same losses up to rounding; what differs is time and memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sartor.models import batches
from sartor.models.base import quiet
from sartor.models.batches import Encoded


class Path(Protocol):
    """A way to compute losses."""

    name: str
    reason: str
    packing_difference: float | None

    def losses(self, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """((S,) losses in nats, (S,) weights) of the supervised tokens of `rows`, in the rows' order; differentiable."""
        ...


@dataclass
class General:
    """Transformers' module, packed exactly."""

    model: Any
    device: torch.device
    reason: str
    packing_difference: float | None = None
    name: str = "general"

    def losses(self, rows: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Path`."""
        batch = batches.pack(rows, self.device)
        with batches.packing(self.model):
            return batches.pack_losses(self.model, batch), batch.weights


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
        losses = batches.row_losses(self.model, rows, self.device)
        weights = [row.weight for row in rows for _ in range(row.supervised_tokens)]
        return losses, torch.tensor(weights, device=losses.device)


def with_recompute(path: Path) -> Path:
    """`path` keeping one tensor a layer and computing the rest again in the backward pass; its reason says whether it can.

    Transformers' own checkpointing, which hands our `rows` on to each layer; it holds in training mode only.
    """
    if not isinstance(path, General | OneRow):
        return path
    model = path.model
    if not model.supports_gradient_checkpointing:
        path.reason += "; this architecture cannot compute activations again, so all are kept"
        return path
    with quiet():  # the name of transformers 5.0, deprecated by later ones
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Only the reentrant kind needs it; here it would send gradients below the lowest adapted layer
    model.disable_input_require_grads()
    if isinstance(path, General):
        # the layers are called again in the backward pass, when `packing` has long been left
        model.set_attn_implementation("sartor_packed")
    path.reason += "; activations are computed again in the backward pass"
    return path


def choose(model: Any, rows: Sequence[Encoded], device: torch.device) -> Path:
    """The fastest path that is right for `model`, measured on a few of `rows`. The model should be in eval mode."""
    is_exact, difference = batches.packs_exactly(model, rows, device)
    if is_exact:
        return General(model, device, "transformers' own module", difference)
    return OneRow(model, device, f"packed losses differ by {difference:.2g} nats from those of single rows", difference)
