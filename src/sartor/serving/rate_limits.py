"""Token buckets per API key.

A bucket holds a minute's (or a day's) amount, starts full, and refills evenly. A request takes one unit of the request
bucket when it begins. A reply's tokens are known only at its end: they are charged then, and the token bucket may
become negative. A request with an empty bucket is refused with the seconds to wait. The number of simultaneous
requests of one agent is limited elsewhere (bulkhead).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sartor.core.errors import BusyError
from sartor.serving.team_config import FeedbackTerms, RequestLimits

MOST_KEYS = 10_000  # remembered keys; the least recently used one is dropped, and its buckets are full again
MINUTE_S, DAY_S = 60.0, 86_400.0


@dataclass(frozen=True)
class TokenRate:
    """Allowed amount in a span of time.

    amount: units in `span_s` seconds; 0 is no limit.
    label: such as `requests per minute`.
    option: its name in TEAM.yaml.
    """

    amount: float
    span_s: float
    label: str
    option: str


@dataclass
class Bucket:
    """Bucket of one rate.

    level: units that are left; negative if more was used.
    filled_at: time of the last refill, seconds.
    """

    rate: TokenRate
    level: float
    filled_at: float

    def fill(self, now: float) -> None:
        """Add the units that are due since the last refill."""
        self.level = min(self.rate.amount, self.level + (now - self.filled_at) * self.rate.amount / self.rate.span_s)
        self.filled_at = now

    def wait_s(self, amount: float) -> float:
        """Return the seconds until `amount` units are there."""
        # seconds = (amount - level) * span / rate; rounded, so that a client who waits as long as told is admitted
        return max(0.0, round((amount - self.level) * self.rate.span_s / self.rate.amount, 6))


class Buckets:
    """Buckets of each key, one per rate. Safe to use from several threads."""

    def __init__(self, rates: Sequence[TokenRate], clock: Callable[[], float] = time.monotonic) -> None:
        self._rates = [rate for rate in rates if rate.amount > 0]
        self._clock = clock
        self._lock = threading.Lock()
        self._by_key: OrderedDict[str, dict[str, Bucket]] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of keys that are remembered."""
        return len(self._by_key)

    def take(self, key: str, charged: Sequence[str]) -> None:
        """Take one unit from the buckets named in `charged` (by option), if every bucket holds one.

        Raises BusyError with the seconds to wait.
        """
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
        """Charge an amount that is already spent, even if it exceeds the level."""
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
    """Requests and tokens that each key has used of `limits`."""

    def __init__(self, limits: RequestLimits, clock: Callable[[], float] = time.monotonic) -> None:
        requests = TokenRate(limits.requests_per_minute, MINUTE_S, "requests per minute", REQUESTS)
        tokens = TokenRate(limits.tokens_per_minute, MINUTE_S, "tokens per minute", TOKENS)
        self._buckets = Buckets([requests, tokens], clock)

    def begin(self, key: str) -> None:
        """Count a request. Raises BusyError, with the seconds to wait, if requests or tokens are used up."""
        # needs one request and at least one token; the reply may then have any length
        self._buckets.take(key, [REQUESTS])

    def count(self, key: str, tokens: int) -> None:
        """Count the tokens of a reply, prompt and reply together."""
        self._buckets.charge(key, TOKENS, tokens)


class FeedbackRates:
    """Feedback that each key has used of `feedback`, since the server started."""

    def __init__(self, terms: FeedbackTerms, clock: Callable[[], float] = time.monotonic) -> None:
        minute = TokenRate(
            terms.per_minute, MINUTE_S, "ratings, corrections and comments per minute", "feedback.per_minute"
        )
        day = TokenRate(terms.per_day, DAY_S, "ratings, corrections and comments per day", "feedback.per_day")
        self._charged_options = [minute.option, day.option]
        self._buckets = Buckets([minute, day], clock)

    def begin(self, key: str) -> None:
        """Count one feedback. Raises BusyError with the seconds to wait."""
        self._buckets.take(key, self._charged_options)
