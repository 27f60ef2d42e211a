"""Class that a JSON reply names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from sartor.core.errors import ArtifactError
from sartor.core.records import canonical_text

# name of the field that is the whole reply
WHOLE = "."
_DECODER = json.JSONDecoder()
_BLANKS = re.compile(r"[ \t\n\r]*")


def value_at(data: Any, field: str) -> tuple[bool, Any]:
    """Return whether `data` has the field, and its value.

    field: keys of objects joined by dots; a key may itself contain dots.

    >>> value_at({"a": {"b": 1}}, "a.b")
    (True, 1)
    """
    if not isinstance(data, dict):
        return False, None
    if field in data:
        return True, data[field]
    for index, letter in enumerate(field):
        if letter == "." and field[:index] in data:
            return value_at(data[field[:index]], field[index + 1 :])
    return False, None


def parse_reply(reply: str) -> Any:
    """Return the JSON value of a reply, or None if it is no JSON."""
    try:
        return json.loads(reply)
    except (ValueError, RecursionError):
        return None


def is_json(reply: str) -> bool:
    """Return whether a reply is one JSON object or list."""
    return isinstance(parse_reply(reply), dict | list)


def is_no_object(reply_so_far: str) -> bool:
    """Return whether no continuation of a reply is a JSON object, judged by its first character.

    >>> is_no_object(" The"), is_no_object(" {"), is_no_object("")
    (True, False, False)
    """
    position = _blanks(reply_so_far, 0)
    return position < len(reply_so_far) and reply_so_far[position] != "{"


def label_of(reply: str, field: str) -> str | None:
    """Return the class that a reply names at `field`, or None if it is no JSON or lacks the field.

    A string is its own label, another value its JSON. The field `.` is the whole reply without the space around it.

    >>> label_of('{"defect": "hole", "at": {"zone": 3}}', "at.zone")
    '3'
    """
    if field == WHOLE:
        return reply.strip()
    has_field, value = value_at(parse_reply(reply), field)
    return text_of(value) if has_field else None


def text_of(value: Any) -> str:
    """Return a JSON value as a label, which UTF-8 and so a Report can hold."""
    if not isinstance(value, str):
        return canonical_text(value)
    # JSON may escape half of a surrogate pair, as "\ud83d"
    return value.encode("utf-8", "replace").decode()


def span_of(reply: str, field: str) -> tuple[int, int]:
    """Return the characters [start, end) of a label in a reply that has one.

    A string's span excludes its quotation marks.

    >>> '{"a": {"b": "yes"}}'[slice(*span_of('{"a": {"b": "yes"}}', "a.b"))]
    'yes'
    """
    if field == WHOLE:
        return len(reply) - len(reply.lstrip()), len(reply.rstrip())
    start, end = _find(reply, _blanks(reply, 0), field)
    return (start + 1, end - 1) if reply[start] == '"' and end - start > 2 else (start, end)


def known_fields(replies: Iterable[str]) -> list[str]:
    """Return the fields of the JSON replies, for an error message."""
    fields: dict[str, None] = {}
    for reply in replies:
        data = parse_reply(reply)
        fields |= dict.fromkeys(data if isinstance(data, dict) else ())
    return list(fields)


def _find(text: str, start: int, field: str) -> tuple[int, int]:
    """Return the span of the value of `field` in the object that begins at `start`.

    As in `json`, the last of equal keys wins.
    """
    members = _members(text, start) if text[start : start + 1] == "{" else {}
    if field in members:
        return members[field]
    prefixes = [field[:index] for index, letter in enumerate(field) if letter == "."]
    key = next((prefix for prefix in prefixes if prefix in members), None)
    if key is None:
        raise ArtifactError(f"a reply has no field {field[:80]!a}", "--label with a field that every reply has")
    return _find(text, members[key][0], field[len(key) + 1 :])


def _members(text: str, start: int) -> dict[str, tuple[int, int]]:
    """Return key -> [start, end) of its value, for the object that begins at `start`."""
    result: dict[str, tuple[int, int]] = {}
    position = _blanks(text, start + 1)
    while text[position] == '"':
        key, position = _DECODER.raw_decode(text, position)
        value_start = _blanks(text, _blanks(text, position) + 1)  # after the colon
        _, end = _DECODER.raw_decode(text, value_start)
        result[key] = value_start, end
        position = _blanks(text, _blanks(text, end) + 1)  # after the comma, or the end
        if position >= len(text):
            break
    return result


def _blanks(text: str, position: int) -> int:
    """Return the position after the JSON white space at `position`."""
    match = _BLANKS.match(text, position)
    return match.end() if match else position
