"""Markup: tokens that a base keeps for turns, tools, reasoning and media; content that spells them is taken apart.

A tokenizer reads `<|im_end|>` in a user's text as the token that ends a turn. So `shield` puts a private mark (BREAK) into each
piece of markup that content spells, before the chat template is rendered; the template's own markup has none. `opened` takes
the marks out of the rendering and says where text must be cut before it is tokenised. Text without markup is left as it is.
"""

from __future__ import annotations

import bisect
import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

# Characters for private use: a cut inside of markup, and the first of these characters where content holds it itself
_PRIVATE = "\ue002"
BREAK, _LITERAL = f"{_PRIVATE}\ue004", f"{_PRIVATE}\ue003"
# JSON with ASCII alone, and Python's repr, spell private characters out
_ESCAPED = "\\ue002"
_CODE = re.compile("\ue002[\ue003\ue004]|\\\\+ue002\\\\+ue00[34]")
_BREAK_ENDS = ("\ue004", "4")
# The form of control tokens. A word in brackets counts where it is in capitals: [INST]
_FORM = re.compile(r"<\|[^\s<>]+\|?>|</?[^\s<>/][^\s<>]*>|\[/?[A-Z][A-Z_]+\]|\[\|[^\s\[\]]+\|\]|<｜[^<>]+｜>")
# SentencePiece's tokens for single bytes
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ELEMENTS = (
    "a abbr address article aside audio b base bdi bdo big blockquote body br button canvas caption center cite code col "
    "colgroup data dd del details dfn div dl dt em embed fieldset figcaption figure font footer form h1 h2 h3 h4 h5 h6 head "
    "header hr html i iframe img input ins kbd label legend li link main mark meta nav object ol option p pre q s samp script "
    "section select small source span strike strong style sub summary sup table tbody td textarea tfoot th thead time title "
    "tr track tt u ul var video"
)
_HTML = frozenset(_ELEMENTS.split())
# The keys of OpenAI's tools and calls, by which templates look things up
_KEYS = "type function name description parameters properties required items enum strict id arguments role content"
_FIELDS = frozenset(_KEYS.split())


@dataclass(frozen=True)
class Token:
    """A token of the set. written_by: what the template writes with it (turns, tools, reasoning, media), or tokenizer."""

    token: str
    id: int
    special: bool
    written_by: tuple[str, ...] = ("tokenizer",)

    def as_json(self) -> dict[str, Any]:
        """An entry of `sartor inspect BASE`."""
        return {"token": self.token, "id": self.id, "special": self.special, "written_by": list(self.written_by)}


@dataclass(frozen=True)
class Opened:
    """A rendering without private marks. cuts: positions in `text` inside of markup that content spells."""

    text: str
    cuts: tuple[int, ...] = ()
    # (position in the rendering, position in `text`) behind each mark
    moves: tuple[tuple[int, int], ...] = ((0, 0),)

    def position(self, shielded: int) -> int:
        """Return where a position of the rendering with marks lies in `text`."""
        before, after = self.moves[bisect.bisect_right(self.moves, (shielded, len(self.text))) - 1]
        return min(after + shielded - before, len(self.text))


class Markup:
    """The set of a base, and what finds it in a text.

    keeps_case: whether the template leaves the case of content. openings: the beginnings of markup that it writes right
    before content. fold: what the tokenizer makes of one character before it looks for tokens, None for nothing.
    """

    def __init__(
        self,
        tokens: Iterable[Token],
        *,
        keeps_case: bool = True,
        openings: Iterable[str] = (),
        fold: Callable[[str], str] | None = None,
    ) -> None:
        self.tokens = tuple(sorted(tokens, key=lambda token: token.id))
        self.ids = frozenset(token.id for token in self.tokens)
        self._fold = fold and functools.lru_cache(4096)(fold)
        written = {token.token.strip() for token in self.tokens}
        # a tokenizer that looks for a token in normalised text has normalised the token too
        folded = {"".join(map(self._fold, text)) for text in written} if self._fold else set()
        spelt = sorted(written | {text for text in folded if len(text) > 1})
        self._longest = max(map(len, spelt), default=0)
        self._keeps_case = keeps_case
        self._prefixes = frozenset(self._as_read(text[:end]) for text in spelt for end in range(1, len(text)))
        flags = 0 if keeps_case else re.IGNORECASE
        rests = sorted({text[len(opening) :] for opening in openings for text in spelt if text.startswith(opening)} - {""})
        self._has_openings = bool(rests)
        self._rest = re.compile(_alternation(rests), flags)
        self._rest_prefixes = frozenset(self._as_read(rest[:end]) for rest in rests for end in range(1, len(rest)))
        self._any = re.compile(_alternation(spelt), flags)
        # a look ahead, so that pieces that overlap are all found
        self._each = re.compile(f"(?=({_alternation(spelt)}))", flags)
        initials = re.escape("".join({text[0] for text in spelt}))
        # most texts hold none of the characters with which a mark or a piece of markup begins
        self._needs_look = re.compile("" if fold or rests else f"[{_PRIVATE}\\\\{initials}]", flags)
        self._initial = re.compile(f"[{initials}]" if spelt else r"(?!)", flags)

    def spelt(self, text: str) -> list[str]:
        """Return the pieces of markup that a text spells, in order."""
        return [text[start:end] for start, end in self._places(text)]

    def shield(self, text: str) -> str:
        """Return content as it is rendered: with a BREAK in each piece of markup. Other text comes back as the very same."""
        if not self._needs_look.search(text):
            return text
        if _PRIVATE in text:
            text = text.replace(_PRIVATE, _LITERAL)
        breaks = {start + 1 for start, _ in self._places(text)} | self._unfinished(text)
        if _ESCAPED in text:
            breaks |= {match.start() + 1 for match in re.finditer(re.escape(_ESCAPED), text)}
        if self._has_openings:
            breaks |= self._begun(text)
        if not breaks:
            return text
        ends = sorted(breaks)
        return BREAK.join(text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True))

    def shield_values(self, value: Any) -> Any:
        """Return a JSON value with every text in it shielded, keys too."""
        if isinstance(value, str):
            return self.shield(value)
        if isinstance(value, list):
            return [self.shield_values(item) for item in value]
        if isinstance(value, dict):
            return {self.shield_key(key): self.shield_values(item) for key, item in value.items()}
        return value

    def shield_key(self, key: str) -> str:
        """Return a key of a JSON object shielded; those by which templates look things up as they are."""
        return key if key in _FIELDS else self.shield(key)

    def opened(self, rendering: str) -> Opened:
        """Return a rendering without marks, and where content must be cut."""
        if not has_marks(rendering):
            return Opened(rendering)
        parts, length, done, breaks, moves = [], 0, 0, [], [(0, 0)]
        for code in _CODE.finditer(rendering):
            parts.append(rendering[done : code.start()])
            if code.group()[-1] in _BREAK_ENDS:
                breaks.append(length + len(parts[-1]))
            else:
                parts[-1] += code.group()[: len(code.group()) // 2]
            length += len(parts[-1])
            done = code.end()
            moves.append((done, length))
        text = "".join([*parts, rendering[done:]])
        return Opened(text, tuple(_inside(breaks, self._places(text) if breaks else [])), tuple(moves))

    def _places(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of every piece of markup, also of those that overlap."""
        if not self.tokens:
            return []
        found = []
        if self._any.search(text):
            found = [match.span(1) for match in self._each.finditer(text)]
        if self._fold:
            found = sorted({*found, *self._folded_places(text)})
        return found

    def _folded_places(self, text: str) -> list[tuple[int, int]]:
        """What becomes markup when the tokenizer normalises the text: full-width letters, say."""
        assert self._fold
        folded, origins = "", []
        for position, character in enumerate(text):
            written = self._fold(character)
            folded += written
            origins += [position] * len(written)
        if folded == text:
            return []
        spans = [match.span(1) for match in self._each.finditer(folded)]
        return [(origins[start], origins[end - 1] + 1) for start, end in spans if origins[start] < origins[end - 1]]

    def _begun(self, text: str) -> set[int]:
        """Where a text goes on with markup that the template has begun before it."""
        start = len(text) - len(text.lstrip())
        head = self._as_read(text[start : start + self._longest].rstrip())
        return {start} if self._rest.match(head) or head in self._rest_prefixes else set()

    def _unfinished(self, text: str) -> set[int]:
        """Where a text ends inside of markup that what follows it may complete."""
        end = len(text.rstrip())
        first = max(0, end - self._longest)
        if self._fold or not self._keeps_case:
            tails = (self._as_read(text[start:end]) for start in range(first, end))
            return {end} if any(tail in self._prefixes for tail in tails) else set()
        while match := self._initial.search(text, first, end):
            if text[match.start() : end] in self._prefixes:
                return {end}
            first = match.end()
        return set()

    def _as_read(self, text: str) -> str:
        """A piece of text as it is compared with markup: normalised, and in small letters where a template changes case."""
        folded = "".join(map(self._fold, text)) if self._fold else text
        return folded if self._keeps_case else folded.lower()


def has_marks(rendering: str) -> bool:
    """Return whether a rendering may hold private marks, as characters or spelt out."""
    return _PRIVATE in rendering or _ESCAPED in rendering


def is_markup(token: str, *, special: bool, is_written: bool = False) -> bool:
    """Return whether an added token of a tokenizer counts: a special one, or one that has the form of control tokens.

    White space, single characters, bytes, and HTML elements are text, though some tokenizers store them whole. is_written:
    the base's own template writes it; then a word between marks counts, whatever its form.
    """
    token = token.strip().strip("▁")
    if len(token) < 2 or _BYTE.fullmatch(token):
        return False
    if special or (is_written and _is_between_marks(token)):
        return True
    return bool(_FORM.fullmatch(token)) and token.strip("</>").lower() not in _HTML


def _is_between_marks(token: str) -> bool:
    return not (token[0].isalnum() or token[-1].isalnum()) and any(character.isalnum() for character in token)


def plain_markup(text: str) -> list[str]:
    """Return what a text spells in the form of markup, each once, in order."""
    return list(dict.fromkeys(_FORM.findall(text)))


def _inside(positions: Iterable[int], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return those of some positions, in order, that lie inside of a span. Both are sorted."""
    inside, index, reached = [], 0, 0
    for position in positions:
        while index < len(spans) and spans[index][0] < position:
            reached = max(reached, spans[index][1])
            index += 1
        if position < reached:
            inside.append(position)
    return inside


def _alternation(texts: Sequence[str]) -> str:
    """Return a pattern of any of the texts, the longest first: a tree, so that thousands of them are quick to search."""
    if not texts:
        return r"(?!)"
    branches: dict[str, list[str]] = {}
    for text in texts:
        branches.setdefault(text[:1], []).append(text)
    may_end = branches.pop("", None) is not None
    parts = []
    for _, alike in sorted(branches.items()):
        shared = os.path.commonprefix(alike)
        rest = [text[len(shared) :] for text in alike]
        parts.append(re.escape(shared) + (_alternation(rest) if len(rest) > 1 else ""))
    joined = parts[0] if len(parts) == 1 and not may_end else f"(?:{'|'.join(parts)})"
    return f"{joined}?" if may_end else joined
