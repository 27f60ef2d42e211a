"""Feedback files and the memory of recent replies.

Receipts hold only digests, so a correction alone would have no prompt to learn from. Prompts and replies are therefore
kept in memory for a while. What a user comments on is written with the comment; the rest is forgotten.
`feedback_intake.py` decides what may be written, `text/pii/masking.py` removes personal data.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from sartor.core.errors import MissingError, SourceError
from sartor.core.filesystem import FileSystem, fsync_descriptor, fsync_directory, write_file_atomic
from sartor.core.records import Feedback
from sartor.serving.erased_users import ErasedUsers, forgotten_meanwhile

PATTERN = "feedback-{day}.jsonl"
PATIENCE_S = 10.0  # wait for another process that holds the lock
MOST_RECEIPTS = 100_000  # receipts whose keys are remembered, and as many ratings


@dataclass(frozen=True)
class Exchange:
    """Prompt and reply of one request.

    agent: the exact version that replied.
    messages, text: the prompt, one of the two.
    key: id of the API key of the request.
    person: the user for whom the client spoke.
    """

    agent: str
    messages: Sequence[Mapping[str, Any]]
    text: str
    reply: str
    key: str = ""
    person: str = ""

    @property
    def size_bytes(self) -> int:
        """Size of all texts, in bytes."""
        return _size([self.text, self.reply, *self.messages])


def _size(value: Any) -> int:
    """Return the approximate bytes of the texts in a value.

    ASCII texts, such as media in base64, are not copied for it.
    """
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="replace"))
    if isinstance(value, Mapping):
        return sum(_size(key) + _size(inner) + 8 for key, inner in value.items())
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 8


class Memory:
    """Newest exchanges by receipt, up to `max_bytes` in total.

    For longer, up to MOST_RECEIPTS, it remembers the key of each reply and the keys that rated it.
    erased: users who were forgotten; a reply that began before is not remembered when it ends.
    """

    def __init__(self, max_bytes: int) -> None:
        self.erased = ErasedUsers()
        self._max_bytes = max_bytes
        self._exchanges: OrderedDict[str, Exchange] = OrderedDict()
        self._bytes = 0
        self._askers: OrderedDict[str, str] = OrderedDict()
        self._rated: OrderedDict[tuple[str, str], None] = OrderedDict()

    def keep(self, receipt: str, exchange: Exchange, began: float = math.inf) -> None:
        """Remember an exchange, and forget the oldest ones beyond the limit.

        began: start of the request on the monotonic clock; it is not remembered if its user was forgotten since.
        """
        self._askers[receipt] = exchange.key
        _forget(self._askers)
        if self.erased.covers(began, exchange.person):
            return
        self._exchanges[receipt] = exchange
        self._bytes += exchange.size_bytes
        while self._bytes > self._max_bytes:
            _, oldest = self._exchanges.popitem(last=False)
            self._bytes -= oldest.size_bytes

    def find(self, receipt: str) -> Exchange | None:
        """Return the exchange if it is still remembered, else None."""
        return self._exchanges.get(receipt)

    def forget_person(self, person: str) -> None:
        """Forget every exchange for a person, from whichever key, and those that have begun."""
        self.erased.add(person)
        for receipt in [receipt for receipt, exchange in self._exchanges.items() if exchange.person == person]:
            self._bytes -= self._exchanges.pop(receipt).size_bytes

    def asker(self, receipt: str) -> str:
        """Return the id of the key that got the reply; empty if it is unknown or the server has no keys."""
        return self._askers.get(receipt, "")

    def is_first(self, receipt: str, key: str) -> bool:
        """Return whether the key rates this reply for the first time, and record it.

        The rollout monitors count one rating per key and reply; otherwise one key could force a rollback.
        """
        if (receipt, key) in self._rated:
            return False
        self._rated[receipt, key] = None
        _forget(self._rated)
        return True


def _forget(entries: OrderedDict[Any, Any]) -> None:
    while len(entries) > MOST_RECEIPTS:
        entries.popitem(last=False)


@dataclass(frozen=True)
class StoredFeedback:
    """Line of an inbox.

    location: file and line, such as `feedback-2026-11-26.jsonl:12`.
    feedback: None if the line cannot be read.
    """

    location: str
    feedback: Feedback | None


class FeedbackStore:
    """Directory of JSONL files, one per day, with one `Feedback` per line.

    A line is on disk when `add` returns. Safe to use from several threads and processes: writers hold a lock beside
    the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def add(self, feedback: Feedback, is_erased: Callable[[], bool] = lambda: False) -> None:
        """Append a feedback, whole or not at all.

        is_erased: called while writers wait, so that a deletion either comes before it or removes the line; if it
        returns true, ConflictError is raised. Raises MissingError if the disk fails.
        """
        line = (json.dumps(feedback.as_json(), ensure_ascii=False) + "\n").encode()
        file = self.path / PATTERN.format(day=feedback.date[:10])
        try:
            with self._alone():
                if is_erased():
                    raise forgotten_meanwhile()
                self._append(file, line)
        except OSError as error:
            raise MissingError(
                f"the feedback could not be written to {file}: {error.strerror or error}",
                f"ls -ld {self.path}; df -h {self.path}; then send the feedback again",
            ) from None

    def lines(self) -> Iterator[StoredFeedback]:
        """Yield every line that is not blank, oldest first."""
        for file in self._files():
            for number, line in enumerate(file.read_bytes().splitlines(), 1):
                if line.strip():
                    yield StoredFeedback(f"{file.name}:{number}", _read(line))

    def remove(self, should_remove: Callable[[Feedback], bool]) -> list[StoredFeedback]:
        """Remove the lines that `should_remove` accepts, and return them.

        Truncated lines are removed too, because their author cannot be known. A blank line stays in place of each, so
        that the locations in datasets stay valid.
        Raises MissingError if the disk fails; then that file is unchanged.
        """
        removed: list[StoredFeedback] = []
        for file in self._files():
            try:
                with self._alone():
                    FileSystem().remove_leftovers(file)  # temporary files of a rewrite that was killed
                    removed += _without(file, should_remove)
            except OSError as error:
                raise MissingError(
                    f"{file} could not be written anew: {error.strerror or error}",
                    f"ls -ld {self.path}; df -h {self.path}; then the same command again",
                ) from None
        return removed

    def _files(self) -> list[Path]:
        return sorted(self.path.glob(PATTERN.format(day="*")))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock, FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=PATIENCE_S):
            yield

    def _append(self, file: Path, line: bytes) -> None:
        is_new = not file.exists()
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            end = os.fstat(descriptor).st_size
            # start a new line after one that a kill truncated, so that the new one stays readable
            torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
            remaining = b"\n" + line if torn else line
            try:
                while remaining:
                    remaining = remaining[os.write(descriptor, remaining) :]
            except OSError:
                os.ftruncate(descriptor, end)
                raise
            fsync_descriptor(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            fsync_directory(self.path)


def _read(line: bytes) -> Feedback | None:
    try:
        return Feedback.from_json(json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError, SourceError):
        return None


def _without(file: Path, should_remove: Callable[[Feedback], bool]) -> list[StoredFeedback]:
    """Rewrite a file without some lines, whole or not at all; return those lines."""
    removed: list[StoredFeedback] = []
    lines = file.read_bytes().splitlines()
    for index, line in enumerate(lines):
        feedback = _read(line) if line.strip() else None
        if line.strip() and (feedback is None or should_remove(feedback)):
            removed.append(StoredFeedback(f"{file.name}:{index + 1}", feedback))
            lines[index] = b""
    if not removed:
        return []
    write_file_atomic(file, b"".join(line + b"\n" for line in lines), mode=0o600)
    return removed
