r"""Rows that name their media beside the turns, and say by a mark in the text where each stands: LLaVA's form and its heirs'.

{"conversations": [{"from": "human", "value": "<image>\nWhat is wrong?"}, ...], "image": "a.png"}
{"messages": [{"role": "user", "content": "<image> or <image>?"}, ...], "images": ["a.png", "b.png"]}
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sartor.core.records import Malformed

_MARK = re.compile(r"\n?<(image|audio)>\n?")
_FIELDS = {"image": ("image", "images"), "audio": ("audio", "audios")}


def placed(row: Mapping[str, Any], turns: Any) -> Any:
    """The turns with each mark in their texts, or part without a value, replaced by the media that the row names, in order.

    Texts of a row that names none are left as they are. Raises Malformed unless there are as many marks as media.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        return turns
    named = {kind: _named(row, kind) for kind in _FIELDS}
    left = {kind: iter(found) for kind, found in named.items()}
    counts = dict.fromkeys(_FIELDS, 0)
    made = [_turn(turn, left, counts, has_marks=any(named.values())) for turn in turns]
    for kind, found in named.items():
        if counts[kind] != len(found):
            problem = f"the turns hold {counts[kind]} <{kind}> and the row names {len(found)}: each mark is one {kind}"
            raise Malformed("placeholder_count", problem)
    return made


def asked(row: Mapping[str, Any], text: str) -> list[dict[str, Any]]:
    """The content of a question: its text with the media that the row names where its marks stand, or before it."""
    marks = "".join(f"<{kind}>" for kind in _FIELDS for _ in _named(row, kind))
    text = text if _MARK.search(text) or not marks else marks + text
    (turn,) = placed(row, [{"content": text}])
    return turn["content"] if marks else [{"type": "text", "text": text}]


def _named(row: Mapping[str, Any], kind: str) -> list[Any]:
    """The media of a kind that the row names beside its turns."""
    for field in _FIELDS[kind]:
        value = row.get(field)
        if isinstance(value, str) and value.lstrip().startswith("["):  # a list as a cell of a CSV file has it
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        if value is not None and value != "" and value != []:
            return list(value) if isinstance(value, list | tuple) else [value]
    return []


def _turn(turn: Any, left: Mapping[str, Iterator[Any]], counts: dict[str, int], *, has_marks: bool) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    content = turn.get("content")
    if isinstance(content, str) and has_marks:
        parts = list(_parts(content, left, counts))
    elif isinstance(content, Sequence) and not isinstance(content, str):
        parts = [_part(part, left, counts) for part in content]
    else:
        return turn
    return {**turn, "content": parts}


def _parts(text: str, left: Mapping[str, Iterator[Any]], counts: dict[str, int]) -> Iterator[dict[str, Any]]:
    ended = 0
    for mark in _MARK.finditer(text):
        if before := text[ended : mark.start()]:
            yield {"type": "text", "text": before}
        yield _part({"type": mark[1]}, left, counts)
        ended = mark.end()
    if rest := text[ended:]:
        yield {"type": "text", "text": rest}


def _part(part: Any, left: Mapping[str, Iterator[Any]], counts: dict[str, int]) -> Any:
    """A part of media without a value takes the next that the row names; one beyond them is counted and left."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _FIELDS or any(part.get(name) is not None for name in (kind, "image_url", "input_audio")):
        return part
    counts[kind] += 1
    return {**part, kind: next(left[kind], None)}
