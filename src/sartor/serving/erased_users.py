"""Users who were forgotten while this server runs.

A reply or a feedback that began before its user was forgotten ends afterwards. Whatever would store a trace of it asks
here first. The server confirms a deletion only after it has noted the user, and the deletion removes stored data only
after that: a trace is therefore either stored before the removal, which takes it, or refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sartor.core.errors import ConflictError


class ErasedUsers:
    """Time of each deletion, by the keyed digest of the user. Safe to use from several threads.

    A user who comes back is a new one: what begins after the deletion is not covered.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._clock, self._wall_clock = clock, wall_clock
        self._erased_at: dict[str, float] = {}

    def add(self, person: str) -> None:
        """Note that a user is forgotten now."""
        self._erased_at[person] = self._clock()

    def covers(self, began: float, *people: str) -> bool:
        """Return whether one of these users was forgotten after `began`, on the monotonic clock."""
        return any(began <= self._erased_at.get(person, -1.0) for person in people if person)

    def covers_unix(self, began: float, person: str) -> bool:
        """Return the same for a Unix time. A clock that was set back covers everything that seems to begin later."""
        elapsed = self._wall_clock() - began
        return self.covers(self._clock() - elapsed if elapsed >= 0 else 0.0, person)


def forgotten_meanwhile() -> ConflictError:
    """Return the error for words of a user who was forgotten after they were sent."""
    return ConflictError(
        "that user was forgotten while this was sent; nothing of it was stored", "send it again, if it is new"
    )
