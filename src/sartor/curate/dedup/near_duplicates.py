"""MinHash candidates and their verification.

1. Rows of equal digest count as one row (`exact`).
2. Shingles in more than max(100, 0.5 %) of the rows are *common* (`shingles.py`): boilerplate, templates, set phrases.
3. MinHash signatures (Broder 1997) are computed from a row's own shingles, in 50 bands of 4. A pair becomes a
   candidate with probability 1 - (1 - J^4)^50: a pair with Jaccard 0.7 is missed once in a million, with 0.5 four
   times in a hundred. Rows with a large common part also get a signature of the whole set, since many near-copies of
   one row make each other's shingles common.
4. In each band, rows that share a key are candidates: each with its next NEIGHBOURS rows and with the first of its
   bucket. The work is therefore linear, however large a bucket is.
5. Every candidate is verified on the sets themselves (`pair_scoring.py`). At the end, rows of a large cluster that
   were not compared with its head are compared with it.

Odd sketches (Mitzenmacher, Pagh, Pham 2014): a bit is the parity of the elements that hash to it. The number of bits
in which two sketches differ is at most the number of elements in only one of the sets, and about equal to it while
that is small. Two sketches of 256 bits a row, one of its common text and one of its own shingles, separate most pairs
of rows behind one boilerplate without reading their sets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import rensa
from numpy.typing import NDArray

from sartor.core.processes import ALONE, Executor
from sartor.curate.dedup.clusters import components, rank_positions
from sartor.curate.dedup.pair_scoring import DuplicateRules, ScoredPairs, measure
from sartor.curate.dedup.shingles import (
    I64,
    U8,
    U32,
    U64,
    Mask,
    Sets,
    common_shingles,
    levels,
    mixed,
    offsets_of,
    shingle_positions,
    spans,
)

BANDS, BAND_ROWS = 50, 4
PERMUTATIONS = BANDS * BAND_ROWS
SEED = 4
_ROWS = 4096  # rows of one task
_LISTED = 512  # rows of one call: rensa returns lists of Python ints, and these still fit in a core's cache
_FOLD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)


def band_keys(sets: Sets, rows: I64, *, whole: bool, executor: Executor) -> U32:
    """Return (BANDS, n) 32-bit band keys of n rows.

    rows: (n,) row numbers; none of their sets may be empty.
    whole: use the whole sets instead of the rows' own shingles.
    """
    keys = np.empty((BANDS, len(rows)), np.uint32)

    def tasks() -> Iterator[tuple[U32, I64]]:
        for span in spans(sets.offsets, rows):
            for block in np.split(span, range(_ROWS, len(span), _ROWS)):
                yield _tokens(sets, block, whole)

    done = 0
    for block_keys in executor.spread(_minhash_keys, tasks()):
        keys[:, done : done + len(block_keys)] = block_keys.T
        done += len(block_keys)
        executor.show("signatures", done, len(rows))
    return keys


def _tokens(sets: Sets, rows: I64, whole: bool) -> tuple[U32, I64]:
    """Return (T,) shingles of the n rows, and (n + 1,) offsets of the rows among them."""
    positions, sizes = shingle_positions(sets.offsets, rows)
    values = sets.shingles[positions]
    if not whole:
        is_own = sets.level[positions] == 0
        values, sizes = values[is_own], sets.own_sizes[rows]
    return values, offsets_of(sizes)


def _minhash_keys(tokens: U32, offsets: I64) -> U32:
    """Return (n, BANDS) band keys of n sets. tokens: (T,). offsets: (n + 1,)."""
    cuts = [*range(0, len(offsets) - 1, _LISTED), len(offsets) - 1]
    keys = [
        _few_keys(tokens[offsets[a] : offsets[b]], offsets[a : b + 1] - offsets[a])
        for a, b in itertools.pairwise(cuts)
    ]
    return np.concatenate(keys)


def _few_keys(tokens: U32, offsets: I64) -> U32:
    count = len(offsets) - 1
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        mixed(tokens.astype(np.uint64)), offsets.astype(np.uint64), PERMUTATIONS, SEED
    )
    flat = np.fromiter(itertools.chain.from_iterable(matrix.to_rows()), np.uint32, count * PERMUTATIONS)
    # key of a band = top 32 bits of mixed(sum_r h_r c_r mod 2^64), over its BAND_ROWS minima h_r
    folded = flat.reshape(count, BANDS, BAND_ROWS).astype(np.uint64) @ _FOLD
    return (mixed(folded) >> np.uint64(32)).astype(np.uint32)


_BITS = 256
# Half of pair_scoring.DISPLACED: 256 bits saturate before the sets do, and a pair that passes is verified anyway.
_DISPLACED = 0.12


@dataclass(frozen=True)
class BitSketch:
    """Odd sketches of n rows: (n, 4) words of 64 bits each.

    text_bits: of a row's common text. own_bits: of its own shingles.
    """

    text_bits: U64
    own_bits: U64

    @staticmethod
    def of(sets: Sets, rows: I64) -> BitSketch:
        """Compute the sketches of the n rows. rows: (n,) row numbers."""
        text_bits, own_bits = [], []
        for part in spans(sets.offsets, rows):
            for block in np.split(part, range(_ROWS, len(part), _ROWS)):
                positions, sizes = shingle_positions(sets.offsets, block)
                row = np.repeat(np.arange(len(block)), sizes)
                level = sets.level[positions]
                bits = row * _BITS + (mixed(sets.shingles[positions].astype(np.uint64)) % np.uint64(_BITS)).astype(
                    np.int64
                )
                is_text = (level > 0) & (level >= sets.common_cut[block][row])
                text_bits.append(_folded(bits[is_text], len(block)))
                own_bits.append(_folded(bits[level == 0], len(block)))
        return BitSketch(np.concatenate(text_bits), np.concatenate(own_bits))

    def perhaps_edited(self, a: I64, b: I64) -> Mask:
        """Return (P,) True for pairs that may satisfy the rule of displaced shingles in `pair_scoring.py`.

        a, b: (P,) positions among the n rows.
        """
        displaced = np.bitwise_count(self.text_bits[a] ^ self.text_bits[b]).sum(axis=1)
        own_difference = np.bitwise_count(self.own_bits[a] ^ self.own_bits[b]).sum(axis=1)
        return displaced >= _DISPLACED * own_difference  # type: ignore[no-any-return]


def _folded(bits: I64, count: int) -> U64:
    # bit j of a row = (number of its elements that hash to j) mod 2; (count, 256) bits -> (count, 4) words
    parity = np.bincount(bits, minlength=count * _BITS).astype(np.uint8) & 1
    return np.packbits(parity.reshape(count, _BITS), axis=1).view(np.uint64)


NEIGHBOURS = 4
# Least fraction of common shingles from which a row's whole set gets a signature too.
COMMON_SHARE = 0.3
_SEEN_BITS = 20
_COMPLETIONS = 8


@dataclass(frozen=True)
class NearDuplicatePairs:
    """Verified pairs, and counts of the run."""

    pairs: ScoredPairs
    common: int  # shingles that were ignored
    empty: int  # rows without words, which are duplicates of no row
    candidates: int  # pairs that were measured


def exact(digests: U8, empty: Mask) -> I64:
    """Return (N,) the first row of equal content for every row; an empty row is its own.

    digests: (N, 16). empty: (N,) True for rows without words.
    """
    high, low = np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable: among equal rows the first read comes first
    is_first = np.ones(len(order), bool)
    is_first[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    first_rows = np.empty(len(order), np.int64)
    first_rows[order] = order[is_first][np.cumsum(is_first) - 1]
    return np.where(empty, np.arange(len(first_rows)), first_rows)


def near_duplicates(
    shingles: U32,
    offsets: I64,
    digests: U8,
    rules: DuplicateRules,
    rank: NDArray[Any] | None = None,
    executor: Executor = ALONE,
) -> NearDuplicatePairs:
    """Return the verified pairs of N rows down to `rules.floor`, each (a, b) with a < b once.

    Exact duplicates are included.
    shingles: (S,), offsets: (N + 1,), digests: (N, 16), as in `Sketches`; memory-mapped arrays are allowed.
    rank: (N,) the rank that `clusters.resolve_clusters` will get. Rows of large clusters are compared with the row
    that it puts first. The default is the size of the set.
    executor: progress and processes.
    """
    sizes = np.diff(offsets)
    empty = sizes == 0
    first = exact(digests, empty)
    rows = np.flatnonzero((first == np.arange(len(first))) & ~empty)
    repeated_rows = np.flatnonzero(first != np.arange(len(first)))
    exact_pairs = ScoredPairs.of_exact(first[repeated_rows], repeated_rows)
    if len(rows) < 2:
        return NearDuplicatePairs(exact_pairs, 0, int(empty.sum()), 0)
    common = common_shingles(shingles, offsets, rows, rules.common_limit(len(rows)))
    sets = Sets(shingles, offsets, levels(shingles, common))
    search = _Search(
        sets,
        rules,
        checked=np.zeros(1 << _SEEN_BITS, np.uint64),
        labels=np.arange(len(sizes)),
        executor=executor,
    )
    own_rows = rows[sets.own_sizes[rows] > 0]
    _search_bands(search, own_rows, "own", "comparing")
    if len(common.shingles):
        share = 1 - sets.own_sizes[rows] / sizes[rows]
        _search_bands(search, rows[share >= COMMON_SHARE], "whole", "comparing what is common")
    _complete(search, rank_positions(sizes if rank is None else rank, first))
    return NearDuplicatePairs(
        ScoredPairs.joined([exact_pairs, *search.verified]).unique(),
        len(common.shingles),
        int(empty.sum()),
        search.candidates,
    )


@dataclass
class _Search:
    """State of a search: verified pairs, and the connected components that they form."""

    sets: Sets
    rules: DuplicateRules
    checked: U64  # (2^_SEEN_BITS,) bounded cache of measured pairs, by hash; a miss only repeats work
    labels: I64
    executor: Executor
    verified: list[ScoredPairs] = field(default_factory=list)
    candidates: int = 0

    def verify(self, a: I64, b: I64) -> None:
        """Measure pairs that were not measured before; keep those that reach the floor or are contained.

        a, b: (P,) row numbers, in any order.
        """
        keys = np.unique((np.minimum(a, b).astype(np.uint64) << np.uint64(32)) | np.maximum(a, b).astype(np.uint64))
        slots = ((keys * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - _SEEN_BITS)).astype(np.int64)
        is_new = self.checked[slots] != keys
        keys = keys[is_new]
        self.checked[slots[is_new]] = keys
        self.candidates += len(keys)
        pairs = measure(
            self.sets,
            (keys >> np.uint64(32)).astype(np.int64),
            (keys & np.uint64(0xFFFFFFFF)).astype(np.int64),
            self.rules,
        )
        if len(pairs.a):
            self.verified.append(pairs)
            duplicates = pairs.judged(self.rules.threshold, self.rules.contained)
            self.labels = components(len(self.labels), duplicates.a, duplicates.b, self.labels)


def _search_bands(search: _Search, rows: I64, set_kind: str, stage: str) -> None:
    """Verify candidates among `rows` (n,) by the signatures of their own or whole sets, band by band."""
    if len(rows) < 2:
        return
    whole = set_kind == "whole"
    keys = band_keys(search.sets, rows, whole=whole, executor=search.executor)
    parity = BitSketch.of(search.sets, rows) if whole else None
    for band in range(BANDS):
        left, right, crowded = bucket_pairs(keys[band])
        a, b = rows[left], rows[right]
        joined = crowded & (search.labels[a] == search.labels[b])
        if parity is not None:
            joined |= ~parity.perhaps_edited(left, right)
        search.verify(a[~joined], b[~joined])
        search.executor.show(stage, band + 1, BANDS)


def bucket_pairs(keys: U32) -> tuple[I64, I64, Mask]:
    """Return P pairs of positions with equal keys: (P,) left, (P,) right, and (P,) whether the bucket is crowded.

    keys: (n,). Each position is paired with the next NEIGHBOURS of its bucket and with the first. A crowded bucket has
    more than NEIGHBOURS + 1 rows.
    """
    packed = (keys.astype(np.uint64) << np.uint64(32)) | np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    indices = (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)
    values = packed >> np.uint64(32)
    starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    sizes = np.diff(np.append(starts, len(values)))
    is_shared = sizes > 1
    starts, sizes = starts[is_shared], sizes[is_shared]
    sorted_index = np.arange(int(sizes.sum())) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    left_in_bucket = np.repeat(starts + sizes, sizes) - sorted_index - 1
    is_crowded = np.repeat(sizes > NEIGHBOURS + 1, sizes)
    lefts, rights, crowds = [], [], []
    for step in range(1, NEIGHBOURS + 1):
        has_neighbour = left_in_bucket >= step
        lefts.append(sorted_index[has_neighbour])
        rights.append(sorted_index[has_neighbour] + step)
        crowds.append(is_crowded[has_neighbour])
    heads = np.repeat(starts, sizes)
    is_far = sorted_index - heads > NEIGHBOURS
    lefts.append(heads[is_far])
    rights.append(sorted_index[is_far])
    crowds.append(is_crowded[is_far])
    return indices[np.concatenate(lefts)], indices[np.concatenate(rights)], np.concatenate(crowds)


def _complete(search: _Search, positions: I64) -> None:
    """Verify rows without an edge to the first-ranked row of their component against that row.

    Rows that do not match it are tried against the first-ranked among themselves, for up to _COMPLETIONS rounds.
    """
    duplicates = ScoredPairs.joined(search.verified).unique().judged(search.rules.threshold, search.rules.contained)
    open_rows = np.unique(np.concatenate([duplicates.a, duplicates.b]))
    for _ in range(_COMPLETIONS):
        # (N,) by label the open row of lowest position: the last row that is written stays, so positions descend
        heads = np.full(len(search.labels), -1, np.int64)
        by_position = open_rows[np.argsort(-positions[open_rows])]
        heads[search.labels[by_position]] = by_position
        a, b = heads[search.labels[open_rows]], open_rows
        linked = np.isin(_keys(a, b), _keys(duplicates.a, duplicates.b)) | (a == b)
        if linked.all():
            return
        verified_count = len(search.verified)
        search.verify(a[~linked], b[~linked])
        new_duplicates = [
            pairs.judged(search.rules.threshold, search.rules.contained) for pairs in search.verified[verified_count:]
        ]
        duplicates = ScoredPairs.joined([duplicates, *new_duplicates])
        linked = np.isin(_keys(a, b), _keys(duplicates.a, duplicates.b)) | (a == b)
        open_rows = open_rows[~linked]


def _keys(a: I64, b: I64) -> U64:
    return (np.minimum(a, b).astype(np.uint64) << np.uint64(32)) | np.maximum(a, b).astype(np.uint64)
