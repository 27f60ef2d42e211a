"""Personal data in JSON text: found in the decoded strings and numbers, written back so that the rest stays byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?')
DEEPEST = 8


@dataclass(frozen=True)
class Leaf:
    """A string or number in JSON text. `inner` holds the leaves of a string that is JSON itself, as `arguments` are."""

    start: int
    end: int
    text: str
    quoted: bool
    escaped: bool
    inner: tuple[Leaf, ...] = ()

    def plain(self) -> Iterator[Leaf]:
        """The leaves that hold words, in order."""
        if not self.inner:
            yield self
        for leaf in self.inner:
            yield from leaf.plain()


def leaves(text: str, deep: int = 0) -> tuple[Leaf, ...] | None:
    """The leaves of JSON text that is an object or a list; None of any other."""
    start, end = text[:1], text[-1:]
    if start not in "{[ \n\t\r" or end not in "}] \n\t\r" or text.strip()[:1] not in ("{", "["):
        return None
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    return tuple(_leaf(match, deep) for match in _TOKEN.finditer(text))


def _leaf(match: re.Match[str], deep: int) -> Leaf:
    raw = match[0]
    if raw[0] != '"':
        return Leaf(match.start(), match.end(), raw, False, False)
    text = json.loads(raw, strict=False)
    inner = leaves(text, deep + 1) if deep < DEEPEST and text[:1] in ("{", "[") else None
    return Leaf(match.start(), match.end(), text, True, "\\u" in raw, inner or ())


def rebuilt(text: str, parts: Sequence[Leaf], changed: dict[int, str]) -> str:
    """The JSON text with some leaves changed. `changed` holds new texts by the `id` of a leaf that `plain` gave.

    A number that was changed becomes a string.
    """
    pieces = []
    at = 0
    for leaf in parts:
        new = changed.get(id(leaf)) if not leaf.inner else rebuilt(leaf.text, leaf.inner, changed)
        if new is None or new == leaf.text:
            continue
        pieces += [text[at : leaf.start], json.dumps(new, ensure_ascii=leaf.escaped)]
        at = leaf.end
    return "".join([*pieces, text[at:]])
