"""Spans of personal data in normalised text."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

EntityName = Literal[
    "email",
    "phone",
    "credit_card",
    "iban",
    "national_id",
    "ip_address",
    "mac_address",
    "secret",
    "crypto_wallet",
    "address",
    "birth_date",
    "person",
]
ENTITIES: tuple[str, ...] = get_args(EntityName)
PLACEHOLDER = re.compile(rf"<({'|'.join(name.upper() for name in ENTITIES)})(?:_(\d+))?>")
BREAK = "\x00"  # separates the fields of a row; patterns do not match across it, context words may precede it

# Characters may be written as JSON or HTML escapes: `bob\u0040example.com`, `0151&nbsp;234`. JSON escapes are decoded
# only in raw JSON text, where "\n0151" would otherwise be read as the word "n0151".
HTML = r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|nbsp|commat|period|hyphen);"
JSON = r"\\u[0-9a-fA-F]{4}|\\[nrtbf\"\\/]"
ODD = re.compile(rf"[^\x00-\x7f]|{HTML}")
ODD_OR_ESCAPED = re.compile(rf"[^\x00-\x7f]|{HTML}|{JSON}")
Span = tuple[int, int]
NAMED = {"nbsp": " ", "commat": "@", "period": ".", "hyphen": "-"}
LETTER_ESCAPES = {"n": "\n", "r": "\n", "t": "\t", "b": " ", "f": " "}
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
# characters that may disguise data: spaces, dashes, digits and compatibility forms, but not accented letters
MAY_HIDE = re.compile(
    "[\u00a0\u00ad\u00b2\u00b3\u00b9\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u2000-\u206f\u2070-\u209c\u2212\u2460-\u24ff\u2776-\u2793"
    "\u3000\u3164\ufe00-\ufe0f\ufe50-\ufe6f\ufeff\uff01-\uff5e\uff61\uffa0\U0001d400-\U0001d7ff\U0001f100-\U0001f10a\U000e0000-\U000e01ef]"
    r"|[^\D0-9]"
)


@dataclass(frozen=True, slots=True)
class PiiEntity:
    """Span of personal data.

    entity: kind.
    subtype: finer kind (`aws_key`).
    score: confidence, 0..1.
    value: equal for different spellings of one value (+49 30 1234567, 0049 30 123 45 67). It is never written or
    shown.
    """

    start: int
    end: int
    entity: str
    subtype: str
    score: float
    value: str = field(repr=False)

    def touches(self, start: int, end: int) -> bool:
        """Return whether the span shares a character with another one."""
        return self.start < end and start < self.end


@dataclass(frozen=True)
class NormalizedText:
    """Text with disguises removed.

    flat: the text with digits of any script as 0-9, without invisible characters, and with escapes decoded.
    starts: position of each character of `flat` in the original text; None if both texts are equal.
    length: length of the original text.
    """

    flat: str
    starts: Sequence[int] | None
    length: int

    @cached_property
    def lower(self) -> str:
        """`flat` in lower case, for a fast check for words; its length may differ."""
        return self.flat.lower()

    @cached_property
    def numbers(self) -> list[Span]:
        """Spans of all unbroken sequences of digits."""
        if not any(digit in self.flat for digit in "0123456789"):  # ten times faster than a pattern without a match
            return []
        return [match.span() for match in _NUMBER.finditer(self.flat)]

    @cached_property
    def runs(self) -> list[Span]:
        """Spans of six or more digits, with at most three separators between two digits."""
        result: list[Span] = []
        begin, last, count = 0, -9, 0
        for start, end in [*self.numbers, (len(self.flat) + 9, 0)]:
            gap = self.flat[last:start]
            if start - last <= 3 and not gap.strip(" .()/-") and "\n" not in gap:
                count += end - start
            else:
                if count >= 6:
                    result.append((begin, last))
                begin, count = start, end - start
            last = end
        return result

    @cached_property
    def tokens(self) -> list[Span]:
        """Spans of words of letters, digits, `_` and `-` with a digit and another character: ids, keys."""
        result: list[Span] = []
        for start, end in self.numbers:
            if result and end <= result[-1][1]:
                continue
            if _IN_WORD(self.at(start - 1)) or _IN_WORD(self.at(end)):
                while start and _IN_WORD(self.flat[start - 1]):
                    start -= 1
                while end < len(self.flat) and _IN_WORD(self.flat[end]):
                    end += 1
                result.append((start, end))
        return result

    def has(self, *words: str) -> bool:
        """Return whether one of the words (in lower case) occurs."""
        return any(word in self.lower for word in words)

    def before(self, position: int, max_chars: int = 48) -> str:
        """Return up to `max_chars` characters before a position."""
        return self.flat[max(0, position - max_chars) : position]

    def at(self, position: int) -> str:
        """Return the character at a position; a space outside the text."""
        return self.flat[position] if 0 <= position < len(self.flat) else " "

    def in_source(self, finding: PiiEntity) -> PiiEntity:
        """Return the finding with positions in the original text."""
        if self.starts is None:
            return finding
        last = self.starts[finding.end] if finding.end < len(self.starts) else self.length
        return replace(finding, start=self.starts[finding.start], end=last)


_NUMBER = re.compile("[0-9]+")
_IN_WORD = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-").__contains__
Recogniser = Callable[[NormalizedText], Iterable[PiiEntity]]


def normalize(text: str, *, escapes: bool = False) -> NormalizedText:
    r"""Return a text with disguises removed.

    escapes: the text may be raw JSON, in which `\u0040` and `\n` are decoded.
    """
    has_escapes = escapes and "\\" in text
    if not has_escapes and "&" not in text and (text.isascii() or MAY_HIDE.search(text) is None):
        return NormalizedText(text, None, len(text))
    pieces: list[str] = []
    starts: list[int] = []
    at = 0
    for match in (ODD_OR_ESCAPED if has_escapes else ODD).finditer(text):
        plain = _plain(match[0])
        if plain == match[0]:
            continue
        pieces += (text[at : match.start()], plain)
        starts += range(at, match.start())
        starts += [match.start()] * len(plain)
        at = match.end()
    pieces.append(text[at:])
    starts += range(at, len(text))
    return NormalizedText("".join(pieces), starts, len(text))


def _plain(raw: str) -> str:
    """Return the plain form of a character or an escape; "" for an invisible one."""
    if len(raw) > 1:
        return _unescaped(raw)
    if raw in DASHES:
        return "-"
    category = unicodedata.category(raw)
    if category == "Cf" or raw in "\u034f\u115f\u1160\u3164\uffa0\u17b4\u17b5" or "\ufe00" <= raw <= "\ufe0f":
        return ""
    if category in ("Zs", "Zl", "Zp"):
        return " "
    digit = unicodedata.digit(raw, None)
    if digit is not None:
        return str(digit)
    folded = unicodedata.normalize("NFKC", raw)
    return folded if len(folded) == 1 and folded.isascii() else raw


def _unescaped(escape: str) -> str:
    if escape.startswith("\\u"):
        return _shown(int(escape[2:], 16), escape)
    if escape.startswith("\\"):
        return LETTER_ESCAPES.get(escape[1], escape[1])
    if escape.startswith("&#"):
        number = escape[2:-1]
        return _shown(int(number[1:], 16) if number[0] in "xX" else int(number), escape)
    return NAMED[escape[1:-1]]


def _shown(code: int, escape: str) -> str:
    if code == 0 or code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        return escape
    return chr(code) if code < 128 else _plain(chr(code))


def resolve_overlaps(findings: Iterable[PiiEntity]) -> list[PiiEntity]:
    """Return findings without overlaps, in order.

    Of two that overlap, the one of higher score (rounded to one decimal) stays, then the longer one. It is extended by
    the part that only the other covers, so that no part of a value remains unmasked.
    """
    resolved: list[PiiEntity] = []
    group: list[PiiEntity] = []  # findings connected by overlaps
    end = 0
    for finding in sorted(findings, key=lambda finding: finding.start):
        if group and finding.start >= end:
            resolved += _resolve_group(group)
            group = []
        end = max(end, finding.end) if group else finding.end
        group.append(finding)
    return resolved + _resolve_group(group)


def _resolve_group(group: list[PiiEntity]) -> list[PiiEntity]:
    if len(group) < 2:
        return group
    starts: list[int] = []
    resolved: list[PiiEntity] = []
    for finding in sorted(
        group,
        key=lambda finding: (-round(finding.score, 1), finding.start - finding.end, finding.start, finding.entity),
    ):
        position = bisect_right(starts, finding.start)
        touching = [
            index
            for index in (position - 1, position)
            if 0 <= index < len(resolved) and resolved[index].touches(finding.start, finding.end)
        ]
        if not touching:
            starts.insert(position, finding.start)
            resolved.insert(position, finding)
            continue
        index = touching[0]
        end_limit = min(finding.end, resolved[index + 1].start) if index + 1 < len(resolved) else finding.end
        start_limit = max(finding.start, resolved[index - 1].end) if index else finding.start
        resolved[index] = replace(
            resolved[index], start=min(resolved[index].start, start_limit), end=max(resolved[index].end, end_limit)
        )
        starts[index] = resolved[index].start
    return resolved


def outside_placeholders(findings: list[PiiEntity], text: str) -> list[PiiEntity]:
    """Return the findings that do not touch an existing placeholder."""
    if not findings or "<" not in text:
        return findings
    spans = [match.span() for match in PLACEHOLDER.finditer(text)]
    starts = [start for start, _ in spans]

    def free(finding: PiiEntity) -> bool:
        index = bisect_right(starts, finding.end - 1) - 1
        return index < 0 or spans[index][1] <= finding.start

    return [finding for finding in findings if free(finding)]


def digits(text: str) -> str:
    """Return the digits of a text."""
    return "".join(filter(str.isdigit, text))


def matches(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, text) of group 1 of each match, or of the whole match without groups."""
    group = 1 if pattern.groups else 0
    for match in pattern.finditer(text):
        if match[group]:
            yield match.start(group), match.end(group), match[group]
