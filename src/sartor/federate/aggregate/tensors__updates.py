"""Part of federate.aggregate.tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sartor.core.errors import ConfigError, InputError
from sartor.models.lora_tensors import _REMEDY, Array, Tensors


@dataclass(frozen=True)
class Update:
    """What one client sends. examples: how many rows it learnt from, its weight in the mean, at least 1."""

    client: str
    tensors: Tensors
    examples: int = 1


def checked(update: Update, like: Tensors) -> Update:
    """The update, if it has just the tensors of `like`, in their shapes, finite. Raises InputError naming client and tensor."""
    who = f"client {update.client!r}"
    if update.examples < 1:
        raise InputError(f"{who} says that it learnt from {update.examples} examples; at least 1 is due", _REMEDY)
    if strange := sorted(set(update.tensors) ^ set(like)):
        what = "lacks" if strange[0] in like else "sends, unasked,"
        raise InputError(f"{who} {what} {strange[0]} and {len(strange) - 1} more", _REMEDY)
    for name, tensor in update.tensors.items():
        if tensor.shape != like[name].shape:
            raise InputError(f"{who} sends {name} of shape {tensor.shape}; the round has {like[name].shape}", _REMEDY)
        if not np.isfinite(tensor).all():
            raise InputError(f"{who} sends values that are not finite, in {name}", _REMEDY)
    return update


def cohort(updates: Sequence[Update], like: Tensors) -> None:
    """Raise InputError unless the updates are a round's: some, each as it should be, no client twice."""
    if not updates:
        raise ConfigError("a round without one update has no mean", "wait for clients, or give the round up")
    for update in updates:
        checked(update, like)
    if len({update.client for update in updates}) < len(updates):
        names = [update.client for update in updates]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"client {twice!r} sent two updates for one round", "take the first of them")


def mean(updates: Sequence[Update]) -> dict[str, Array]:
    """The mean of the tensors, weighted by examples; summed in fp64, in the updates' dtype."""
    total = sum(update.examples for update in updates)
    return {
        name: np.sum([(one.examples / total) * one.tensors[name].astype(np.float64) for one in updates], axis=0).astype(
            tensor.dtype
        )
        for name, tensor in updates[0].tensors.items()
    }
