"""MinHash signatures by rensa, folded into the keys of 50 bands."""

from __future__ import annotations

import itertools

import numpy as np
import rensa

from sartor.core.processes import Means
from sartor.curate.dedup.arrays import I64, U32, mixed, offsets_of
from sartor.curate.dedup.commons import gathered, spans
from sartor.curate.dedup.sets import Sets

BANDS, BAND_ROWS = 50, 4
PERMUTATIONS = BANDS * BAND_ROWS
SEED = 4
_ROWS = 4096  # of one task
_LISTED = 512  # rensa's matrix leaves as lists of Python ints: so many rows of them stay in a core's cache
_FOLD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)


def band_keys(sets: Sets, rows: I64, *, whole: bool, means: Means) -> U32:
    """(BANDS, n) 32-bit keys of the n `rows`, by their own shingles or by all of them; none of the sets may be empty."""
    keys = np.empty((BANDS, len(rows)), np.uint32)
    parts = (some for part in spans(sets.offsets, rows) for some in np.split(part, range(_ROWS, len(part), _ROWS)))
    done = 0
    for some in means.spread(_keys, (_tokens(sets, part, whole) for part in parts)):
        keys[:, done : done + len(some)] = some.T
        done += len(some)
        means.show("signatures", done, len(rows))
    return keys


def _tokens(sets: Sets, rows: I64, whole: bool) -> tuple[U32, I64]:
    """The shingles of `rows`, and the offsets of the rows among them."""
    places, sizes = gathered(sets.offsets, rows)
    values = sets.shingles[places]
    if not whole:
        own = sets.level[places] == 0
        values, sizes = values[own], sets.own_sizes[rows]
    return values, offsets_of(sizes)


def _keys(tokens: U32, offsets: I64) -> U32:
    """(n, BANDS) keys of n sets."""
    cuts = [*range(0, len(offsets) - 1, _LISTED), len(offsets) - 1]
    some = [_few_keys(tokens[offsets[a] : offsets[b]], offsets[a : b + 1] - offsets[a]) for a, b in itertools.pairwise(cuts)]
    return np.concatenate(some)


def _few_keys(tokens: U32, offsets: I64) -> U32:
    count = len(offsets) - 1
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        mixed(tokens.astype(np.uint64)), offsets.astype(np.uint64), PERMUTATIONS, SEED
    )
    flat = np.fromiter(itertools.chain.from_iterable(matrix.to_rows()), np.uint32, count * PERMUTATIONS)
    folded = flat.reshape(count, BANDS, BAND_ROWS).astype(np.uint64) @ _FOLD
    return (mixed(folded) >> np.uint64(32)).astype(np.uint32)
