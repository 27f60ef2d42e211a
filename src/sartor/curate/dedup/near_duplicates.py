"""Near-duplicates: MinHash proposes, true Jaccard or containment disposes. Arrays in, verified pairs out.

1. Rows of equal digest are one row from here on (`exact`).
2. Shingles that stand in more than max(100, 0.5 %) of the rows are *common* (`commons.py`): boilerplate, templates, set
   phrases.
3. MinHash signatures (Broder 1997) of what is a row's own, 50 bands of 4 (a pair with Jaccard 0.7 is missed once in a
   million, with 0.5 four times in a hundred). Rows of which a good part is common also get a signature of the whole: many
   near-copies of one row make each other's shingles common.
4. Band by band, rows that share a key are candidates: each with its next NEIGHBOURS rows and with the first of its bucket, so
   that the work is linear however large a bucket is.
5. Every candidate is verified on the sets themselves (`verify.py`), and rows of a large cluster that were never held against
   its head are, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.processes import ALONE, Means
from sartor.curate.dedup.arrays import I64, U8, U32, U64, Mask
from sartor.curate.dedup.commons import common_shingles, levels
from sartor.curate.dedup.graph import components, places_of
from sartor.curate.dedup.minhash import BANDS, band_keys
from sartor.curate.dedup.pairs import Pairs
from sartor.curate.dedup.parity import Parity
from sartor.curate.dedup.sets import Sets
from sartor.curate.dedup.verify import Rules, measure

NEIGHBOURS = 4
# From this common share on, a row's whole set gets a signature too.
COMMON_SHARE = 0.3
_SEEN_BITS = 20
_COMPLETIONS = 8


@dataclass(frozen=True)
class Found:
    """Verified pairs, and what the run noticed on its way."""

    pairs: Pairs
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
    shingles: U32, offsets: I64, digests: U8, rules: Rules, rank: NDArray[Any] | None = None, means: Means = ALONE
) -> Found:
    """Verified pairs of N rows down to `rules.floor`, exact ones among them, each (a, b) with a < b once.

    `shingles`, `offsets`, `digests` as in `Sketches` (memory-mapped files will do). `rank` (N,) is the one that
    `clusters.resolve` will get; rows of large clusters are held against the row that it puts first (default: the largest
    set). `means`: progress, processes.
    """
    sizes = np.diff(offsets)
    empty = sizes == 0
    first = exact(digests, empty)
    rows = np.flatnonzero((first == np.arange(len(first))) & ~empty)
    twins = np.flatnonzero(first != np.arange(len(first)))
    found = Pairs.of_exact(first[twins], twins)
    if len(rows) < 2:
        return Found(found, 0, int(empty.sum()), 0)
    common = common_shingles(shingles, offsets, rows, rules.common_limit(len(rows)))
    sets = Sets(shingles, offsets, levels(shingles, common))
    search = _Search(sets, rules, np.zeros(1 << _SEEN_BITS, np.uint64), np.arange(len(sizes)), means)
    own = rows[sets.own_sizes[rows] > 0]
    _search_bands(search, own, "own", "comparing")
    if len(common.shingles):
        share = 1 - sets.own_sizes[rows] / sizes[rows]
        _search_bands(search, rows[share >= COMMON_SHARE], "whole", "comparing what is common")
    _complete(search, places_of(sizes if rank is None else rank, first))
    return Found(Pairs.joined([found, *search.found]).unique(), len(common.shingles), int(empty.sum()), search.candidates)


@dataclass
class _Search:
    """The state of a search: what was verified, and who is joined with whom."""

    sets: Sets
    rules: Rules
    seen: U64  # a cache of pairs that were verified, by hash: bounded, and a miss only repeats work
    labels: I64
    means: Means
    found: list[Pairs] = field(default_factory=list)
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
    parity = Parity.of(search.sets, rows) if whole else None
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
    sure = Pairs.joined(search.found).unique().judged(search.rules.threshold, search.rules.contained)
    open_rows = np.unique(np.concatenate([sure.a, sure.b]))
    for _ in range(_COMPLETIONS):
        heads = _heads(search.labels, open_rows, place)
        a, b = heads[search.labels[open_rows]], open_rows
        linked = np.isin(_keys(a, b), _keys(sure.a, sure.b)) | (a == b)
        if linked.all():
            return
        before = len(search.found)
        search.verify(a[~linked], b[~linked])
        sure = Pairs.joined([sure, *[p.judged(search.rules.threshold, search.rules.contained) for p in search.found[before:]]])
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
