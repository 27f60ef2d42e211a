"""Strict JSON: one text has one value.

The standard parser accepts NaN, keeps the last of two equal keys, and recurses as deep as the text. Another parser
keeps the first of two keys, so that a signature over "the value" would cover two values. Everything that is signed,
and every body of a request, is read by this module.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MOST_NESTED = 64
MOST_DIGITS = 40

# Bytes that `nested` handles at once. Each needs about five numbers of 8 bytes, so larger pieces could outweigh the
# text.
_PIECE = 1 << 16
_ESCAPE = re.compile(rb"\\+.?", re.DOTALL)
_STRING = re.compile(rb'"[^"]*(?:"|\Z)')  # of a text without escaped characters
_BRACKET = re.compile(rb"[\[\]{}]")


class StrictJsonError(ValueError):
    """Text that is no strict JSON.

    problem: what is wrong with it. remedy: what its writer should do.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


def loads(document: bytes | bytearray | str, *, max_nested: int = MOST_NESTED, takes_infinity: bool = False) -> Any:
    """Return the value of a JSON text.

    max_nested: depth of brackets above which the text is refused; it bounds the parser's recursion.
    takes_infinity: whether NaN and infinities are numbers, as Python writes them.
    Raises StrictJsonError for a text that is not UTF-8 or not JSON, for a key that stands twice in one object, for NaN
    and infinities, for numbers that are too long or too large, and for brackets that are nested too deeply.
    """
    content = document.encode("utf-8", "surrogatepass") if isinstance(document, str) else document
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"the text is not UTF-8 at byte {error.start}", "write JSON in UTF-8") from None
    if (depth := nested(content)) > max_nested:
        raise StrictJsonError(
            f"the JSON is nested {depth} deep; the limit is {max_nested}",
            f"send objects and arrays at most {max_nested} deep",
        )
    return parse_text(text, takes_infinity=takes_infinity)


def parse_text(text: str, subject: str = "the text", *, takes_infinity: bool = False) -> Any:
    """Return the value of a JSON text whose nesting the caller has checked with `nested`. Raises as `loads`.

    subject: name of the text, for errors.
    """
    try:
        return json.loads(
            text,
            parse_constant=float if takes_infinity else _refuse_constant,
            parse_int=_integer,
            parse_float=_real,
            object_pairs_hook=unique_keys,
        )
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise StrictJsonError(
            f"{subject} is not JSON: {error.msg} at {position}", "check it with `python -m json.tool`"
        ) from None


def nested(document: bytes | bytearray) -> int:
    """Return the nesting depth of brackets outside strings.

    Takes linear time, and copies no large text. A backslash outside a string is invalid JSON; the depth from there
    on may be wrong, but the parser stops at it.
    """
    deepest = depth = quotes = start = 0
    if len(document) <= _PIECE:  # without numpy, which a small device need not load for the manifests that it reads
        plain = document.replace(b"\\\\", b"").replace(b'\\"', b"")
        for bracket in _BRACKET.findall(_STRING.sub(b"", plain)):
            depth += 1 if bracket in b"[{" else -1
            deepest = max(deepest, depth)
        return deepest

    import numpy as np  # a large text: reads it at once, whatever is in it

    steps = np.zeros(256, dtype=np.int8)
    steps[list(b"[{")], steps[list(b"]}")] = 1, -1
    while start < len(document):
        end = start + _PIECE
        if match := _ESCAPE.match(document, end - 1):  # an escaped character belongs to the same piece
            end = match.end()
        signs = np.frombuffer(document[start:end].replace(b"\\\\", b"").replace(b'\\"', b""), dtype=np.uint8)
        start = end
        if not len(signs):
            continue
        counts = np.cumsum(signs == ord('"')) + quotes
        depths = np.cumsum(steps[signs] * (counts % 2 == 0), dtype=np.int64) + depth
        deepest, depth, quotes = max(deepest, int(depths.max())), int(depths[-1]), int(counts[-1])
    return deepest


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's members, for `object_pairs_hook`. Raises StrictJsonError for a key that stands twice."""
    result = dict(pairs)
    if len(result) < len(pairs):
        earlier_keys: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in earlier_keys or earlier_keys.add(key))  # type: ignore[func-returns-value]
        raise StrictJsonError(f"the key {duplicate[:80]!a} stands twice in one object", "send the key once")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise StrictJsonError(f"the JSON holds {name}, which JSON does not have", "send null, or a number")


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise StrictJsonError(
            f"a number of {len(text)} digits; the limit is {MOST_DIGITS}",
            f"send a number of at most {MOST_DIGITS} digits",
        )
    return int(text)


def _real(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise StrictJsonError(
            f"the number {text[:MOST_DIGITS]} is too large for a double", "send a number below 1.8e308"
        )
    return value
