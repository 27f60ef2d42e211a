"""How much one key may ask: token buckets of requests and of tokens per minute, on a clock that no one can set back.

A bucket holds a minute's worth, is full at the start, and fills evenly. A request takes one from the first at its beginning.
What a reply costs is known at its end only, so the second is charged then and may go below nothing: who asks while it is
empty waits until it is not. Requests of one agent at once are bounded elsewhere (the bulkhead).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from sartor.agents.team import Limits
from sartor.core.errors import BusyError

MOST_KEYS = 10_000  # that are remembered; the one that has asked for longest ago is forgotten, and so is full again


@dataclass
class Bucket:
    """level: what may be taken now; below 0 is owed. per_minute: how fast it fills, and how much it holds. at: seconds."""

    per_minute: float
    level: float
    at: float

    def fill(self, now: float) -> None:
        """Add what has come since the last time."""
        self.level = min(self.per_minute, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there."""
        return max(0.0, round((amount - self.level) * 60 / self.per_minute, 6))  # who waited as long as told is let in


class Rates:
    """What each key has used. A limit of 0 is none. Safe to use from several threads."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = {"requests": float(limits.requests_per_minute), "tokens": float(limits.tokens_per_minute)}
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, dict[str, Bucket]] = OrderedDict()

    def begin(self, key: str) -> None:
        """Count a request. Raises BusyError, with the seconds to wait, when requests or tokens are used up."""
        with self._lock:
            buckets = self._of(key)
            # the whole of a request, and at least one token: a reply of any length may follow
            waits = {what: bucket.wait_s(1.0) for what, bucket in buckets.items()}
            what = max(waits, key=lambda name: waits[name], default="")
            if what and waits[what] > 0:
                raise BusyError(
                    f"this key has used up its {self._per_minute[what]:g} {what} per minute",
                    f"ask again in {waits[what]:.1f} s, or raise limits.{what}_per_minute in TEAM.yaml",
                    waits[what],
                )
            if "requests" in buckets:
                buckets["requests"].level -= 1

    def count(self, key: str, tokens: int) -> None:
        """Count what a reply took, of prompt and reply together."""
        with self._lock:
            buckets = self._of(key)
            if "tokens" in buckets:
                buckets["tokens"].level -= tokens

    def _of(self, key: str) -> dict[str, Bucket]:
        now = self._clock()
        buckets = self._buckets.pop(key, None)
        if buckets is None:
            buckets = {what: Bucket(rate, rate, now) for what, rate in self._per_minute.items() if rate > 0}
        self._buckets[key] = buckets
        while len(self._buckets) > MOST_KEYS:
            self._buckets.popitem(last=False)
        for bucket in buckets.values():
            bucket.fill(now)
        return buckets
