"""Two texts word by word: which words each has that the other lacks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rapidfuzz.distance import LCSseq

from sartor.curate.card.blocks import Piece

AROUND = 12  # words shown on either side of a difference; what is alike beyond them is counted, not shown
LONGEST_WORD = 60  # characters; the rest of a longer word is left out where it is shown
WORDS = 140  # words of a text that are shown


def pieces(text: str) -> list[Piece]:
    """The start of a text that has nothing to be compared with."""
    words = text.split(" ")
    left = len(words) - WORDS
    return [Piece(" ".join(map(_short, words[:WORDS]))), *([Piece("", left_out=left)] if left > 0 else [])]


def differences(one: str, other: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, those that differ marked; long stretches that are alike are left out and counted.

    The longest common subsequence of words (rapidfuzz). Words are what blanks part; a line break is a word of its own.
    """
    left, right = _words(one), _words(other)
    found: tuple[list[Piece], list[Piece]] = ([], [])
    steps = list(LCSseq.opcodes(left, right))
    for place, step in enumerate(steps):
        ends = (place == 0, place == len(steps) - 1)
        for side, words in ((0, left[step.src_start : step.src_end]), (1, right[step.dest_start : step.dest_end])):
            if words:
                found[side].extend(_alike(words, ends) if step.tag == "equal" else _unlike(words))
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"\n|[^\s]+", text)


def _alike(words: Sequence[str], ends: tuple[bool, bool]) -> list[Piece]:
    before, after = (0 if end else AROUND for end in ends)
    if ends == (True, True):
        before = 2 * AROUND
    if ends[0] and not ends[1]:
        before = AROUND // 2
    left_out = len(words) - before - after
    if left_out < AROUND:
        return [Piece(_join(words))]
    parts = [Piece(_join(words[:before])), Piece("", left_out=left_out)]
    return parts + ([Piece(_join(words[-after:]))] if after else [])


def _unlike(words: Sequence[str]) -> list[Piece]:
    shown = [Piece(_join(words[:WORDS]), differs=True)]
    return shown + ([Piece("", left_out=len(words) - WORDS)] if len(words) > WORDS else [])


def _join(words: Sequence[str]) -> str:
    return " ".join(map(_short, words)).replace(" \n ", "\n").replace("\n ", "\n").replace(" \n", "\n")


def _short(word: str) -> str:
    return word if len(word) <= LONGEST_WORD else f"{word[:LONGEST_WORD]}…"
