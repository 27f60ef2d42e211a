"""What people say of replies: kept in an inbox that `curate` reads, joined with the reply while that is remembered.

Receipts hold digests, so a correction alone could teach nothing. Prompts and replies are therefore remembered for a while, in
memory only, and what a person comments on is written down with the comment; everything else is forgotten.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.errors import MissingError
from sartor.core.records import Feedback

PATTERN = "feedback-{day}.jsonl"


@dataclass(frozen=True)
class Exchange:
    """A prompt (messages, or one text) and its reply, with the exact version that gave it."""

    agent: str
    messages: Sequence[Mapping[str, Any]]
    text: str
    reply: str

    @property
    def size_bytes(self) -> int:
        """What everything that was said takes as text."""
        return _size([self.text, self.reply, *self.messages])


def _size(value: Any) -> int:
    """Bytes of the texts in a value, without a copy of those that hold a picture."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="replace"))
    if isinstance(value, Mapping):
        return sum(_size(key) + _size(inner) + 8 for key, inner in value.items())
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 8


class Memory:
    """The newest exchanges, by receipt, up to so many bytes together."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held: OrderedDict[str, Exchange] = OrderedDict()
        self._bytes = 0

    def keep(self, receipt: str, exchange: Exchange) -> None:
        """Remember it, and forget the oldest as far as needed."""
        self._held[receipt] = exchange
        self._bytes += exchange.size_bytes
        while self._bytes > self._most_bytes:
            _, gone = self._held.popitem(last=False)
            self._bytes -= gone.size_bytes

    def find(self, receipt: str) -> Exchange | None:
        """The exchange, if it is still known."""
        return self._held.get(receipt)


class Inbox:
    """A directory of JSONL files, one a day: one `Feedback` a line, on disk when `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def add(self, feedback: Feedback) -> None:
        """Append it, whole or not at all. Raises MissingError when the disk does not take it."""
        line = (json.dumps(feedback.as_json(), ensure_ascii=False) + "\n").encode()
        file = self.path / PATTERN.format(day=feedback.date[:10])
        try:
            with self._lock:
                self._append(file, line)
        except OSError as error:
            raise MissingError(f"the feedback could not be written to {file}: {error.strerror}", "free disk space") from None

    def _append(self, file: Path, line: bytes) -> None:
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        is_new = not file.exists()
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            end = os.fstat(descriptor).st_size
            # a line that a kill cut short must not take the next one with it
            torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
            try:
                _write(descriptor, b"\n" + line if torn else line)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            _sync_directory(self.path)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
