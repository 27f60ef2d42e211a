"""Nearest rows by their vectors: exact up to a size, then usearch's graph (HNSW, Malkov and Yashunin 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import need

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
EXACT_ROWS = 50_000
_CELLS = 32_000_000  # of a block of likenesses


def nearest(vectors: F32, queries: I64, most: int) -> Iterator[tuple[I64, I64, F32]]:
    """(rows, neighbours, likeness) of blocks of `queries` (row numbers): (B,), (B, most) and (B, most), nearest first.

    The row itself is not among its neighbours. Likeness is the cosine, -1 and the row itself where there are no more.
    """
    most = min(most, len(vectors) - 1)
    if most < 1:
        return
    search = _exact if len(vectors) <= EXACT_ROWS else _graph(vectors)
    block = max(1, _CELLS // len(vectors))
    for start in range(0, len(queries), block):
        rows = queries[start : start + block]
        found, likeness = search(vectors, rows, most)
        yield rows, found, likeness


class NearPairs:
    """(a, b, cosine) with a < b for each row and its `most` nearest at or above a threshold, each pair once, in order of rows.

    A row of zeros (an empty text) is nobody's neighbour. After a round, `crowded` counts rows whose `most` nearest were all
    at or above the threshold: there may be more of them that were not looked at.
    """

    def __init__(self, vectors: F32, threshold: float, most: int) -> None:
        self._vectors, self._threshold, self._most = vectors, threshold, most
        self.crowded = 0

    def __iter__(self) -> Iterator[tuple[int, int, float]]:
        self.crowded = 0
        seen: set[int] = set()
        count = len(self._vectors)
        spoken = np.flatnonzero(np.abs(self._vectors).sum(1) > 0)
        for rows, found, likeness in nearest(self._vectors, spoken, self._most):
            near = likeness >= self._threshold
            self.crowded += int(near.all(1).sum()) if near.shape[1] == self._most else 0
            where, place = np.nonzero(near)
            columns = (rows[where], found[where, place], np.minimum(likeness[where, place], 1))
            for row, other, score in zip(*(column.tolist() for column in columns), strict=True):
                a, b = min(row, other), max(row, other)
                if a * count + b not in seen:
                    seen.add(a * count + b)
                    yield a, b, score


def _exact(vectors: F32, rows: I64, most: int) -> tuple[I64, F32]:
    likeness = vectors[rows] @ vectors.T
    likeness[np.arange(len(rows)), rows] = -2
    found = np.argpartition(-likeness, most - 1, axis=1)[:, :most] if most < len(vectors) - 1 else _all_but(len(vectors), rows)
    scores = np.take_along_axis(likeness, found, axis=1)
    # of equally near ones the first row comes first, so that the order does not depend on the library
    order = np.lexsort((found, -scores), axis=1)
    return np.take_along_axis(found, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _all_but(count: int, rows: I64) -> I64:
    return np.array([[other for other in range(count) if other != row] for row in rows.tolist()], np.int64)


def _graph(vectors: F32) -> Any:
    try:
        from usearch.index import Index
    except ImportError:
        raise need("usearch") from None
    index = Index(ndim=vectors.shape[1], metric="cos", dtype="f16", connectivity=16, expansion_add=64, expansion_search=64)
    # one thread: with more the graph, and so the result, would depend on which was faster
    index.add(np.arange(len(vectors)), vectors, threads=1)

    def search(_: F32, rows: I64, most: int) -> tuple[I64, F32]:
        matches = index.search(vectors[rows], most + 1)
        found = np.array(matches.keys, np.int64).reshape(len(rows), -1)
        # the graph stores halves; the cosines are taken from the vectors themselves
        scores = np.einsum("bd,bkd->bk", vectors[rows], vectors[found]).astype(np.float32)
        scores[found == rows[:, None]] = -2
        order = np.lexsort((found, -scores), axis=1)[:, :most]
        return np.take_along_axis(found, order, axis=1), np.take_along_axis(scores, order, axis=1)

    return search
