"""An adapter's tensors by the names that PEFT's files have, and what one client sends of them.

A linear module has two: `NAME.lora_A.weight` (R, in) and `NAME.lora_B.weight` (out, R); it computes scale * B A beside the
frozen weight. Any other tensor is one that is trained whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import InputError
from sartor.federate.aggregate.tensors__updates import Update, checked, cohort, mean  # noqa: F401

Array = NDArray[np.floating]
Tensors = Mapping[str, Array]
A, B = ".lora_A.weight", ".lora_B.weight"
_REMEDY = "leave this client out of the round, and look at what it runs"


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
