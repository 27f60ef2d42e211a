"""Jaccard similarity and containment of candidate pairs.

Common shingles (`shingles.py`) are ignored, with two exceptions that follow from their purpose.

- *An edit displaces, boilerplate adds.* Among 150 near-copies of one row, every shingle is common except those that an
  edit made. Without the common ones nothing would be left to agree on. But a changed word removes common shingles
  where it stands, while a row behind boilerplate has all of them. The pair is therefore measured on the whole sets if
  the common shingles that only one row has are at least DISPLACED times the own shingles that only one row has. Only
  common shingles count here that are about as common as the mean of the two rows' common shingles (`Sets.common_cut`):
  a phrase like `of the` occurs in any text and is no sign of an edit. The whole sets are also measured if neither row
  has own shingles. The slot of a template, filled by different common words, displaces much and leaves no own
  shingles: an own difference below EDITS times the displaced count is no edit.
- *A short rest proves nothing.* `turn on the kitchen light` and `turn off the kitchen light` agree in everything that
  is not common among many such rows. If either row has fewer than `rules.least_own` own shingles, common shingles
  count only against the pair: the shared own ones over those and everything that only one row has.

In addition, *different numbers are different facts*: a pair is rejected, however similar, if each row has numbers that
the other lacks and they share less than `rules.numbers` of all their numbers (`set the heating to 21 degrees`, `to 22
degrees`; one invoice and the next).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from sartor.core.errors import ConfigError
from sartor.curate.dedup.shingles import CHUNK, F32, I64, U8, Mask, Sets, Shingling, shingle_positions

EXACT, NEAR, CONTAINED = 0, 1, 2
METHODS = ("exact", "near", "contained")


@dataclass(frozen=True)
class ScoredPairs:
    """P pairs of rows, a < b. All arrays are (P,).

    jaccard: 0..1, of the two sets as defined in this module; 1 for exact duplicates.
    containment: 0..1, fraction of the smaller set that is in the larger; 0 if a set is too small to measure it.
    """

    a: I64
    b: I64
    jaccard: F32
    containment: F32
    exact: Mask

    @staticmethod
    def none() -> ScoredPairs:
        """Return no pairs."""
        return ScoredPairs.joined([])

    @staticmethod
    def of_exact(a: I64, b: I64) -> ScoredPairs:
        """Return pairs of rows with equal content. a, b: (P,) row numbers, in any order."""
        ones = np.ones(len(a), np.float32)
        return ScoredPairs(
            np.minimum(a, b), np.maximum(a, b), jaccard=ones, containment=ones, exact=np.ones(len(a), bool)
        )

    @staticmethod
    def joined(parts: Sequence[ScoredPairs]) -> ScoredPairs:
        """Return the pairs of all parts."""
        types = (np.int64, np.int64, np.float32, np.float32, np.bool_)
        columns = []
        for field, kind in zip(fields(ScoredPairs), types, strict=True):
            arrays = [getattr(part, field.name) for part in parts]
            columns.append(np.concatenate([np.empty(0, kind), *arrays]))
        return ScoredPairs(*columns)

    def select(self, chosen: Mask | I64) -> ScoredPairs:
        """Return the pairs chosen by a (P,) mask or an array of positions."""
        return ScoredPairs(*[getattr(self, column.name)[chosen] for column in fields(self)])

    def unique(self) -> ScoredPairs:
        """Return each pair once, sorted by (a, b)."""
        keys = (self.a.astype(np.uint64) << np.uint64(32)) | self.b.astype(np.uint64)
        return self.select(np.unique(keys, return_index=True)[1])

    def judged(self, threshold: float, contained: float) -> ScoredPairs:
        """Return the pairs that are duplicates.

        threshold: least Jaccard similarity. contained: least containment; 0 disables it.
        """
        return self.select(self.is_judged(threshold, contained))

    def is_judged(self, threshold: float, contained: float) -> Mask:
        """Return (P,) True for each pair that is a duplicate at the given limits."""
        is_contained = (self.containment >= np.float32(contained)) & (contained > 0)
        return self._near(threshold) | is_contained

    def method(self, threshold: float) -> U8:
        """Return (P,) EXACT, NEAR or CONTAINED: the measure by which a duplicate pair qualifies."""
        return np.where(self.exact, EXACT, np.where(self._near(threshold), NEAR, CONTAINED)).astype(np.uint8)

    def score(self, threshold: float) -> F32:
        """Return (P,) the deciding measure: Jaccard, or containment if Jaccard is below the threshold."""
        return np.where(self._near(threshold), self.jaccard, self.containment)

    def _near(self, threshold: float) -> Mask:
        return self.exact | (self.jaccard >= np.float32(threshold))


DISPLACED, EDITS = 0.25, 0.1
# By measurement: docs/decisions/007-dedup.md
THRESHOLDS = {"words": 0.65, "characters": 0.45}
# Pairs are stored down to here, so that a lower threshold needs no new search; 50 x 4 bands find 96 % of the pairs
# at 0.5 and 73 % at 0.4.
FLOORS = {"words": 0.5, "characters": 0.35}


@dataclass(frozen=True)
class DuplicateRules:
    """Rules that make two rows duplicates.

    threshold: least Jaccard similarity.
    contained: least containment; 0 disables it.
    floor: least Jaccard similarity of the pairs that are stored.
    least_own: fewest own shingles that are sufficient evidence by themselves.
    numbers: least share of common numbers; 0 disables the check.
    common_rows, common_fraction: limits beyond which a shingle is common.
    """

    threshold: float
    floor: float
    contained: float = 0.9
    least_own: int = 30
    numbers: float = 0.5
    common_rows: int = 100
    common_fraction: float = 0.005

    def common_limit(self, rows: int) -> int:
        """Return the number of rows beyond which a shingle is common."""
        return max(self.common_rows, math.floor(self.common_fraction * rows))


def rules_for(shingling: Shingling, threshold: float = 0.0, contained: float | None = None) -> DuplicateRules:
    """Return the rules for a shingling. A threshold of 0 takes its default.

    Raises ConfigError for a threshold outside 0.2..1: below 0.2 the 50 x 4 bands find next to nothing. Containment is
    on by default for words only: 30 words are evidence, while 30 trigrams are six words.
    """
    threshold = threshold or THRESHOLDS[shingling.unit]
    if not 0.2 <= threshold <= 1:
        raise ConfigError(
            f"a threshold of {threshold:g} is out of range",
            "a Jaccard similarity from 0.2 to 1; 0.65 is the default for words",
        )
    if contained is None:
        contained = 0.9 if shingling.unit == "words" else 0.0
    if contained and not 0.5 <= contained <= 1:
        raise ConfigError(f"a containment of {contained:g} is out of range", "0.5 to 1, or 0 to switch it off")
    return DuplicateRules(
        threshold, min(threshold, FLOORS[shingling.unit]), contained, numbers=0.5 if shingling.unit == "words" else 0.0
    )


def measure(sets: Sets, a: I64, b: I64, rules: DuplicateRules) -> ScoredPairs:
    """Return the candidate pairs that are duplicates at the floor or by containment, with both measures.

    a, b: (P,) row numbers, a < b.
    """
    sizes = np.diff(sets.offsets)
    results = []
    cumulative = np.cumsum(sizes[a] + sizes[b])
    first = 0
    while first < len(a):
        base = cumulative[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(cumulative, base + CHUNK, side="right")))
        results.append(_measure(sets, a[first:last], b[first:last], rules))
        first = last
    return ScoredPairs.joined(results)


def _measure(sets: Sets, a: I64, b: I64, rules: DuplicateRules) -> ScoredPairs:
    counts = _counts(sets, a, b)
    sizes = np.diff(sets.offsets)
    own_a, own_b = sets.own_sizes[a], sets.own_sizes[b]
    # A, B: the sets of a pair; A', B': without common shingles (own). All arrays are (P,).
    #   whole_jaccard = |A & B| / |A | B|              own_jaccard = |A' & B'| / |A' | B'|
    #   own_difference = |A' ^ B'|                     common_difference = |A ^ B| - |A' ^ B'|
    #   strict = |A' & B'| / (|A' & B'| + |A ^ B|)
    #   containment = min(|A & B| / min(|A|, |B|), |A' & B'| / min(|A'|, |B'|))
    whole_jaccard = counts.shared / (sizes[a] + sizes[b] - counts.shared)
    own_jaccard = counts.shared_own / np.maximum(own_a + own_b - counts.shared_own, 1)
    own_difference = own_a + own_b - 2 * counts.shared_own
    common_difference = sizes[a] + sizes[b] - 2 * counts.shared - own_difference
    is_edited = (counts.displaced >= DISPLACED * own_difference) & (own_difference >= EDITS * counts.displaced)
    is_edited |= own_a + own_b == 0
    has_enough = np.minimum(own_a, own_b) >= rules.least_own
    strict = counts.shared_own / np.maximum(counts.shared_own + own_difference + common_difference, 1)
    jaccard = np.where(
        is_edited,
        np.maximum(whole_jaccard, np.where(has_enough, own_jaccard, 0)),
        np.where(has_enough, own_jaccard, strict),
    )
    overlap = np.minimum(
        counts.shared / np.minimum(sizes[a], sizes[b]), counts.shared_own / np.maximum(np.minimum(own_a, own_b), 1)
    )
    containment = np.where(has_enough, overlap, 0)
    pairs = ScoredPairs(
        a,
        b,
        jaccard=jaccard.astype(np.float32),
        containment=containment.astype(np.float32),
        exact=np.zeros(len(a), bool),
    )
    if rules.numbers:
        lacking_a, lacking_b = sets.number_sizes[a] - counts.numbers, sets.number_sizes[b] - counts.numbers
        contradict = (np.minimum(lacking_a, lacking_b) > 0) & (
            counts.numbers < rules.numbers * (lacking_a + lacking_b + counts.numbers)
        )
        pairs = pairs.select(~contradict)
    return pairs.judged(rules.floor, rules.contained)


@dataclass(frozen=True)
class _Counts:
    """Counts for each of P pairs; all arrays are (P,).

    shared: shingles in both sets. shared_own: those of them that are not common. numbers: those that are numbers.
    displaced: common shingles in only one set, at or above the cut of `Sets.common_cut`.
    """

    shared: I64
    shared_own: I64
    numbers: I64
    displaced: I64


def _counts(sets: Sets, a: I64, b: I64) -> _Counts:
    # 64-bit key of a shingle in a pair: bits 37.. pair, 5..36 shingle (its lowest bit marks a number), 0..4 level.
    # A key that occurs twice is in both sets.
    keys = []
    for rows in (a, b):
        positions, sizes = shingle_positions(sets.offsets, rows)
        pair = np.repeat(np.arange(len(rows), dtype=np.uint64) << np.uint64(37), sizes)
        keys.append(pair | (sets.shingles[positions].astype(np.uint64) << np.uint64(5)) | sets.level[positions])
    merged = np.concatenate(keys)
    merged.sort(kind="stable")  # the two halves are sorted already, so the stable sort is one merge
    is_repeated = merged[1:] == merged[:-1]
    shared_keys, count = merged[1:][is_repeated], len(a)
    pair = (shared_keys >> np.uint64(37)).astype(np.int64)
    shared = np.bincount(pair, minlength=count)
    common = np.bincount(pair[(shared_keys & np.uint64(31)) > 0], minlength=count)
    numbers = np.bincount(pair[(shared_keys & np.uint64(32)) > 0], minlength=count)
    displaced = np.zeros(count, np.int64)
    if sets.common_cut.any():
        is_single = np.ones(len(merged), bool)
        is_single[1:][is_repeated] = False
        is_single[:-1][is_repeated] = False
        is_single &= (merged & np.uint64(31)) > 0
        single_keys = merged[is_single]
        pair = (single_keys >> np.uint64(37)).astype(np.int64)
        cut = np.maximum(sets.common_cut[a], sets.common_cut[b])
        displaced = np.bincount(pair[(single_keys & np.uint64(31)) >= cut[pair]], minlength=count)
    return _Counts(shared, shared - common, numbers, displaced)
