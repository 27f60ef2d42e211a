"""Connected components over pairs, in array operations."""

from __future__ import annotations

import numpy as np

from sartor.curate.dedup.shingles import I64


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
