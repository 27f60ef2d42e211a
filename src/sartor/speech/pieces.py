"""A text as a voice takes it: cleaned, and cut at the ends of sentences, so that the first words are heard early."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

# Of one piece: a few seconds of speech, which no voice takes long for
MOST_PIECE = 300
_END = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])|\n+")
_BREAK = re.compile(r"[,;:，、]\s|\s")


def clean(text: str) -> str:
    """The text without what no voice may be given: control characters, halves of surrogate pairs, marks without a width.

    `[[` would begin phonemes in both programs. Line ends stay, since a sentence may end there.
    """
    kept = "".join(letter if letter == "\n" or unicodedata.category(letter)[0] != "C" else _instead(letter) for letter in text)
    return re.sub(r"[^\S\n]+", " ", kept.replace("[[", "[ [")).strip()


def _instead(letter: str) -> str:
    """Nothing for a mark inside a word (soft hyphen, joiner), a space for whatever else is no character."""
    return "" if unicodedata.category(letter) == "Cf" else " "


def is_sayable(text: str) -> bool:
    """Whether anything in it has a sound."""
    return any(letter.isalnum() for letter in text)


def pieces(text: str) -> list[str]:
    """A cleaned text in pieces of at most MOST_PIECE characters, each a line, none without a sound."""
    made: list[str] = []
    for sentence in _sentences(text):
        if made and len(made[-1]) + 1 + len(sentence) <= MOST_PIECE:
            made[-1] = f"{made[-1]} {sentence}"
        else:
            made.append(sentence)
    return [piece for piece in made if is_sayable(piece)]


def _sentences(text: str) -> Iterator[str]:
    for sentence in _END.split(text):
        rest = sentence.strip()
        while len(rest) > MOST_PIECE:
            breaks = [found.end() for found in _BREAK.finditer(rest, 0, MOST_PIECE)]
            at = breaks[-1] if breaks else MOST_PIECE
            yield rest[:at].strip()
            rest = rest[at:].strip()
        if rest:
            yield rest
