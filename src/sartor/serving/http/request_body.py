"""Bounded, strict JSON body reading.

The standard parser accepts NaN, keeps the last of two equal keys, and recurses as deep as the text. A body that this
module refuses never reaches pydantic, a chat template or a file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn

import numpy as np

from sartor.core.errors import BusyError, RequestError

MOST_NESTED = 64
MOST_DIGITS = 40
# Total of all bodies being read at once. Without it, many clients below the limit of one body could fill the memory.
MOST_HELD_BYTES = 256 << 20

# Bytes that `nested` handles at once. Each needs about five numbers of 8 bytes, so larger pieces could outweigh the
# body.
_PIECE = 1 << 16
# Run of base64 in JSON, with slashes that some writers escape. It holds no structure, so parsing it costs little.
_RUN = re.compile(rb"(?<![A-Za-z0-9+/=\\])[A-Za-z0-9+/=\\]{256,}")  # the look-behind keeps the search linear
_ESCAPE = re.compile(rb"\\+.?", re.DOTALL)
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
# A body without any of these has no forbidden character in a text. The parser itself refuses unescaped control
# characters.
_SUSPECT = re.compile(rb"\\u(?:00[01]|007[fF]|[dD][89a-fA-F])|\\[bf]|\x7f")
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class TooLargeError(RequestError):
    """Body above its size limit."""


class MediaTypeError(RequestError):
    """Body that is not announced as unpacked JSON."""


class SlowBodyError(RequestError):
    """Body that did not arrive in time."""


class BodyReader:
    """Reader that bounds the total size of all bodies being read at once.

    held_bytes: size of the bodies being read now.
    """

    def __init__(self, max_bytes: int = MOST_HELD_BYTES) -> None:
        self.max_bytes = max_bytes
        self.held_bytes = 0

    async def read_body(self, chunks: AsyncIterator[bytes], headers: Mapping[str, str], limit_bytes: int) -> bytearray:
        """Return the body, with its size checked while it arrives.

        Raises TooLargeError above `limit_bytes`; BusyError if all bodies together exceed `max_bytes`.
        """
        content_length = headers.get("content-length", "")
        if content_length.isdecimal() and int(content_length[:20]) > limit_bytes:
            raise too_large(int(content_length[:20]), limit_bytes)
        body = bytearray()
        try:
            async for chunk in chunks:
                self.held_bytes += len(chunk)
                body += chunk
                if len(body) > limit_bytes:
                    raise too_large(None, limit_bytes)
                if self.held_bytes > self.max_bytes:
                    raise BusyError(
                        f"the requests that are being read hold {self.held_bytes} bytes; {self.max_bytes} are allowed",
                        "send it again after the seconds of Retry-After",
                    )
        finally:
            self.held_bytes -= len(body)
        return body


def too_large(size: int | None, limit_bytes: int) -> TooLargeError:
    """Return the error for a body above its limit.

    size: bytes of the body; None if reading stopped at the limit.
    """
    text = f"{size} bytes" if size is not None else f"more than {limit_bytes} bytes"
    return TooLargeError(
        f"the request's body has {text}; the limit is {limit_bytes}",
        "send less, or raise limits.body_bytes in TEAM.yaml",
    )


def parse(body: bytes | bytearray) -> Any:
    """Return the value of a JSON text.

    Raises RequestError for invalid or non-strict JSON, and for texts with forbidden characters.
    A bytearray is emptied: a body with media, its text and its value together would take three times its size.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8 at byte {error.start}", "send JSON in UTF-8") from None
    if (depth := nested(body)) > MOST_NESTED:
        raise RequestError(
            f"the JSON is nested {depth} deep; the limit is {MOST_NESTED}",
            f"send objects and arrays at most {MOST_NESTED} deep",
        )
    is_suspect = _SUSPECT.search(body) is not None
    if isinstance(body, bytearray):
        body.clear()
    try:
        value = json.loads(
            text, parse_constant=_constant, parse_int=_whole, parse_float=_real, object_pairs_hook=_unlike_keys
        )
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise RequestError(
            f"the body is not JSON: {error.msg} at {position}", "check it with `python -m json.tool`"
        ) from None
    if is_suspect:
        _check_texts(value)
    return value


def nested(body: bytes | bytearray) -> int:
    """Return the nesting depth of brackets outside strings.

    Takes linear time and does not copy the body. A backslash outside a string is invalid JSON; the depth from there
    on may be wrong, but the parser stops at it.
    """
    deepest = depth = quotes = start = 0
    while start < len(body):
        end = start + _PIECE
        if match := _ESCAPE.match(body, end - 1):  # an escaped character belongs to the same piece
            end = match.end()
        signs = np.frombuffer(body[start:end].replace(b"\\\\", b"").replace(b'\\"', b""), dtype=np.uint8)
        start = end
        if not len(signs):
            continue
        counts = np.cumsum(signs == ord('"')) + quotes
        depths = np.cumsum(_STEPS[signs] * (counts % 2 == 0), dtype=np.int64) + depth
        deepest, depth, quotes = max(deepest, int(depths.max())), int(depths[-1]), int(counts[-1])
    return deepest


def check_weight(body: bytes | bytearray, limit_bytes: int) -> None:
    """Raise TooLargeError if the body without its long base64 runs exceeds `limit_bytes`.

    Everything but such runs takes many times its size in memory when parsed.
    """
    if (
        len(body) > limit_bytes
        and (rest := len(body) - sum(run.end() - run.start() for run in _RUN.finditer(body))) > limit_bytes
    ):
        raise too_large(rest, limit_bytes)


def _constant(name: str) -> NoReturn:
    raise RequestError(f"the JSON holds {name}, which JSON does not have", "send null, or a number")


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise RequestError(
            f"a number of {len(text)} digits; the limit is {MOST_DIGITS}",
            f"send a number of at most {MOST_DIGITS} digits",
        )
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RequestError(f"the number {text[:MOST_DIGITS]} is too large for a double", "send a number below 1.8e308")
    return value


def _unlike_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        earlier_keys: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in earlier_keys or earlier_keys.add(key))  # type: ignore[func-returns-value]
        raise RequestError(f"the key {duplicate[:80]!a} stands twice in one object", "send the key once")
    return result


def _check_texts(value: Any) -> None:
    """Raise RequestError for lone surrogates and control characters (except tab and line ends).

    Neither files nor chat templates accept them.
    """
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str) and (match := _NOT_TEXT.search(item)):
            kind = "half of a surrogate pair" if match[0] >= "\ud800" else "control character"
            raise RequestError(
                f"a text of the request holds the {kind} U+{ord(match[0]):04X} at place {match.start()}",
                "leave it out; tab and line ends are allowed",
            )
