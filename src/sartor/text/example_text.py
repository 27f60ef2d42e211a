"""Text fields, words, sentences and code of an Example.

A step's option `field` selects messages: `reply` the last one, `replies` all assistant turns, `prompt` all user turns,
`system` the system messages, `all` every message. Rewriting also covers the rejected reply of a preference pair if the
chosen one is covered; filters look only at the chosen one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from sartor.core.records import Drop, Example, Message, drop_of

Field = Literal["reply", "replies", "prompt", "system", "all"]
FIELD_TEXT = "reply (the last), replies (the assistant's turns), prompt (the user's turns), system, or all"

_ROLES = {"replies": "assistant", "prompt": "user", "system": "system"}
# scripts without spaces between words, in which each character counts as a word
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['’][^\W{_UNSPACED}]+)*")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})[^\n]*\n(?:.*?^ {0,3}\1[^\n]*$|.*\Z)", re.M | re.S)
_INLINE = re.compile(r"(`{1,2})(?!`)[^`\n]+\1")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+|\S+@\S+\.\w+")
_BREAK = re.compile(r"([.!?…]+[\"'”’)\]]*)[ \t]+(?=(\S))|[。！？]+[」』”）]*")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:[^\W\d_]|\w\.\w|[Mm]rs?|[Mm]s|[Dd]rs?|[Pp]rof|[Ss]t|[Jj]r|[Ss]r|approx|ca|bl\.a|t\.ex|e\.g|i\.e|vs|kap|nr|Nr|"
    r"resp|bzw|z\.B|p\.ej|núm)\.$"
)
_CODE_LINE = re.compile(
    r"[;{}]\s*$|^\s*(?:def |class |import |from \w[\w.]* import |return\b|#include|for \(|if \(|while \(|const |let "
    r"|var |"
    r"function |public |private |SELECT |INSERT |UPDATE |\$ |>>> |</?\w)|^\s*[\w.\[\]]+ ?[-+*/]?= "
    r"?\S|^\s*[\w.]+\(.*\)\s*:?$"
)


def is_chosen(field: str, index: int, example: Example) -> bool:
    """Return whether a field includes message number `index`."""
    if field == "all":
        return True
    if field == "reply":
        return index == len(example.messages) - 1
    return example.messages[index].role == _ROLES[field]


def texts(example: Example, field: str, *, with_reasoning: bool = True) -> list[str]:
    """Return the non-blank texts of a field, in order; the reasoning of a reply is a text of its own before it."""
    result = []
    for index, message in enumerate(example.messages):
        if is_chosen(field, index, example):
            parts = (message.reasoning_content, message.text) if with_reasoning else (message.text,)
            result += [text for text in parts if text.strip()]
    return result


def rewritten(example: Example, change: Callable[[str], str], field: str, step: str) -> Example | Drop:
    """Return the Example with every text part of a field changed, and its reasoning; itself if nothing changes.

    A system message without remaining text is removed; any other turn without remaining text makes the row a Drop.
    """
    messages, emptied_turn = [], ""
    for index, message in enumerate(example.messages):
        after = _changed(message, change) if is_chosen(field, index, example) else message
        is_emptied = after is not message and _is_blank(after) and not _is_blank(message)
        if is_emptied and message.role != "system":
            emptied_turn = emptied_turn or f"turn {index + 1} ({message.role})"
        if not (is_emptied and message.role == "system"):
            messages.append(after)
    rejected = (
        example.rejected
        if field in ("prompt", "system")
        else tuple(_changed(turn, change) for turn in example.rejected)
    )
    if any(_is_blank(after) and not _is_blank(turn) for turn, after in zip(example.rejected, rejected, strict=True)):
        emptied_turn = emptied_turn or "the rejected reply"
    if emptied_turn:
        return drop_of(example, "nothing_left", f"nothing of {emptied_turn} is left", step=step)
    if _are_same(messages, example.messages) and _are_same(rejected, example.rejected):
        return example
    return replace(example, messages=tuple(messages), rejected=rejected)


def _changed(message: Message, change: Callable[[str], str]) -> Message:
    parts = []
    for part in message.content:
        text = change(part.text) if part.kind == "text" else part.text
        parts.append(part if text == part.text else replace(part, text=text))
    if message.reasoning_content and (reasoning := change(message.reasoning_content)) != message.reasoning_content:
        return replace(message, content=tuple(parts), reasoning_content=reasoning.strip() and reasoning)
    return message if _are_same(parts, message.content) else replace(message, content=tuple(parts))


def _are_same(first: object, second: object) -> bool:
    """Return whether two sequences hold the same objects."""
    return len(first) == len(second) and all(map(lambda a, b: a is b, first, second))  # type: ignore[arg-type, call-overload]


def _is_blank(message: Message) -> bool:
    return not message.tool_calls and not any(part.media or part.text.strip() for part in message.content)


def word_set(line: str) -> frozenset[str]:
    """Return the words of a line as a set, for word lists in code."""
    return frozenset(line.split())


def words(text: str) -> list[str]:
    """Return the words in lower case; single characters in scripts without spaces (Chinese, Japanese, Thai, ...)."""
    return _WORD.findall(text.lower())


def word_positions(text: str) -> list[tuple[str, int, int]]:
    """Return (word in lower case, start, end) of each word, with its characters [start, end) of the text."""
    return [(match.group().lower(), match.start(), match.end()) for match in _WORD.finditer(text)]


def begins_alike(text: str, other_text: str) -> bool:
    """Return whether two texts begin with the same word, as a fast check before a slow one."""
    first, second = _WORD.search(text), _WORD.search(other_text)
    return bool(first and second) and first.group().lower() == second.group().lower()  # type: ignore[union-attr]


def normal_line(text: str) -> str:
    """Return the normal form of a line or sentence: lower case, single spaces, no list mark."""
    return " ".join(text.split()).lstrip("-*•> ").casefold()


def sentences(line: str) -> list[str]:
    """Split a line into sentences, whose concatenation is the line.

    It is not split after an abbreviation or an initial.
    """
    parts, start = [], 0
    for match in _BREAK.finditer(line):
        following = match.group(2) or ""
        if match.group(1) == "." and (
            following.islower() or _ABBREVIATION.search(line[start : match.start() + 1][-12:])
        ):
            continue
        parts.append(line[start : match.end()])
        start = match.end()
    parts.append(line[start:])
    return [part for part in parts if part]


def without_code(text: str) -> str:
    """Return the prose of a text, without fenced and inline code, web and mail addresses."""
    if "```" in text or "~~~" in text:
        text = _FENCE.sub(" ", text)
    if "`" in text:
        text = _INLINE.sub(" ", text)
    return _ADDRESS.sub(" ", text) if "@" in text or "://" in text or "www." in text else text


def split_code(text: str) -> list[tuple[bool, str]]:
    """Split a text at its fenced and inline code into (whether it is code, piece).

    The concatenation of the pieces is the text.
    """
    if "`" not in text and "~~~" not in text:
        return [(False, text)]
    pieces: list[tuple[bool, str]] = []
    for is_fenced, piece in _split(_FENCE, text):
        pieces.extend([(True, piece)] if is_fenced else _split(_INLINE, piece))
    return pieces


def _split(pattern: re.Pattern[str], text: str) -> list[tuple[bool, str]]:
    pieces, start = [], 0
    for match in pattern.finditer(text):
        pieces += [(False, text[start : match.start()]), (True, match.group())]
        start = match.end()
    return [piece for piece in [*pieces, (False, text[start:])] if piece[1]]


def code_spans(text: str) -> list[tuple[int, int]]:
    """Return (start, end) of each piece of code in a text."""
    spans, at = [], 0
    for is_code, piece in split_code(text):
        if is_code:
            spans.append((at, at + len(piece)))
        at += len(piece)
    return spans


def is_json(text: str) -> bool:
    """Return whether a text is one JSON object or list."""
    text = text.strip()
    if text[:1] not in "{[" or text[-1:] not in "}]":
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def is_code(text: str) -> bool:
    """Return whether at least half of a text's lines look like source code, markup or a command."""
    lines = [line for line in text.split("\n") if line.strip()]
    return bool(lines) and 2 * sum(bool(_CODE_LINE.search(line[:500])) for line in lines) >= len(lines)
