"""Norms, cosines and distances between updates, summed tensor by tensor: no second copy of all updates is held."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from sartor.federate.aggregate.tensors__updates import Update
from sartor.models.lora_tensors import Array, Tensors

Numbers = NDArray[np.float64]


def stacked(updates: Sequence[Update], name: str) -> Numbers:
    """One tensor of all updates, (clients, values)."""
    return np.stack([one.tensors[name].ravel() for one in updates]).astype(np.float64)


def by_value(updates: Sequence[Update], pooled: Callable[[Numbers], Numbers]) -> dict[str, Array]:
    """Tensors whose values are a function of the clients' values at the same place: `pooled` (clients, values) -> (values,)."""
    like = updates[0].tensors
    return {name: pooled(stacked(updates, name)).reshape(value.shape).astype(value.dtype) for name, value in like.items()}


def products(updates: Sequence[Update]) -> Numbers:
    """Inner products of the updates as vectors, (clients, clients)."""
    found = np.zeros((len(updates), len(updates)))
    for name in updates[0].tensors:
        values = stacked(updates, name)
        found += values @ values.T
    return found


def norms(updates: Sequence[Update]) -> Numbers:
    """Euclidean norms of the updates, (clients,)."""
    return np.sqrt(np.diag(products(updates)))


def squared_distances(updates: Sequence[Update]) -> Numbers:
    """(clients, clients)."""
    inner = products(updates)
    squares = np.diag(inner)
    return np.maximum(squares[:, None] + squares[None, :] - 2 * inner, 0)


def cosines(updates: Sequence[Update], to: Tensors) -> Numbers:
    """Cosine of each update to `to`, -1..1; 0 where one of them is zero."""
    with_it = products([*updates, Update("", to)])
    lengths = np.sqrt(np.diag(with_it))
    scale = lengths[:-1] * lengths[-1]
    return np.divide(with_it[:-1, -1], scale, out=np.zeros(len(updates)), where=scale > 0)
