"""Word by word differences of two texts, as pieces for a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import LCSseq

AROUND = 12  # equal words shown on either side of a difference; further equal words are only counted
LONGEST_WORD = 60  # characters; longer words are cut
WORDS = 140  # words shown of a text


@dataclass(frozen=True)
class TextPiece:
    """A piece of a text.

    differs: the compared text lacks these words.
    left_out: number of words that are not shown.
    """

    text: str
    differs: bool = False
    left_out: int = 0


def pieces(text: str) -> list[TextPiece]:
    """Return the start of a text that is not compared with another."""
    words = text.split(" ")
    hidden_count = len(words) - WORDS
    shown = [TextPiece(" ".join(map(_short, words[:WORDS])))]
    if hidden_count > 0:
        shown.append(TextPiece("", left_out=hidden_count))
    return shown


def differences(first: str, second: str) -> tuple[list[TextPiece], list[TextPiece]]:
    """Return both texts in pieces, with the differing words marked.

    Long equal stretches are left out and counted. The comparison is the longest common subsequence of words
    (rapidfuzz). Words are separated by white space; a line break is a word of its own.
    """
    left, right = _words(first), _words(second)
    result: tuple[list[TextPiece], list[TextPiece]] = ([], [])
    steps = list(LCSseq.opcodes(left, right))
    for index, step in enumerate(steps):
        ends = (index == 0, index == len(steps) - 1)
        for side, words in ((0, left[step.src_start : step.src_end]), (1, right[step.dest_start : step.dest_end])):
            if not words:
                continue
            if step.tag == "equal":
                result[side].extend(_equal_pieces(words, ends))
                continue
            result[side].append(TextPiece(_join(words[:WORDS]), differs=True))
            if len(words) > WORDS:
                result[side].append(TextPiece("", left_out=len(words) - WORDS))
    return result


def _words(text: str) -> list[str]:
    return re.findall(r"\n|[^\s]+", text)


def _equal_pieces(words: Sequence[str], ends: tuple[bool, bool]) -> list[TextPiece]:
    is_first, is_last = ends
    before = 0 if is_first else AROUND
    after = 0 if is_last else AROUND
    if is_first:
        before = 2 * AROUND if is_last else AROUND // 2
    left_out = len(words) - before - after
    if left_out < AROUND:
        return [TextPiece(_join(words))]
    parts = [TextPiece(_join(words[:before])), TextPiece("", left_out=left_out)]
    if after:
        parts.append(TextPiece(_join(words[-after:])))
    return parts


def _join(words: Sequence[str]) -> str:
    return " ".join(map(_short, words)).replace(" \n ", "\n").replace("\n ", "\n").replace(" \n", "\n")


def _short(word: str) -> str:
    return word if len(word) <= LONGEST_WORD else f"{word[:LONGEST_WORD]}…"
