"""Connected components over pairs, and the order of rows, in array operations."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.curate.dedup.arrays import I64


def components(count: int, a: I64, b: I64, labels: I64 | None = None) -> I64:
    """(count,) the least row of each row's component, joining `labels` (an earlier result) by the pairs (a, b).

    Hooking and pointer jumping (Shiloach and Vishkin 1982): rounds grow with the logarithm of the longest chain.
    """
    labels = np.arange(count) if labels is None else labels
    if not len(a):
        return labels
    parent = labels.copy()
    while True:
        left, right = parent[a], parent[b]
        apart = left != right
        if not apart.any():
            return parent
        a, b = a[apart], b[apart]
        low, high = np.minimum(left[apart], right[apart]), np.maximum(left[apart], right[apart])
        np.minimum.at(parent, high, low)
        while True:
            up = parent[parent]
            if np.array_equal(up, parent):
                break
            parent = up


def places_of(rank: NDArray[Any], labels: I64 | None = None) -> I64:
    """(N,) the place of each row by rank, the highest first, of equals the first read; with `labels`, the best of its class."""
    order = np.lexsort((np.arange(len(rank)), -np.asarray(rank, np.float64)))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    if labels is None:
        return place
    best = np.full(len(place), len(place), np.int64)
    np.minimum.at(best, labels, place)
    return best[labels]
