"""Equal say of API keys in the observations of one version.

Alarms that take a version out of service weigh replies and ratings so that no key has more than a third of them, and
have to sound without any one of the keys too: a client, who may send what it likes as often as its limits allow,
cannot withdraw a version alone.

Observations wait in the order in which they came, and one of a key joins the count as soon as its key has room. When
it joins depends on numbers of observations alone, never on what was observed, so the tests of `sequential_tests` keep
their level.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Generic, TypeVar

LEAST_KEYS = 3
MOST_WAITING = 1000
T = TypeVar("T")


class KeyShares(Generic[T]):
    """Observations of keys, in an order in which no key has more than a third, one observation aside.

    The key "" is that of a server without keys. Whoever reaches it is its owner, and has no share to keep to.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._total = 0
        self._owned = 0
        self._waiting: dict[str, deque[T]] = {}

    @property
    def counted(self) -> int:
        """Number of observations that are counted; with one or two keys as many as there are keys."""
        return self._total + self._owned

    @property
    def keys(self) -> int:
        """Number of keys that are counted."""
        return len(self._counts)

    @property
    def is_fair(self) -> bool:
        """Whether LEAST_KEYS keys are counted and none has more than a third; always, if all are the owner's."""
        if not self._total:
            return self._owned > 0
        return self.keys >= LEAST_KEYS and LEAST_KEYS * max(self._counts.values()) <= self._total

    def add(self, key: str, observation: T) -> None:
        """Take an observation. Of one key at most MOST_WAITING wait; more are left out."""
        waiting = self._waiting.setdefault(key, deque())
        if len(waiting) < MOST_WAITING:
            waiting.append(observation)

    def next(self) -> tuple[str, T] | None:
        """Return the next observation that has room, with its key, the one with the fewest; None if there is none."""
        if owner := self._waiting.get(""):
            self._owned += 1
            return "", owner.popleft()
        key = min((key for key, waiting in self._waiting.items() if waiting), key=self._counts.__getitem__, default="")
        if not key or LEAST_KEYS * self._counts[key] > self._total:
            return None
        self._counts[key] += 1
        self._total += 1
        return key, self._waiting[key].popleft()
