"""JSON-lines messages and errors between processes.

To the worker. `ask` is a number that the answer repeats.

    {"op": "open", "engine": {"kind": "local", ...}, "base": NAME, "memory_bytes": N, "nice": N}     first, once
    {"op": "call", "call": GenerateCall.as_json()}      {"op": "cancel", "call": ID}
    {"op": "attach", "adapter": DIGEST, "path": DIRECTORY, "ask": N}      {"op": "detach", "adapter": DIGEST, "ask": N}
    {"op": "embed", "texts": [...], "encoder": "base" | NAME, "ask": N}   {"op": "ping", "ask": N}
    {"op": "close"}

From the worker.

    {"op": "ready", "about": {...}, "memory_bytes": N}     the engine is open
    {"op": "failed", "error": {...}}                       the engine is not open, and the worker ends
    {"event": "piece" | "done" | "failed", ...}            an event of a reply, as event_as_json writes it
    {"answer": N, ...} or {"answer": N, "error": {...}}    attach: bytes. embed: vectors, tokens, cut. Else no fields
    {"op": "alive", "memory_bytes": N}                     every BEAT_S while the engine has work, sent by its loop
    {"op": "malformed", "problem": TEXT}                   a line that it could not read; it continues

An error is {"kind": a class of core/errors, "problem", "remedy"}. The end of the connection ends the worker. An idle
worker sends nothing; its parent pings it.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sartor.core import errors
from sartor.core.errors import SartorError

BEAT_S = 0.5
# `limits.body_bytes` of a team bounds a request's body; JSON may write one byte of it as six.
MOST_FRAME_BYTES = 64 << 20
# Limit on output that the parent has not read; above it the engine waits.
MOST_UNREAD_BYTES = 1 << 20
_READ_BYTES = 1 << 18


@dataclass(frozen=True)
class MalformedFrame:
    """A line that is not a valid frame."""

    problem: str


def frame(message: Mapping[str, Any]) -> bytes:
    """Return a message as one line of the protocol."""
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"


class Frames:
    """Parser of received bytes into frames.

    A line that is too long is discarded up to its end, without being buffered.
    """

    def __init__(self, most_bytes: int = MOST_FRAME_BYTES) -> None:
        self._most_bytes = most_bytes
        self._rest = bytearray()
        self._searched = 0
        self._dropping = False

    def feed(self, data: bytes) -> Iterator[dict[str, Any] | MalformedFrame]:
        """Yield the frames that `data` completes."""
        self._rest += data
        while (end := self._rest.find(b"\n", self._searched)) >= 0:
            if end + 1 == len(self._rest):  # usual for a large request with media: not copied
                line, self._rest = self._rest, bytearray()
            else:
                line = self._rest[: end + 1]
                del self._rest[: end + 1]
            self._searched = 0
            was_dropping, self._dropping = self._dropping, False
            if not was_dropping:
                yield _read(line) if end <= self._most_bytes else self._too_long()
        self._searched = len(self._rest)
        if self._searched > self._most_bytes:
            if not self._dropping:
                yield self._too_long()
            self._dropping, self._searched = True, 0
            self._rest.clear()

    def _too_long(self) -> MalformedFrame:
        return MalformedFrame(f"a line has more than {self._most_bytes} bytes")


def _read(line: bytearray) -> dict[str, Any] | MalformedFrame:
    size = len(line) - 1  # without its end
    try:
        text = line.decode("utf-8", "surrogatepass")
        line.clear()
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return MalformedFrame(f"a line of {size} bytes is no JSON: {type(error).__name__}")
    return (
        fields if isinstance(fields, dict) else MalformedFrame(f"a line holds {type(fields).__name__}, not an object")
    )


class Channel:
    """The worker's end of the connection.

    Only `wait` and `finish` block. `has_room` tells when the parent has too much unread output.
    closed: whether the parent is gone.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._frames = Frames()
        self._unsent = bytearray()
        self.closed = False

    @property
    def has_room(self) -> bool:
        """Whether the parent reads fast enough for more messages."""
        return len(self._unsent) < MOST_UNREAD_BYTES

    def send(self, message: Mapping[str, Any]) -> None:
        """Queue a message; the next `flush` sends it with the others."""
        self._unsent += frame(message)

    def flush(self) -> None:
        """Send what the parent accepts now."""
        try:
            while self._unsent and not self.closed:
                del self._unsent[: self._end.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self.closed = True

    def received(self) -> Iterator[dict[str, Any] | MalformedFrame]:
        """Yield the frames received since the last call; set `closed` once the parent is gone."""
        try:
            while not self.closed:
                data = self._end.recv(_READ_BYTES)
                self.closed = not data
                yield from self._frames.feed(data)
        except BlockingIOError:
            return
        except OSError:
            self.closed = True

    def wait(self, timeout_s: float | None = None) -> None:
        """Sleep until the parent sends something, accepts queued output, or the timeout passes."""
        poll = select.poll()  # not select(): a file descriptor may be above 1023
        poll.register(self._end, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        poll.poll(None if timeout_s is None else timeout_s * 1000)

    def finish(self, timeout_s: float = 1.0) -> None:
        """Send the queued messages within the timeout, then mark the channel closed."""
        self.flush()
        with contextlib.suppress(OSError):
            self._end.settimeout(timeout_s)
            self._end.sendall(self._unsent)
        self.closed = True


def error_as_json(error: SartorError) -> dict[str, str]:
    """Return the JSON form of an error, which `error_from_json` reads."""
    return {"kind": error.kind, "problem": error.problem, "remedy": error.remedy}


def error_from_json(fields: Mapping[str, Any]) -> SartorError:
    """Return the error in a message; an unknown class becomes a plain SartorError."""
    return error_of(str(fields.get("kind", "")), str(fields.get("problem", "")), str(fields.get("remedy", "")))


def error_of(kind: str, problem: str, remedy: str, default: type[SartorError] = SartorError) -> SartorError:
    """Return an error of core/errors by the name of its class, as a ReplyFailed event states it.

    default: class of the error if core/errors has none of that name.
    """
    error_class = getattr(errors, kind, default)
    is_known = isinstance(error_class, type) and issubclass(error_class, SartorError)
    return error_class(problem, remedy) if is_known else default(problem, remedy)
