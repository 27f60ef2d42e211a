"""The table of keys in memory: read again when it is old, by one thread at a time, and never waited for without end.

A request waits for a read at most WAIT_S: a database that is gone can hold a connection for minutes. What was read last is
given then, with the time at which it was read, and whoever asks decides how old it may be.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sartor.core.errors import SartorError, UnavailableError

WAIT_S = 2.0
# Before anything was read: a server that starts
FIRST_WAIT_S = 60.0


@dataclass(frozen=True)
class KeyTable:
    """The keys at one moment.

    rows: by id; None for one that was changed from outside. speakers: by key, for whom it may speak.
    mark: of the registry's log (key_marks). is_on_file: whether the state directory says that there were keys.
    """

    rows: Mapping[str, Mapping[str, Any] | None]
    speakers: Mapping[str, frozenset[str]]
    mark: str
    is_on_file: bool


@dataclass
class _Refresh:
    """A read that runs. started: by the cache's clock; until: when nobody waits for it any more, by the system's."""

    started: float
    until: float
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> bool:
        return self.done.wait(max(0.0, self.until - time.monotonic()))


class KeyCache:
    """What `read` returned last. Safe to use from several threads. clock: monotonic, in seconds."""

    def __init__(self, read: Callable[[], KeyTable], clock: Callable[[], float]) -> None:
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._refresh: _Refresh | None = None
        self._tried_at = -math.inf
        self._read_at = -math.inf
        self.last: KeyTable | None = None
        self.error: SartorError | None = None

    @property
    def age_s(self) -> float:
        """Seconds since the last read that succeeded began. One that failed makes nothing younger."""
        return self._clock() - self._read_at

    def table(self, fresh_s: float) -> KeyTable:
        """The keys as read at most `fresh_s` ago; older ones where the database does not answer.

        Raises the error of the read where there never was one that succeeded.
        """
        requested_at = self._clock()
        while True:
            with self._lock:
                if requested_at - self._tried_at < fresh_s:
                    break
                refresh = self._refresh or self._begin()
            if not refresh.wait():
                break
        if self.last is None:
            raise self.error or UnavailableError("the registry does not answer", "see whether its disk or server is there")
        return self.last

    def poke(self, fresh_s: float) -> None:
        """Begin to read the keys again if they are older than that, and wait for nothing."""
        with self._lock:
            if self._refresh is None and self._clock() - self._tried_at >= fresh_s:
                self._begin()

    def expire(self) -> None:
        """What is read before now is not to be used as if it were new: this process has changed a key."""
        with self._lock:
            self._tried_at, self._refresh = -math.inf, None

    def _begin(self) -> _Refresh:
        refresh = _Refresh(self._clock(), time.monotonic() + (FIRST_WAIT_S if self.last is None else WAIT_S))
        try:
            # a daemon: one that hangs must not keep the process from ending
            threading.Thread(target=self._run, args=(refresh,), name="sartor-keys", daemon=True).start()
        except RuntimeError as fault:  # the system has no thread left: a failed read, tried again later
            self._tried_at = refresh.started
            self.error = UnavailableError(f"the keys cannot be read: {fault}", "raise the limit of processes (ulimit -u)")
            refresh.done.set()
            return refresh
        self._refresh = refresh
        return refresh

    def _run(self, refresh: _Refresh) -> None:
        table, error = None, None
        try:
            table = self._read()
        except SartorError as fault:
            error = fault
        except Exception as fault:  # a driver's own kinds; the waiting must hear of an end whatever it was
            error = UnavailableError(f"the keys cannot be read: {type(fault).__name__}", "report it with the server's log")
        with self._lock:
            if self._refresh is refresh:
                self._refresh, self._tried_at, self.error = None, refresh.started, error
                if table is not None:
                    self.last, self._read_at = table, refresh.started
        refresh.done.set()
