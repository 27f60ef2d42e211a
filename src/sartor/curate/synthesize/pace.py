"""Not faster than an endpoint allows: requests and tokens in any minute, and pauses that it asks for."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

MINUTE_S = 60.0


class Pace:
    """Shared by all threads that ask. 0 is no limit. `now` and `sleep` are for tests."""

    def __init__(
        self,
        requests: int = 0,
        tokens: int = 0,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.requests, self.tokens, self._now, self._sleep = requests, tokens, now, sleep
        self._asked: deque[tuple[float, int]] = deque()
        self._until = 0.0
        self._lock = threading.Lock()

    def wait(self, tokens: int) -> None:
        """Return when a request of that many tokens may go out, and count it. One that is over the limit alone goes alone."""
        while (delay := self._taken(tokens)) > 0:
            self._sleep(delay)

    def pause(self, seconds: float) -> None:
        """Nobody asks for that long: the endpoint said so."""
        with self._lock:
            self._until = max(self._until, self._now() + seconds)

    def _taken(self, tokens: int) -> float:
        """Seconds to wait before asking again; 0 where the request was counted."""
        with self._lock:
            now = self._now()
            while self._asked and self._asked[0][0] <= now - MINUTE_S:
                self._asked.popleft()
            if now < self._until:
                return self._until - now
            spent = sum(cost for _, cost in self._asked)
            is_full = (self.requests and len(self._asked) >= self.requests) or (
                self.tokens and self._asked and spent + tokens > self.tokens
            )
            if is_full:
                return self._asked[0][0] + MINUTE_S - now
            self._asked.append((now, tokens))
            return 0.0
