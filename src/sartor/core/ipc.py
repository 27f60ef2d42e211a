"""JSON-lines messages and errors between processes.

To the worker. `ask` is a number that comes back with the answer.

    {"op": "open", "engine": {"kind": "local", ...}, "base": NAME, "memory_bytes": N, "nice": N}     first, once
    {"op": "call", "call": Call.as_json()}      {"op": "cancel", "call": ID}
    {"op": "attach", "adapter": DIGEST, "path": DIRECTORY, "ask": N}      {"op": "detach", "adapter": DIGEST, "ask": N}
    {"op": "embed", "texts": [...], "encoder": "base" | NAME, "ask": N}   {"op": "ping", "ask": N}
    {"op": "close"}

From the worker.

    {"op": "ready", "about": {...}, "memory_bytes": N}     the engine is open
    {"op": "failed", "error": {...}}                       it is not, and the worker ends
    {"event": "piece" | "done" | "failed", ...}            event_as_json of the contract
    {"answer": N, ...} or {"answer": N, "error": {...}}    attach: bytes. embed: vectors, tokens, cut. Else nothing
    more {"op": "alive", "memory_bytes": N}                     each BEAT_S, by the loop that drives the engine while
    it has work {"op": "malformed", "problem": TEXT}                   a line that it could not read; it goes on

An error is {"kind": a class of core/errors, "problem", "remedy"}. The end of the connection ends the worker. A worker
that has
nothing to do says nothing: it is pinged.
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
# A request's body is bounded by team.Limits.body_bytes; JSON may write one byte of it as six.
MOST_FRAME_BYTES = 64 << 20
# What a worker may have said that its parent has not read: above it the engine waits.
MOST_UNREAD_BYTES = 1 << 20
_READ_BYTES = 1 << 18


@dataclass(frozen=True)
class MalformedFrame:
    """A line that is no frame."""

    problem: str


def frame(message: Mapping[str, Any]) -> bytes:
    """One line of the wire."""
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"


class Frames:
    """Bytes as they come -> frames. A line that is too long is dropped up to its end, without being held."""

    def __init__(self, most_bytes: int = MOST_FRAME_BYTES) -> None:
        self._most_bytes = most_bytes
        self._rest = bytearray()
        self._searched = 0
        self._dropping = False

    def feed(self, data: bytes) -> Iterator[dict[str, Any] | MalformedFrame]:
        """The frames that `data` completes."""
        self._rest += data
        while (end := self._rest.find(b"\n", self._searched)) >= 0:
            if end + 1 == len(self._rest):  # a request with media is most often all there is: not copied
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
    """The worker's end: nothing blocks but `wait`, and what is not read by the parent is bounded by `has_room`."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._frames = Frames()
        self._unsent = bytearray()
        self.closed = False

    @property
    def has_room(self) -> bool:
        """Whether the parent reads fast enough that more may be said."""
        return len(self._unsent) < MOST_UNREAD_BYTES

    def send(self, message: Mapping[str, Any]) -> None:
        """Say something. It leaves with the next `flush`, together with what else was said."""
        self._unsent += frame(message)

    def flush(self) -> None:
        """Hand over as much as the parent takes now."""
        try:
            while self._unsent and not self.closed:
                del self._unsent[: self._end.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self.closed = True

    def received(self) -> Iterator[dict[str, Any] | MalformedFrame]:
        """What has come since the last time. `closed` is true once the parent is gone."""
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
        """Sleep until the parent says something, or takes what was not sent, or the time has passed."""
        poll = select.poll()  # not select: the number of a socket may be above 1023
        poll.register(self._end, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        poll.poll(None if timeout_s is None else timeout_s * 1000)

    def finish(self, timeout_s: float = 1.0) -> None:
        """Last words: sent if the parent takes them in time."""
        self.flush()
        with contextlib.suppress(OSError):
            self._end.settimeout(timeout_s)
            self._end.sendall(self._unsent)
        self.closed = True


def error_as_json(error: SartorError) -> dict[str, str]:
    """What `error_from_json` turns back into an error of the same class."""
    return {"kind": error.kind, "problem": error.problem, "remedy": error.remedy}


def error_from_json(fields: Mapping[str, Any]) -> SartorError:
    """The error that was told; one of an unknown class is a plain SartorError."""
    return error_of(str(fields.get("kind", "")), str(fields.get("problem", "")), str(fields.get("remedy", "")))


def error_of(kind: str, problem: str, remedy: str) -> SartorError:
    """An error of core/errors by the name of its class, as a Failed tells it."""
    error_class = getattr(errors, kind, SartorError)
    is_known = isinstance(error_class, type) and issubclass(error_class, SartorError)
    return error_class(problem, remedy) if is_known else SartorError(problem, remedy)
