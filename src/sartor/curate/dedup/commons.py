"""Which shingles stand in so many rows that they say nothing of any one of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sartor.curate.dedup.shingles import I64, U32

_TABLE_BITS = 22
CHUNK = 1 << 21


def spans(offsets: I64, rows: I64, most: int = CHUNK) -> Iterator[I64]:
    """Runs of `rows` whose sets hold about `most` shingles together."""
    ends = np.cumsum(offsets[rows + 1] - offsets[rows])
    first = 0
    while first < len(rows):
        base = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, base + most, side="right")))
        yield rows[first:last]
        first = last


def gathered(offsets: I64, rows: I64) -> tuple[I64, I64]:
    """Places of the shingles of `rows`, row after row, and the sizes of their sets."""
    sizes = offsets[rows + 1] - offsets[rows]
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(offsets[rows] - (ends - sizes), sizes), sizes


def common_shingles(shingles: U32, offsets: I64, rows: I64, limit: int) -> U32:
    """Sorted shingles that stand in more than `limit` of `rows`; the count is exact, the memory bounded.

    A table counts the upper bits of the hashes first; only shingles that fall on a count over the limit are counted one by one.
    """
    if len(rows) <= limit:
        return np.empty(0, np.uint32)
    shift = np.uint32(32 - _TABLE_BITS)
    table = np.zeros(1 << _TABLE_BITS, np.uint32)
    for part in spans(offsets, rows):
        places, _ = gathered(offsets, part)
        table += np.bincount(shingles[places] >> shift, minlength=len(table)).astype(np.uint32)
    values, counts = np.empty(0, np.uint32), np.empty(0, np.int64)
    for part in spans(offsets, rows):
        places, _ = gathered(offsets, part)
        chunk = shingles[places]
        chunk = chunk[table[chunk >> shift] > limit]
        more, times = np.unique(chunk, return_counts=True)
        values, inverse = np.unique(np.concatenate([values, more]), return_inverse=True)
        counts = np.bincount(inverse.ravel(), np.concatenate([counts, times]), len(values)).astype(np.int64)
    return values[counts > limit]


def is_common(shingles: U32, common: U32) -> NDArray[np.bool_]:
    """(S,) whether each shingle is one of the sorted `common`."""
    flags = np.zeros(len(shingles), bool)
    if not len(common):
        return flags
    shift = np.uint32(32 - _TABLE_BITS)
    perhaps = np.zeros(1 << _TABLE_BITS, bool)
    perhaps[common >> shift] = True
    for first in range(0, len(shingles), CHUNK):
        chunk = np.asarray(shingles[first : first + CHUNK])
        maybe = np.flatnonzero(perhaps[chunk >> shift])
        found = common[np.minimum(np.searchsorted(common, chunk[maybe]), len(common) - 1)] == chunk[maybe]
        flags[first + maybe[found]] = True
    return flags
