"""A cheap look at a crowded bucket: are two rows perhaps edits of one another, or is it boilerplate that they share.

Odd sketches (Mitzenmacher, Pagh, Pham 2014): a bit is the parity of the elements that fall on it, so the bits in which two
sketches differ are at most the elements that one of two sets holds alone, and about as many while they are few. Two of 256
bits a row, one of its common text and one of what is its own, tell most pairs of rows behind one boilerplate apart without
touching their sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sartor.curate.dedup.arrays import I64, U64, Mask, mixed
from sartor.curate.dedup.commons import gathered, spans
from sartor.curate.dedup.sets import Sets

_BITS = 256
_ROWS = 4096
# Half of verify.DISPLACED: 256 bits run full before the sets do, and a pair that goes on is verified anyway.
_DISPLACED = 0.12


@dataclass(frozen=True)
class Parity:
    """(n, 4) words of 64 bits for each of n rows: of its common text, and of its own shingles."""

    text: U64
    own: U64

    @staticmethod
    def of(sets: Sets, rows: I64) -> Parity:
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
        return Parity(np.concatenate(text), np.concatenate(own))

    def perhaps_edited(self, a: I64, b: I64) -> Mask:
        """Whether pairs of places may pass the rule of displaced shingles in `verify.py`."""
        displaced = np.bitwise_count(self.text[a] ^ self.text[b]).sum(axis=1)
        own = np.bitwise_count(self.own[a] ^ self.own[b]).sum(axis=1)
        return displaced >= _DISPLACED * own  # type: ignore[no-any-return]


def _folded(bits: I64, count: int) -> U64:
    odd = np.bincount(bits, minlength=count * _BITS).astype(np.uint8) & 1
    return np.packbits(odd.reshape(count, _BITS), axis=1).view(np.uint64)
