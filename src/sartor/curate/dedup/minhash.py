"""MinHash signatures by rensa, folded into the keys of 50 bands."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import rensa

from sartor.curate.dedup.commons import gathered, spans
from sartor.curate.dedup.shingles import I64, U32, U64, mixed, offsets_of
from sartor.curate.dedup.verify import Sets

BANDS, BAND_ROWS = 50, 4
PERMUTATIONS = BANDS * BAND_ROWS
SEED = 4
_ROWS = 4096  # rensa's matrix leaves as Python lists: few rows at a time bound the memory
_FOLD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)


def band_keys(sets: Sets, rows: I64, *, whole: bool, show: Callable[[str, int, int], None]) -> U32:
    """(BANDS, n) 32-bit keys of the n `rows`, by their own shingles or by all of them; none of the sets may be empty."""
    keys = np.empty((BANDS, len(rows)), np.uint32)
    done = 0
    for part in spans(sets.offsets, rows):
        for first in range(0, len(part), _ROWS):
            some = part[first : first + _ROWS]
            keys[:, done : done + len(some)] = _keys(*_tokens(sets, some, whole)).T
            done += len(some)
        show("signatures", done, len(rows))
    return keys


def _tokens(sets: Sets, rows: I64, whole: bool) -> tuple[U64, I64]:
    """64-bit hashes of the shingles of `rows`, and the offsets of the rows among them."""
    places, sizes = gathered(sets.offsets, rows)
    values = sets.shingles[places]
    if not whole:
        own = ~sets.common[places]
        values, sizes = values[own], sets.own_sizes[rows]
    return mixed(values.astype(np.uint64)), offsets_of(sizes)


def _keys(tokens: U64, offsets: I64) -> U32:
    count = len(offsets) - 1
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(tokens, offsets.astype(np.uint64), PERMUTATIONS, SEED)
    flat = np.fromiter(chain.from_iterable(matrix.to_rows()), np.uint32, count * PERMUTATIONS)
    folded = (flat.reshape(count, BANDS, BAND_ROWS).astype(np.uint64) * _FOLD).sum(axis=2, dtype=np.uint64)
    return (mixed(folded) >> np.uint64(32)).astype(np.uint32)
