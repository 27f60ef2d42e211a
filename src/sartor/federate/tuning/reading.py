"""What a base says of single rows and tokens under an adapter: what attacks on it start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sartor.models import packing
from sartor.models.lora_tensors import Array, Tensors
from sartor.models.losses.loss_backend import Wish
from sartor.models.packing import Encoded
from sartor.tune.shared_base import Resident

# tokens that are looked at together
_AT_ONCE = 4_096


@torch.no_grad()
def row_losses(resident: Resident, shared: Tensors, rows: Sequence[Encoded]) -> list[float]:
    """Mean nats per supervised token of each row under an adapter, in the rows' order."""
    resident.put(shared)
    resident.model.eval()
    path, found = resident.path(resident.model, rows, Wish()), list[float]()
    asked = resident.recipe.compute.micro_batch_tokens
    for micro in packing.micro_batches(rows, asked if isinstance(asked, int) else 1, share=False) if rows else []:
        losses, _ = path.losses(micro)
        parts = losses.float().split([row.supervised_tokens for row in micro])
        found += [float(part.mean()) for part in parts]
    return found


def gradient(resident: Resident, shared: Tensors, row: Encoded, name: str) -> Array:
    """The gradient of one row's loss in the factor `name`, which a client that steps along gradients would send."""
    resident.put(shared)
    resident.hold(lambda other: other == name)
    path = resident.path(resident.model, [row], Wish())
    losses, _ = path.losses([row])
    losses.mean().backward()  # type: ignore[no-untyped-call]
    factor = resident.factors[name]
    found: Array = (factor.grad if factor.grad is not None else torch.zeros_like(factor)).detach().float().cpu().numpy()
    factor.grad = None
    return found


class _Read(Exception):
    """The module's input was read; the rest of the pass is not wanted."""


def inputs_of(resident: Resident, module: str) -> NDArray[np.float32]:
    """(V, in): what a module reads where each token of the vocabulary stands alone. Nothing behind it is computed.

    module: as PEFT's files name it, without the factor.
    """
    count = int(resident.model.get_input_embeddings().weight.shape[0])
    with _watched(resident.model.get_submodule(module)) as read, torch.no_grad():
        for low in range(0, count, _AT_ONCE):
            ids = torch.arange(low, min(low + _AT_ONCE, count), device=resident.device)[:, None]
            try:
                resident.model(input_ids=ids, use_cache=False)
            except _Read:
                continue
    return np.concatenate(read)


@contextmanager
def _watched(module: Any) -> Iterator[list[NDArray[np.float32]]]:
    """The inputs (N, in) of a module, each of which ends the pass."""
    read: list[NDArray[np.float32]] = []

    def look(_: Any, given: tuple[torch.Tensor, ...]) -> None:
        read.append(given[0].reshape(-1, given[0].shape[-1]).float().cpu().numpy())
        raise _Read

    handle = module.register_forward_pre_hook(look)
    try:
        yield read
    finally:
        handle.remove()
