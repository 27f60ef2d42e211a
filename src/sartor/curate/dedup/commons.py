"""Which shingles stand in so many rows that they say nothing of any one of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sartor.curate.dedup.arrays import I64, U8, U32

LEVELS = 31
_TABLE_BITS = 22
CHUNK = 1 << 21
_COUNTED = 1 << 23


def spans(offsets: I64, rows: I64, most: int = CHUNK) -> Iterator[I64]:
    """Runs of `rows` whose sets hold about `most` shingles together."""
    ends = np.cumsum(offsets[rows + 1] - offsets[rows])
    first = 0
    while first < len(rows):
        base = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, base + most, side="right")))
        yield rows[first:last]
        first = last


def gathered(offsets: I64, rows: I64) -> tuple[I64 | slice, I64]:
    """Places of the shingles of `rows`, row after row (a slice where they stand so), and the sizes of their sets."""
    sizes = offsets[rows + 1] - offsets[rows]
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (len(rows) == 1 or (np.diff(rows) == 1).all()):
        return slice(int(offsets[rows[0]]), int(offsets[rows[-1] + 1])), sizes
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(offsets[rows] - (ends - sizes), sizes), sizes


@dataclass(frozen=True)
class Commons:
    """(C,) sorted shingles that are common, and the `level` of each: 1 at the limit, 2 more per doubling, at most LEVELS."""

    shingles: U32
    level: U8


def common_shingles(shingles: U32, offsets: I64, rows: I64, limit: int) -> Commons:
    """The shingles that stand in more than `limit` of `rows`; the count is exact, the memory bounded.

    A table counts the upper bits of the hashes first; only shingles that fall on a count over the limit are counted one by one.
    """
    if len(rows) <= limit:
        return Commons(np.empty(0, np.uint32), np.empty(0, np.uint8))
    # the table counts rows that are not asked about too: that makes more suspicious, and no suspicion false
    shift = np.uint32(32 - _TABLE_BITS)
    table = np.zeros(1 << _TABLE_BITS, np.int64)
    for first in range(0, len(shingles), _COUNTED):
        table += np.bincount(shingles[first : first + _COUNTED] >> shift, minlength=len(table))
    suspicious = table > limit
    asked = np.zeros(len(offsets) - 1, bool)
    asked[rows] = True
    values, counts = np.empty(0, np.uint32), np.empty(0, np.int64)
    for first in range(0, len(shingles), CHUNK):
        chunk = np.asarray(shingles[first : first + CHUNK])
        places = np.flatnonzero(suspicious[chunk >> shift])
        if len(rows) < len(asked):
            places = places[asked[np.searchsorted(offsets, places + first, side="right") - 1]]
        more, times = np.unique(chunk[places], return_counts=True)
        values, inverse = np.unique(np.concatenate([values, more]), return_inverse=True)
        counts = np.bincount(inverse.ravel(), np.concatenate([counts, times]), len(values)).astype(np.int64)
    over = counts > limit
    level = 1 + np.floor(2 * np.log2(counts[over] / limit))
    return Commons(values[over], np.minimum(level, LEVELS).astype(np.uint8))


def levels(shingles: U32, common: Commons) -> U8:
    """(S,) the level of each shingle, 0 for those that are not common."""
    found = np.zeros(len(shingles), np.uint8)
    if not len(common.shingles):
        return found
    shift = np.uint32(32 - _TABLE_BITS)
    perhaps = np.zeros(1 << _TABLE_BITS, bool)
    perhaps[common.shingles >> shift] = True
    for first in range(0, len(shingles), CHUNK):
        chunk = np.asarray(shingles[first : first + CHUNK])
        maybe = np.flatnonzero(perhaps[chunk >> shift])
        place = np.minimum(np.searchsorted(common.shingles, chunk[maybe]), len(common.shingles) - 1)
        found[first + maybe] = np.where(common.shingles[place] == chunk[maybe], common.level[place], 0)
    return found
