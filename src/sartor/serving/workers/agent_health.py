"""A circuit breaker for each agent, and how often a worker may be started again. Pure: the clock is handed in.

    closed --failures within window_s--> open --open_s--> half-open --one good call--> closed
                                           ^                 |
                                           +--- a relapse ---+   open_s doubled; after `quarantine` relapses: quarantined

Nygard 2007, "Release It!"; restart intensity as in Erlang/OTP's supervisors.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from sartor.agents import team
from sartor.core.errors import UnavailableError

State = Literal["closed", "open", "half-open", "quarantined"]
Clock = Callable[[], float]
_MOST_DOUBLINGS = 4


class Breaker:
    """One agent's. Every call that `enter` lets in ends by exactly one of `succeed`, `fail` and `leave`."""

    def __init__(self, agent: str, rules: team.Breaker, clock: Clock = time.monotonic) -> None:
        self._agent = agent
        self._rules = rules
        self._clock = clock
        self._failures: deque[float] = deque()
        self._state: State = "closed"
        self._until = 0.0
        self._closed_at = float("-inf")
        self._tried = False
        self.relapses = 0
        self.why = ""

    @property
    def state(self) -> State:
        """As it is now: an open one turns half-open by the clock."""
        if self._state == "open" and self._clock() >= self._until:
            self._state, self._tried = "half-open", False
        return self._state

    @property
    def is_blank(self) -> bool:
        """Whether it knows nothing that a new one would not know."""
        return self.state == "closed" and not self._recent() and self._clock() - self._closed_at > self._rules.window_s

    def enter(self) -> bool:
        """Let a call in; whether it is the one that tries a half-open breaker. Raises UnavailableError."""
        state = self.state
        if state == "closed":
            return False
        if state == "half-open" and not self._tried:
            self._tried = True
            return True
        if state == "quarantined":
            remedy = f"promote or roll back {self._agent.partition('@')[0]}, or release it from quarantine"
            raise UnavailableError(f"{self._agent} is in quarantine after {self.relapses} relapses: {self.why}", remedy)
        wait_s = max(0.0, self._until - self._clock())
        problem = f"{self._agent} failed {self._rules.failures} times within {self._rules.window_s:g} s: {self.why}"
        raise UnavailableError(problem, f"ask again in {wait_s:.0f} s" if wait_s else "ask again when one call has tried it")

    def succeed(self, trial: bool = False) -> None:
        """A call was answered. Only the trial closes a half-open breaker: others began before it opened."""
        if trial and self.state == "half-open":
            self._state, self._closed_at = "closed", self._clock()
            self._failures.clear()

    def fail(self, why: str, trial: bool = False) -> None:
        """A call failed by the agent's own fault."""
        state, now = self.state, self._clock()
        if state == "half-open" and trial:
            self._open(why, relapse=True)
        elif state == "closed":
            self._failures.append(now)
            if len(self._recent()) >= self._rules.failures:
                self._open(why, relapse=now - self._closed_at <= self._rules.window_s)

    def leave(self, trial: bool = False) -> None:
        """A call ended without a verdict (cancelled, too late, the client's fault): the next one may try."""
        if trial and self.state == "half-open":
            self._tried = False

    def release(self) -> None:
        """Forget everything."""
        self._state, self._closed_at, self._tried = "closed", float("-inf"), False
        self.relapses, self.why = 0, ""
        self._failures.clear()

    def _recent(self) -> deque[float]:
        while self._failures and self._clock() - self._failures[0] > self._rules.window_s:
            self._failures.popleft()
        return self._failures

    def _open(self, why: str, relapse: bool) -> None:
        self.relapses = self.relapses + 1 if relapse else 0
        self.why = why
        self._failures.clear()
        if relapse and self.relapses >= self._rules.quarantine:
            self._state = "quarantined"
            return
        self._state = "open"
        self._until = self._clock() + self._rules.open_s * 2.0 ** min(self.relapses, _MOST_DOUBLINGS)


class Restarts:
    """When the worker of one place may be started again."""

    def __init__(self, rules: team.Workers, clock: Clock = time.monotonic, draw: Callable[[], float] = random.random) -> None:
        self._rules = rules
        self._clock = clock
        self._draw = draw
        self._ends: deque[float] = deque()
        self.count = 0
        self.is_given_up = False

    def ended(self) -> float:
        """The worker ended; seconds until the next start: doubled for each end within the window, half of it by chance.

        Above `restarts` ends the place is given up until the oldest of them has left the window.
        """
        now = self._clock()
        self._ends.append(now)
        self.count += 1
        while now - self._ends[0] > self._rules.window_s:
            self._ends.popleft()
        recent = len(self._ends)
        self.is_given_up = recent > self._rules.restarts
        if self.is_given_up:
            return self._ends[0] + self._rules.window_s - now
        wait_s = min(self._rules.backoff_s * 2.0 ** (recent - 1), self._rules.backoff_most_s)
        return wait_s * (0.5 + self._draw() / 2)

    def starting(self) -> None:
        """The wait is over."""
        self.is_given_up = False
