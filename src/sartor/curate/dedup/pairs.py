"""Verified pairs as columns: what was measured of each, and what that makes of it at a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from sartor.curate.dedup.arrays import F32, I64, U8, Mask

EXACT, NEAR, CONTAINED = 0, 1, 2
METHODS = ("exact", "near", "contained")


@dataclass(frozen=True)
class Pairs:
    """P pairs of rows, a < b: (P,) each.

    `jaccard` 0..1 of the two sets as `verify.py` defines it, 1 for exact duplicates; `containment` 0..1, the share of the
    smaller set that is in the larger, 0 where it was not to be asked.
    """

    a: I64
    b: I64
    jaccard: F32
    containment: F32
    exact: Mask

    @staticmethod
    def none() -> Pairs:
        """No pairs."""
        return Pairs.joined([])

    @staticmethod
    def of_exact(a: I64, b: I64) -> Pairs:
        """Pairs of equal content."""
        one = np.ones(len(a), np.float32)
        return Pairs(np.minimum(a, b), np.maximum(a, b), one, one, np.ones(len(a), bool))

    @staticmethod
    def joined(parts: Sequence[Pairs]) -> Pairs:
        """All pairs of some."""
        types = (np.int64, np.int64, np.float32, np.float32, np.bool_)
        columns = zip([column.name for column in fields(Pairs)], types, strict=True)
        return Pairs(*[np.concatenate([np.empty(0, kind), *[getattr(part, name) for part in parts]]) for name, kind in columns])

    def where(self, chosen: Mask | I64) -> Pairs:
        """The pairs that a mask or a list of places chooses."""
        return Pairs(*[getattr(self, column.name)[chosen] for column in fields(self)])

    def unique(self) -> Pairs:
        """Each pair once, sorted by (a, b)."""
        keys = (self.a.astype(np.uint64) << np.uint64(32)) | self.b.astype(np.uint64)
        return self.where(np.unique(keys, return_index=True)[1])

    def judged(self, threshold: float, contained: float) -> Pairs:
        """The pairs that are duplicates at a threshold of Jaccard, or of containment (0 switches that off)."""
        return self.where(self.is_judged(threshold, contained))

    def is_judged(self, threshold: float, contained: float) -> Mask:
        """(P,) whether each is such a pair."""
        return self._near(threshold) | self._contained(contained)

    def method(self, threshold: float) -> U8:
        """(P,) EXACT, NEAR or CONTAINED: by which measure a judged pair is a duplicate."""
        return np.where(self.exact, EXACT, np.where(self._near(threshold), NEAR, CONTAINED)).astype(np.uint8)

    def score(self, threshold: float) -> F32:
        """(P,) the measure that decided: Jaccard, or containment where Jaccard alone would not have."""
        return np.where(self._near(threshold), self.jaccard, self.containment)

    def _near(self, threshold: float) -> Mask:
        return self.exact | (self.jaccard >= np.float32(threshold))

    def _contained(self, contained: float) -> Mask:
        return (self.containment >= np.float32(contained)) & (contained > 0)
