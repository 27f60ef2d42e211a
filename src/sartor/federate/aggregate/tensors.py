"""An adapter's tensors by the names that PEFT's files have, and what one client sends of them.

A linear module has two: `NAME.lora_A.weight` (R, in) and `NAME.lora_B.weight` (out, R); it computes scale * B A beside the
frozen weight. Any other tensor is one that is trained whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import ConfigError, InputError

Array = NDArray[np.floating]
Tensors = Mapping[str, Array]
A, B = ".lora_A.weight", ".lora_B.weight"
_REMEDY = "leave this client out of the round, and look at what it runs"


@dataclass(frozen=True)
class Update:
    """What one client sends. examples: how many rows it learnt from, its weight in the mean, at least 1."""

    client: str
    tensors: Tensors
    examples: int = 1


@dataclass(frozen=True)
class Pair:
    """The factors of one module: A (R, in), B (out, R)."""

    a: Array
    b: Array

    @property
    def product(self) -> NDArray[np.float64]:
        """B A (out, in), without the scale."""
        return self.b.astype(np.float64) @ self.a.astype(np.float64)


def modules(tensors: Iterable[str]) -> list[str]:
    """Names of the modules that have factors, sorted. Raises InputError for one half alone."""
    names = set(tensors)
    with_a, with_b = ({name.removesuffix(half) for name in names if name.endswith(half)} for half in (A, B))
    if alone := sorted(with_a ^ with_b):
        raise InputError(f"{alone[0]} has one of its two factors", "send both, as the adapter's file has them")
    return sorted(with_a)


def pair(tensors: Tensors, module: str) -> Pair:
    """The factors of a module."""
    return Pair(tensors[module + A], tensors[module + B])


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


def plus(tensors: Tensors, changes: Tensors, sign: float = 1.0) -> dict[str, Array]:
    """`tensors` with the changes added where there are some."""
    return {
        name: (value.astype(np.float64) + sign * changes[name]).astype(value.dtype) if name in changes else value
        for name, value in tensors.items()
    }


def norm(tensors: Tensors) -> float:
    """The Euclidean norm of all tensors as one vector."""
    return float(np.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in tensors.values())))


def flat(tensors: Tensors) -> NDArray[np.float64]:
    """All values as one vector (P,), in the order of the names."""
    return np.concatenate([tensors[name].astype(np.float64).ravel() for name in sorted(tensors)])


def unflat(vector: NDArray[np.float64], like: Tensors) -> dict[str, Array]:
    """The tensors of a vector that `flat` made, in the shapes and dtypes of `like`."""
    names = sorted(like)
    parts = np.split(vector, np.cumsum([like[name].size for name in names])[:-1])
    return {name: part.reshape(like[name].shape).astype(like[name].dtype) for name, part in zip(names, parts, strict=True)}
