"""MinHash candidates and their verification.

1. Rows of equal digest are one row from here on (`exact`).
2. Shingles that stand in more than max(100, 0.5 %) of the rows are *common* (`shingles.py`): boilerplate, templates,
   set phrases.
3. MinHash signatures (Broder 1997) of what is a row's own, 50 bands of 4 (a pair with Jaccard 0.7 is missed once in a
   million, with 0.5 four times in a hundred). Rows of which a good part is common also get a signature of the whole: many
   near-copies of one row make each other's shingles common.
4. Band by band, rows that share a key are candidates: each with its next NEIGHBOURS rows and with the first of its bucket, so
   that the work is linear however large a bucket is.
5. Every candidate is verified on the sets themselves (`pair_scoring.py`), and rows of a large cluster that were never
   held against its head are, at the end.

Odd sketches (Mitzenmacher, Pagh, Pham 2014): a bit is the parity of the elements that fall on it, so the bits in which two
sketches differ are at most the elements that one of two sets holds alone, and about as many while they are few. Two of 256
bits a row, one of its common text and one of what is its own, tell most pairs of rows behind one boilerplate apart without
touching their sets.
"""

from __future__ import annotations

import itertools
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
    gathered,
    levels,
    mixed,
    offsets_of,
    spans,
)

BANDS, BAND_ROWS = 50, 4
PERMUTATIONS = BANDS * BAND_ROWS
SEED = 4
_ROWS = 4096  # of one task
_LISTED = 512  # rensa's matrix leaves as lists of Python ints: so many rows of them stay in a core's cache
_FOLD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64)


def band_keys(sets: Sets, rows: I64, *, whole: bool, means: Executor) -> U32:
    """(BANDS, n) 32-bit keys of the n `rows`, by their own shingles or by all of them; none of the sets may be empty."""
    keys = np.empty((BANDS, len(rows)), np.uint32)
    parts = (some for part in spans(sets.offsets, rows) for some in np.split(part, range(_ROWS, len(part), _ROWS)))
    done = 0
    for some in means.spread(_minhash_keys, (_tokens(sets, part, whole) for part in parts)):
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


def _minhash_keys(tokens: U32, offsets: I64) -> U32:
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


_BITS = 256
# Half of verify.DISPLACED: 256 bits run full before the sets do, and a pair that goes on is verified anyway.
_DISPLACED = 0.12


@dataclass(frozen=True)
class BitSketch:
    """(n, 4) words of 64 bits for each of n rows: of its common text, and of its own shingles."""

    text: U64
    own: U64

    @staticmethod
    def of(sets: Sets, rows: I64) -> BitSketch:
        """The sketches of `rows`."""
        text, own = [], []
        for part in spans(sets.offsets, rows):
            for some in np.split(part, range(_ROWS, len(part), _ROWS)):
                places, sizes = gathered(sets.offsets, some)
                row = np.repeat(np.arange(len(some)), sizes)
                level = sets.level[places]
                bits = row * _BITS + (mixed(sets.shingles[places].astype(np.uint64)) % np.uint64(_BITS)).astype(np.int64)
                is_text = (level > 0) & (level >= sets.common_cut[some][row])
                text.append(_folded(bits[is_text], len(some)))
                own.append(_folded(bits[level == 0], len(some)))
        return BitSketch(np.concatenate(text), np.concatenate(own))

    def perhaps_edited(self, a: I64, b: I64) -> Mask:
        """Whether pairs of places may pass the rule of displaced shingles in `pair_scoring.py`."""
        displaced = np.bitwise_count(self.text[a] ^ self.text[b]).sum(axis=1)
        own = np.bitwise_count(self.own[a] ^ self.own[b]).sum(axis=1)
        return displaced >= _DISPLACED * own  # type: ignore[no-any-return]


def _folded(bits: I64, count: int) -> U64:
    odd = np.bincount(bits, minlength=count * _BITS).astype(np.uint8) & 1
    return np.packbits(odd.reshape(count, _BITS), axis=1).view(np.uint64)


NEIGHBOURS = 4
# From this common share on, a row's whole set gets a signature too.
COMMON_SHARE = 0.3
_SEEN_BITS = 20
_COMPLETIONS = 8


@dataclass(frozen=True)
class NearDuplicatePairs:
    """Verified pairs, and what the run noticed on its way."""

    pairs: ScoredPairs
    common: int  # shingles that were ignored
    empty: int  # rows without words, which are nobody's duplicates
    candidates: int  # pairs that were verified


def exact(digests: U8, empty: Mask) -> I64:
    """(N,) the first row of equal content for every row; a row without words is its own."""
    high, low = np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable: of equal rows the first read stands first
    new = np.ones(len(order), bool)
    new[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
    found = np.empty(len(order), np.int64)
    found[order] = order[new][np.cumsum(new) - 1]
    return np.where(empty, np.arange(len(found)), found)


def near_duplicates(
    shingles: U32, offsets: I64, digests: U8, rules: DuplicateRules, rank: NDArray[Any] | None = None, means: Executor = ALONE
) -> NearDuplicatePairs:
    """Verified pairs of N rows down to `rules.floor`, exact ones among them, each (a, b) with a < b once.

    `shingles`, `offsets`, `digests` as in `Sketches` (memory-mapped files will do). `rank` (N,) is the one that
    `clusters.resolve_clusters` will get; rows of large clusters are held against the row that it puts first (default:
    the largest set). `means`: progress, processes.
    """
    sizes = np.diff(offsets)
    empty = sizes == 0
    first = exact(digests, empty)
    rows = np.flatnonzero((first == np.arange(len(first))) & ~empty)
    twins = np.flatnonzero(first != np.arange(len(first)))
    found = ScoredPairs.of_exact(first[twins], twins)
    if len(rows) < 2:
        return NearDuplicatePairs(found, 0, int(empty.sum()), 0)
    common = common_shingles(shingles, offsets, rows, rules.common_limit(len(rows)))
    sets = Sets(shingles, offsets, levels(shingles, common))
    search = _Search(sets, rules, np.zeros(1 << _SEEN_BITS, np.uint64), np.arange(len(sizes)), means)
    own = rows[sets.own_sizes[rows] > 0]
    _search_bands(search, own, "own", "comparing")
    if len(common.shingles):
        share = 1 - sets.own_sizes[rows] / sizes[rows]
        _search_bands(search, rows[share >= COMMON_SHARE], "whole", "comparing what is common")
    _complete(search, rank_positions(sizes if rank is None else rank, first))
    return NearDuplicatePairs(
        ScoredPairs.joined([found, *search.found]).unique(), len(common.shingles), int(empty.sum()), search.candidates
    )


@dataclass
class _Search:
    """The state of a search: what was verified, and who is joined with whom."""

    sets: Sets
    rules: DuplicateRules
    seen: U64  # a cache of pairs that were verified, by hash: bounded, and a miss only repeats work
    labels: I64
    means: Executor
    found: list[ScoredPairs] = field(default_factory=list)
    candidates: int = 0

    def verify(self, a: I64, b: I64) -> None:
        """Measure pairs that were not measured before, and keep those that pass the floor."""
        keys = np.unique((np.minimum(a, b).astype(np.uint64) << np.uint64(32)) | np.maximum(a, b).astype(np.uint64))
        slots = ((keys * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - _SEEN_BITS)).astype(np.int64)
        fresh = self.seen[slots] != keys
        keys = keys[fresh]
        self.seen[slots[fresh]] = keys
        self.candidates += len(keys)
        kept = measure(
            self.sets, (keys >> np.uint64(32)).astype(np.int64), (keys & np.uint64(0xFFFFFFFF)).astype(np.int64), self.rules
        )
        if len(kept.a):
            self.found.append(kept)
            sure = kept.judged(self.rules.threshold, self.rules.contained)
            self.labels = components(len(self.labels), sure.a, sure.b, self.labels)


def _search_bands(search: _Search, rows: I64, what: str, stage: str) -> None:
    """Candidates among `rows` by the signatures of their own or whole sets, band by band."""
    if len(rows) < 2:
        return
    whole = what == "whole"
    keys = band_keys(search.sets, rows, whole=whole, means=search.means)
    parity = BitSketch.of(search.sets, rows) if whole else None
    for band in range(BANDS):
        left, right, crowded = bucket_pairs(keys[band])
        a, b = rows[left], rows[right]
        joined = crowded & (search.labels[a] == search.labels[b])
        if parity is not None:
            joined |= ~parity.perhaps_edited(left, right)
        search.verify(a[~joined], b[~joined])
        search.means.show(stage, band + 1, BANDS)


def bucket_pairs(keys: U32) -> tuple[I64, I64, Mask]:
    """Pairs of places with equal keys: each with the next NEIGHBOURS of its bucket and the first; and whether it is crowded."""
    packed = (keys.astype(np.uint64) << np.uint64(32)) | np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    places = (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)
    values = packed >> np.uint64(32)
    begins = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    sizes = np.diff(np.append(begins, len(values)))
    many = sizes > 1
    begins, sizes = begins[many], sizes[many]
    at = np.arange(int(sizes.sum())) + np.repeat(begins - (np.cumsum(sizes) - sizes), sizes)
    left_in_bucket = np.repeat(begins + sizes, sizes) - at - 1
    big = np.repeat(sizes > NEIGHBOURS + 1, sizes)
    lefts, rights, crowds = [], [], []
    for step in range(1, NEIGHBOURS + 1):
        ok = left_in_bucket >= step
        lefts.append(at[ok])
        rights.append(at[ok] + step)
        crowds.append(big[ok])
    heads = np.repeat(begins, sizes)
    far = at - heads > NEIGHBOURS
    lefts.append(heads[far])
    rights.append(at[far])
    crowds.append(big[far])
    return places[np.concatenate(lefts)], places[np.concatenate(rights)], np.concatenate(crowds)


def _complete(search: _Search, place: I64) -> None:
    """Hold rows that lack an edge to the first-ranked row of their component against it; those unlike it against the next."""
    sure = ScoredPairs.joined(search.found).unique().judged(search.rules.threshold, search.rules.contained)
    open_rows = np.unique(np.concatenate([sure.a, sure.b]))
    for _ in range(_COMPLETIONS):
        heads = _heads(search.labels, open_rows, place)
        a, b = heads[search.labels[open_rows]], open_rows
        linked = np.isin(_keys(a, b), _keys(sure.a, sure.b)) | (a == b)
        if linked.all():
            return
        before = len(search.found)
        search.verify(a[~linked], b[~linked])
        sure = ScoredPairs.joined(
            [sure, *[p.judged(search.rules.threshold, search.rules.contained) for p in search.found[before:]]]
        )
        linked = np.isin(_keys(a, b), _keys(sure.a, sure.b)) | (a == b)
        open_rows = open_rows[~linked]


def _heads(labels: I64, rows: I64, place: I64) -> I64:
    """(N,) by label, the row of the least place among `rows`."""
    heads = np.full(len(labels), -1, np.int64)
    by_place = rows[np.argsort(-place[rows])]
    heads[labels[by_place]] = by_place
    return heads


def _keys(a: I64, b: I64) -> U64:
    return (np.minimum(a, b).astype(np.uint64) << np.uint64(32)) | np.maximum(a, b).astype(np.uint64)
