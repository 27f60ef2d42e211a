"""Token buckets per API key.

A bucket holds a minute's worth (or a day's), is full at the start, and fills evenly. A request takes one from the
first at its beginning. What a reply costs is known at its end only, so the second is charged then and may go below
nothing: who asks while it is empty waits until it is not. Requests of one agent at once are bounded elsewhere (the
bulkhead).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sartor.core.errors import BusyError
from sartor.serving.team_config import FeedbackTerms, RequestLimits

MOST_KEYS = 10_000  # that are remembered; the one that has asked for longest ago is forgotten, and so is full again
MINUTE_S, DAY_S = 60.0, 86_400.0


@dataclass(frozen=True)
class TokenRate:
    """`amount` of something in `span_s` seconds; 0 is no limit. label: `requests per minute`. option: where TEAM.yaml
    has it.
    """

    amount: float
    span_s: float
    label: str
    option: str


@dataclass
class Bucket:
    """level: what may be taken now; below 0 is owed. filled_at: seconds, when it was filled last."""

    rate: TokenRate
    level: float
    filled_at: float

    def fill(self, now: float) -> None:
        """Add what has come since the last time."""
        self.level = min(self.rate.amount, self.level + (now - self.filled_at) * self.rate.amount / self.rate.span_s)
        self.filled_at = now

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there."""
        # who waited as long as told is let in
        return max(0.0, round((amount - self.level) * self.rate.span_s / self.rate.amount, 6))


class Buckets:
    """Buckets of each key, one a pace. Safe to use from several threads."""

    def __init__(self, rates: Sequence[TokenRate], clock: Callable[[], float] = time.monotonic) -> None:
        self._rates = [rate for rate in rates if rate.amount > 0]
        self._clock = clock
        self._lock = threading.Lock()
        self._by_key: OrderedDict[str, dict[str, Bucket]] = OrderedDict()

    def __len__(self) -> int:
        """How many keys are remembered."""
        return len(self._by_key)

    def take(self, key: str, charged: Sequence[str]) -> None:
        """Take one from the buckets `charged` (by their option), if every bucket holds one. Raises BusyError."""
        with self._lock:
            buckets = self._of(key)
            waits = {name: bucket.wait_s(1.0) for name, bucket in buckets.items()}
            slowest = max(waits, key=lambda name: waits[name], default="")
            if slowest and waits[slowest] > 0:
                rate = buckets[slowest].rate
                raise BusyError(
                    f"this key has used up its {rate.amount:g} {rate.label}",
                    f"ask again in {waits[slowest]:.1f} s, or raise {rate.option} in TEAM.yaml",
                    waits[slowest],
                )
            for name in charged:
                if name in buckets:
                    buckets[name].level -= 1

    def charge(self, key: str, option: str, amount: float) -> None:
        """Take what is spent already, though it be more than is there."""
        with self._lock:
            buckets = self._of(key)
            if option in buckets:
                buckets[option].level -= amount

    def _of(self, key: str) -> dict[str, Bucket]:
        now = self._clock()
        buckets = self._by_key.pop(key, None)
        if buckets is None:
            buckets = {rate.option: Bucket(rate, rate.amount, now) for rate in self._rates}
        self._by_key[key] = buckets
        while len(self._by_key) > MOST_KEYS:
            self._by_key.popitem(last=False)
        for bucket in buckets.values():
            bucket.fill(now)
        return buckets


REQUESTS, TOKENS = "limits.requests_per_minute", "limits.tokens_per_minute"


class RateLimiter:
    """What each key has used of `limits`."""

    def __init__(self, limits: RequestLimits, clock: Callable[[], float] = time.monotonic) -> None:
        requests = TokenRate(limits.requests_per_minute, MINUTE_S, "requests per minute", REQUESTS)
        tokens = TokenRate(limits.tokens_per_minute, MINUTE_S, "tokens per minute", TOKENS)
        self._buckets = Buckets([requests, tokens], clock)

    def begin(self, key: str) -> None:
        """Count a request. Raises BusyError, with the seconds to wait, when requests or tokens are used up."""
        # the whole of a request, and at least one token: a reply of any length may follow
        self._buckets.take(key, [REQUESTS])

    def count(self, key: str, tokens: int) -> None:
        """Count what a reply took, of prompt and reply together."""
        self._buckets.charge(key, TOKENS, tokens)


class FeedbackRates:
    """What each key has used of `feedback`: of a running server, so that a new start gives a day's worth anew."""

    def __init__(self, terms: FeedbackTerms, clock: Callable[[], float] = time.monotonic) -> None:
        minute = TokenRate(
            terms.per_minute, MINUTE_S, "ratings, corrections and comments per minute", "feedback.per_minute"
        )
        day = TokenRate(terms.per_day, DAY_S, "ratings, corrections and comments per day", "feedback.per_day")
        self._charged_options = [minute.option, day.option]
        self._buckets = Buckets([minute, day], clock)

    def begin(self, key: str) -> None:
        """Count one. Raises BusyError, with the seconds to wait."""
        self._buckets.take(key, self._charged_options)
