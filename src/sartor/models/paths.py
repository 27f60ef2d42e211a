"""Which way a model's losses are computed: decided once per run, measured, and said with the reason.

    fast       our own forward and backward of the Llama-shaped block (`forward.py`), frozen layers from disk (`frozen.py`)
    general    transformers' own module, with our packing and loss (`general.py`)
    one-row    transformers' own module, a row at a time: for models that do not pack exactly

Every path gives the same losses up to rounding; what differs is time and memory. What needs torch alone is in `path.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sartor.models import batches, general, kernels
from sartor.models.adapted import rounded_twice
from sartor.models.batches import Encoded
from sartor.models.forward import Fast
from sartor.models.general import decoder, packing, without_peft
from sartor.models.linear import Unsupported
from sartor.models.loading import quiet
from sartor.models.path import WISH, FastPath, Path, Wish, reuse

RECOMPUTED = "activations are computed again in the backward pass"
# Rows by which a refused fast path is timed
_TIMED_ROWS = 8


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

    def plain(self) -> Path:
        """See `Path`."""
        return General(self.model, self.device, "")

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """See `Path`."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


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

    def plain(self) -> None:
        """See `Path`."""

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """See `Path`."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def choose(model: Any, rows: Sequence[Encoded], device: torch.device, wish: Wish = WISH) -> Path:
    """Return the fastest path that is right for `model`, measured on a few of `rows`. The model should be in eval mode.

    A path that is not the fast one says in its `reason` why, and what that costs where both can be timed.
    """
    fast: Fast | None = None
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
        path = _general(model, rows, device, wish, f"not the fast path: {error}")
        if wish.fast:
            path.reason += _cost(path, fast, rows, device)
        return path
    reason = f"{fast.family_name} block by hand, {why}"
    if wish.recompute:
        reason += f"; {RECOMPUTED}"
    return FastPath(fast, device, reason, wish.share, reuse(fast, rows, device, wish), difference)


@torch.no_grad()
def _cost(path: General | OneRow, fast: Fast | None, rows: Sequence[Encoded], device: torch.device) -> str:
    """Say what the slower path costs: how long a few rows take on it, over how long they take on the fast one."""
    few = [row for row in rows if row.supervised_tokens][:_TIMED_ROWS]
    if fast is None or not few:
        return "; what that costs cannot be timed here (docs/speed.md has the ratio on the starter)"
    try:
        slow_s = _seconds(lambda: path.losses(few))
        fast_s = _seconds(lambda: fast.losses(batches.pack(few, device)))
    except Exception:  # a fast path that fails has no time
        return "; what that costs could not be measured, since the fast path fails"
    return f"; {len(few)} rows take {slow_s / fast_s:.1f} times as long as on the fast path"


def _seconds(work: Callable[[], object]) -> float:
    """Return the shortest of three runs' wall time, s, each waiting for the device."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


def _general(model: Any, rows: Sequence[Encoded], device: torch.device, wish: Wish, reason: str) -> General | OneRow:
    if count := rounded_twice(model):
        reason += f"; {count} adapted layers are of a kind that rounds twice in 16 bits (docs/speed.md)"
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
