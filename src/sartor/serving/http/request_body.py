"""Bounded, strict JSON body reading, by `core.strict_json`.

A body that this module refuses never reaches pydantic, a chat template or a file.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from typing import Any

from sartor.core import strict_json
from sartor.core.errors import BusyError, RequestError
from sartor.core.strict_json import MOST_NESTED, StrictJsonError

# Total of all bodies being read at once. Without it, many clients below the limit of one body could fill the memory.
MOST_HELD_BYTES = 256 << 20

# Run of base64 in JSON, with slashes that some writers escape. It holds no structure, so parsing it costs little.
_RUN = re.compile(rb"(?<![A-Za-z0-9+/=\\])[A-Za-z0-9+/=\\]{256,}")  # the look-behind keeps the search linear
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
    if (depth := strict_json.nested(body)) > MOST_NESTED:
        raise RequestError(
            f"the JSON is nested {depth} deep; the limit is {MOST_NESTED}",
            f"send objects and arrays at most {MOST_NESTED} deep",
        )
    is_suspect = _SUSPECT.search(body) is not None
    if isinstance(body, bytearray):
        body.clear()
    try:
        value = strict_json.parse_text(text, "the body")
    except StrictJsonError as error:
        raise RequestError(error.problem, error.remedy) from None
    if is_suspect:
        _check_texts(value)
    return value


def check_weight(body: bytes | bytearray, limit_bytes: int) -> None:
    """Raise TooLargeError if the body without its long base64 runs exceeds `limit_bytes`.

    Everything but such runs takes many times its size in memory when parsed.
    """
    if (
        len(body) > limit_bytes
        and (rest := len(body) - sum(run.end() - run.start() for run in _RUN.finditer(body))) > limit_bytes
    ):
        raise too_large(rest, limit_bytes)


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
