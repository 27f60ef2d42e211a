"""Conversion of Markdown and JSON to speakable text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import regex
from markdown_it import MarkdownIt
from markdown_it.token import Token

from sartor.media.speech.voice import clean, is_sayable

# Spoken in place of a code block, which cannot be spoken but should be noticed by the listener
CODE = "code"
_ADDRESS = regex.compile(
    r"\b(?:https?|ftp)://[^\s<>\"'`]*[^\s<>\"'`.,;:!?)\]}]|\bwww\.[^\s<>\"'`]*[^\s<>\"'`.,;:!?)\]}]"
)
# Emojis; ©, ® and ™ are spoken
_EMOJI = regex.compile(
    r"(?![©®™])(?:[\p{Extended_Pictographic}\p{Regional_Indicator}\p{Emoji_Modifier}]\p{M}*\u200d?)+|[\ufe0f\u20e3]+"
)
_TAG = regex.compile(r"<[^<>]*>")
_IDENTIFIER = regex.compile(r"[A-Za-z_$][\w$.-]*")
_SEAM = regex.compile(r"(?<=\p{Ll}|\d)(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})|(?<=\w)_+(?=\w)")
_ENDS = (".", "!", "?", "…", ":", "。", "！", "？")


@dataclass(frozen=True)
class Spoken:
    """Spoken form of a text.

    left_out: number of replaced or omitted items, by kind: `code`, `address`, `emoji`, `markup`.
    """

    text: str
    left_out: Mapping[str, int] = field(default_factory=dict)


def spoken(written: str) -> Spoken:
    """Return the spoken form of a reply in Markdown, JSON or plain text.

    Its text is "" if nothing in it can be spoken.
    """
    left_out: Counter[str] = Counter()
    # U+FFFD replaces bytes that could not be decoded
    written = written.replace("\0", " ").replace("\ufffd", "")
    value = _json(written)
    sentences = _sentences_of(value, left_out) if value is not None else _markdown(written, left_out)
    lines = []
    for sentence in sentences:
        line = clean(sentence).replace("\n", " ")
        if is_sayable(line):
            line = line.rstrip(" ,;-")
            lines.append(line if line.endswith(_ENDS) else line + ".")
    return Spoken("\n".join(lines), dict(left_out))


def _json(text: str) -> Any:
    """Return the JSON object or list that a text is, or None."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _sentences_of(value: Any, left_out: Counter[str]) -> Iterator[str]:
    """Yield a sentence for each key with its value of a JSON object, or for each item of a list."""
    try:
        if isinstance(value, Mapping):
            yield from [f"{_words(key)}: {_value(inner, left_out)}" for key, inner in value.items()]
        else:
            yield from [_value(inner, left_out) for inner in value]
    except RecursionError:  # nested almost too deeply for json.loads
        left_out["code"] += 1
        yield CODE


def _value(value: Any, left_out: Counter[str]) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)}: {_value(inner, left_out)}" for key, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_value(inner, left_out) for inner in value) or "none"
    if isinstance(value, str):
        return _plain(_words(value) if _IDENTIFIER.fullmatch(value) else value, left_out)
    return "none" if value is None else json.dumps(value)


def _words(name: str) -> str:
    """Return an identifier such as HassTurnOn or turn_on as separate words."""
    return str(_SEAM.sub(" ", name))


def _plain(text: str, left_out: Counter[str]) -> str:
    """Return a text with addresses replaced by their host, without emojis and underscores inside words."""

    def host(match: regex.Match[str]) -> str:
        left_out["address"] += 1
        address = match[0] if "://" in match[0] else f"//{match[0]}"
        try:
            return (urlsplit(address).hostname or "").removeprefix("www.")
        except ValueError:
            return ""

    text, emojis = _EMOJI.subn("", _ADDRESS.sub(host, text))
    if emojis:
        left_out["emoji"] += emojis
    return str(regex.sub(r"(?<=\w)_+(?=\w)", " ", text))


@cache
def _parser() -> MarkdownIt:
    # Indented text is not treated as code, since replies are indented for many reasons
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).disable("code")


def _markdown(text: str, left_out: Counter[str]) -> Iterator[str]:
    """Yield the sentences of a Markdown text: paragraphs, headings, list items, table rows."""
    reader = _TokenReader(left_out)
    for token in _parser().parse(text):
        yield from reader.hear(token)


class _TokenReader:
    """Converter of Markdown tokens to sentences."""

    def __init__(self, left_out: Counter[str]) -> None:
        self._left_out = left_out
        self._numbers: list[str] = []
        self._head: list[str] = []
        self._rows = 0
        self._row: list[str] | None = None

    def hear(self, token: Token) -> Iterator[str]:
        """Process one token and yield the sentences that it completes."""
        match token.type:
            case "list_item_open":
                self._numbers.append(token.info)
            case "list_item_close":
                # an item without words is only its number, as in `42.`
                yield self._numbers.pop()
            case "fence":
                yield from self._fence(token)
            case "html_block":
                self._left_out["markup"] += 1
                yield _plain(_TAG.sub(" ", token.content), self._left_out)
            case "table_open":
                self._head, self._rows = [], 0
            case "tr_open":
                self._row = []
            case "tr_close":
                yield from self._end_row()
            case "table_close" if not self._rows:
                yield ", ".join(self._head)
            case "inline":
                yield from self._words(_inline(token.children or (), self._left_out))
            case _:
                pass

    def _words(self, text: str) -> Iterator[str]:
        if self._row is not None:
            self._row.append(text)
            return
        number = self._numbers[-1] if self._numbers else ""
        if number and is_sayable(text):
            self._numbers[-1] = ""
        yield f"{number}: {text}" if number else text

    def _end_row(self) -> Iterator[str]:
        """Yield a table row with its column heads, since a listener sees no columns."""
        row, self._row = self._row or [], None
        if not self._head:
            self._head = row
            return
        self._rows += 1
        cells = [
            f"{head}: {cell}" if is_sayable(head) else cell
            for head, cell in zip(self._head, row, strict=False)
            if cell
        ]
        yield ", ".join(cells)

    def _fence(self, token: Token) -> Iterator[str]:
        value = _json(token.content)
        if value is not None:
            yield from _sentences_of(value, self._left_out)
            return
        self._left_out["code"] += 1
        yield CODE


def _inline(tokens: Sequence[Token], left_out: Counter[str]) -> str:
    """Return the words of a line: the text of a link, the alternative text of an image."""
    words = []
    for token in tokens:
        if token.type in ("text", "code_inline", "image"):
            words.append(token.content)
        elif token.type == "softbreak":
            words.append(" ")
        elif token.type == "hardbreak":
            words.append(". ")
        elif token.type == "html_inline":
            left_out["markup"] += 1
    return _plain("".join(words), left_out).strip()
