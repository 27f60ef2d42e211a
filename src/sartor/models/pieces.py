"""Tokens of a text with the characters that each stands for, and of texts that are cut where no token may run across."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sartor.core.errors import SourceError

Piece = tuple[int, int, int]  # token, start, end
# Put before a text that goes on in the middle of a word. The first is taken behind which no token runs across the border
_ANCHORS = ("\ue002", ".", "a", "\n")


def pieces_of(tokenizer: Any, text: str, cuts: Sequence[int] = (), *, is_first: bool) -> list[Piece]:
    """Return (token, start, end) as the tokenizer gives them. Behind a media no tokenizer adds its opening space.

    cuts: positions that no token runs across. Raises SourceError where the tokenizer cannot be made to respect one.
    """
    if not cuts:
        opening = "" if is_first or not text else str(tokenizer.eos_token)
        coded = tokenizer(opening + text, add_special_tokens=False, return_offsets_mapping=True)
        found = zip(coded["input_ids"], coded["offset_mapping"], strict=True)
        skip = len(opening)
        return [(token, max(start - skip, 0), end - skip) for token, (start, end) in found if end > skip or not skip]
    pieces = pieces_of(tokenizer, text[: cuts[0]], is_first=is_first)
    ends = [*cuts[1:], len(text)]
    parts = _behind(tokenizer, [text[start:end] for start, end in zip(cuts, ends, strict=True)])
    for cut, part in zip(cuts, parts, strict=True):
        pieces += [(token, cut + start, cut + end) for token, start, end in part]
    return pieces


def _behind(tokenizer: Any, texts: Sequence[str]) -> list[list[Piece]]:
    """Tokens of texts that each go on in the middle of a word, where no tokenizer adds its opening space."""
    found: dict[str, list[Piece]] = {}
    for anchor in _ANCHORS:
        missing = list(dict.fromkeys(text for text in texts if text not in found))
        if not missing:
            break
        coded = tokenizer([anchor + text for text in missing], add_special_tokens=False, return_offsets_mapping=True)
        for text, ids, offsets in zip(missing, coded["input_ids"], coded["offset_mapping"], strict=True):
            pieces = [(token, start - 1, end - 1) for token, (start, end) in zip(ids, offsets, strict=True) if end > 1]
            if all(start >= 0 for _, start, _ in pieces):
                found[text] = pieces
    if missing := [text for text in texts if text not in found]:
        problem = f"the tokenizer cannot go on with {missing[0][:80]!r} behind the beginning of a control token"
        raise SourceError(problem, "take control tokens out of the text")
    return [found[text] for text in texts]
