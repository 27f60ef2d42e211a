"""The team's keys as the guard asks for them: whether there are any is remembered for a moment, and through an outage."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from sartor.agents.keys import Keys, Opened
from sartor.core.errors import SartorError

FRESH_S = 1.0


class Doorman:
    """See seams.Doors.

    A server without keys answers though its database cannot be read; with keys nobody is let in on memory alone, since a key
    may have been revoked meanwhile.
    """

    def __init__(self, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._clock = clock
        self._is_open, self._has_admin = keys.is_open, keys.has_admin
        self._read_at = clock()

    @property
    def is_open(self) -> bool:
        """See Doors."""
        self._refresh()
        return self._is_open

    @property
    def has_admin(self) -> bool:
        """See Doors."""
        self._refresh()
        return self._has_admin

    def admit(self, secret: str) -> Opened:
        """See Doors."""
        return self._keys.admit(secret)

    def _refresh(self) -> None:
        if self._clock() - self._read_at < FRESH_S:
            return
        with suppress(SartorError):  # then what was read last holds
            self._is_open, self._has_admin = self._keys.is_open, self._keys.has_admin
        self._read_at = self._clock()
