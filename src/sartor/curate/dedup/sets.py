"""The shingle sets of all rows, as columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.curate.dedup.arrays import I64, U8, U32
from sartor.curate.dedup.commons import CHUNK
from sartor.curate.dedup.shingles import NUMBER

# A common shingle is a row's text, no set phrase, from half as many rows on as the row's common shingles have in the mean.
_CUT = 2


@dataclass(frozen=True)
class Sets:
    """N sets: `shingles` (S,), `offsets` (N + 1,) as in `Sketches`, and (S,) the `level` of each shingle (`commons.levels`)."""

    shingles: U32
    offsets: I64
    level: U8

    @cached_property
    def own_sizes(self) -> I64:
        """(N,) shingles of each row that are not common."""
        return self.sums(lambda shingles, level: level == 0)

    @cached_property
    def number_sizes(self) -> I64:
        """(N,) numbers of each row, where shingles are words."""
        return self.sums(lambda shingles, level: (shingles & NUMBER) > 0)

    @cached_property
    def common_cut(self) -> U8:
        """(N,) the level from which on common shingles count as a row's text; 0 for a row without any."""
        total = self.sums(lambda shingles, level: level)
        common = np.diff(self.offsets) - self.own_sizes
        return np.where(common, np.maximum(np.round(total / np.maximum(common, 1)) - _CUT, 1), 0).astype(np.uint8)

    def sums(self, of: Any) -> I64:
        """(N,) sums over each row of `of(shingles, level)`, a stretch at a time: memory-mapped sets stay on disk."""
        sums = np.zeros(len(self.offsets) - 1, np.int64)
        rows = np.searchsorted(self.offsets, np.arange(0, len(self.shingles), CHUNK), side="right") - 1
        for first, last in zip(rows, [*rows[1:], len(sums)], strict=True):
            begin, end = int(self.offsets[first]), int(self.offsets[last])
            values: NDArray[Any] = of(np.asarray(self.shingles[begin:end]), self.level[begin:end])
            total = np.zeros(end - begin + 1, np.int64)
            np.cumsum(values, out=total[1:])
            sums[first:last] = np.diff(total[self.offsets[first : last + 1] - begin])
        return sums
