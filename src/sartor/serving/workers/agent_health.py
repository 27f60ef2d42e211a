"""Circuit breakers, bounded queues, quarantine per agent.

    closed --failures within window_s--> open --open_s--> half-open --one good call--> closed
                                           ^                 |
                                           +--- a relapse ---+   open_s doubled; after `quarantine` relapses:
                                                                 quarantined

Nygard 2007, "Release It!"; restart intensity as in Erlang/OTP's supervisors.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from sartor.core.errors import BusyError, ModelError, UnavailableError
from sartor.core.ipc import frame
from sartor.inference.engine import GenerateCall, ReplyDone, ReplyFailed
from sartor.serving import team_config
from sartor.serving.workers.in_flight import InFlightCall

State = Literal["closed", "open", "half-open", "quarantined"]
Clock = Callable[[], float]
_MOST_DOUBLINGS = 4


class CircuitBreaker:
    """One agent's. Every call that `enter` lets in ends by exactly one of `succeed`, `fail` and `leave`."""

    def __init__(self, agent: str, rules: team_config.CircuitBreakerOptions, clock: Clock = time.monotonic) -> None:
        self._agent = agent
        self._rules = rules
        self._clock = clock
        self._failures: deque[float] = deque()
        self._state: State = "closed"
        self._until = 0.0
        self._closed_at = float("-inf")
        self._tried = False
        self.relapses = 0
        self.reason = ""

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
            raise UnavailableError(
                f"{self._agent} is in quarantine after {self.relapses} relapses: {self.reason}", remedy
            )
        wait_s = max(0.0, self._until - self._clock())
        problem = f"{self._agent} failed {self._rules.failures} times within {self._rules.window_s:g} s: {self.reason}"
        raise UnavailableError(
            problem, f"ask again in {wait_s:.0f} s" if wait_s else "ask again when one call has tried it"
        )

    def succeed(self, trial: bool = False) -> None:
        """A call was answered. Only the trial closes a half-open breaker: others began before it opened."""
        if trial and self.state == "half-open":
            self._state, self._closed_at = "closed", self._clock()
            self._failures.clear()

    def fail(self, reason: str, trial: bool = False) -> None:
        """A call failed by the agent's own fault."""
        state, now = self.state, self._clock()
        if state == "half-open" and trial:
            self._open(reason, relapse=True)
        elif state == "closed":
            self._failures.append(now)
            if len(self._recent()) >= self._rules.failures:
                self._open(reason, relapse=now - self._closed_at <= self._rules.window_s)

    def leave(self, trial: bool = False) -> None:
        """A call ended without a verdict (cancelled, too late, the client's fault): the next one may try."""
        if trial and self.state == "half-open":
            self._tried = False

    def release(self) -> None:
        """Forget everything."""
        self._state, self._closed_at, self._tried = "closed", float("-inf"), False
        self.relapses, self.reason = 0, ""
        self._failures.clear()

    def _recent(self) -> deque[float]:
        while self._failures and self._clock() - self._failures[0] > self._rules.window_s:
            self._failures.popleft()
        return self._failures

    def _open(self, reason: str, relapse: bool) -> None:
        self.relapses = self.relapses + 1 if relapse else 0
        self.reason = reason
        self._failures.clear()
        if relapse and self.relapses >= self._rules.quarantine:
            self._state = "quarantined"
            return
        self._state = "open"
        self._until = self._clock() + self._rules.open_s * 2.0 ** min(self.relapses, _MOST_DOUBLINGS)


class Restarts:
    """When the worker of one place may be started again."""

    def __init__(
        self,
        rules: team_config.WorkerOptions,
        clock: Clock = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._rules = rules
        self._clock = clock
        self._draw = draw
        self._ends: deque[float] = deque()
        self.count = 0
        self.is_given_up = False

    def ended(self) -> float:
        """The worker ended; seconds until the next start: doubled for each end within the window, half of it by
        chance.

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


_RESERVED_OF = 8  # one row in so many is kept for other agents
_LEAST_RESERVING_ROWS = 4  # fewer rows are too few to keep one
_MEAN_DECAY = 0.9  # weight of the past in the mean time that a call takes


class AgentQueues:
    """Who waits for which agent, and how many calls each has."""

    def __init__(self, per_agent: int) -> None:
        self._per_agent = per_agent
        self._waiting: dict[str, deque[InFlightCall]] = {}
        self._alone: list[InFlightCall] = []
        self._mean_s: dict[str, float] = {}
        self.inside: Counter[str] = Counter()

    def enter(self, agent: str, rows: int) -> None:
        """Count a call in. Raises BusyError when the agent has as many as it may; `rows` answer side by side."""
        inside = self.inside[agent]
        if inside >= self._per_agent:
            wait_s = max(1.0, self._mean_s.get(agent, 1.0) * inside / max(1, rows))
            raise BusyError(
                f"{agent} has {inside} requests, and may have {self._per_agent} at once",
                f"ask again in {wait_s:.0f} s, or raise limits.per_agent",
                wait_s,
            )
        self.inside[agent] += 1

    def leave(self, agent: str, took_s: float) -> None:
        """Count a call out, which was inside for so long."""
        self.inside[agent] -= 1
        if not self.inside[agent]:
            del self.inside[agent]
        self._mean_s[agent] = _MEAN_DECAY * self._mean_s.get(agent, took_s) + (1 - _MEAN_DECAY) * took_s

    def put(self, in_flight: InFlightCall) -> None:
        """Let a call wait, in the order in which calls came, among its agent's or, suspected, among those to be made
        alone.
        """
        if in_flight.is_suspect:
            self._alone.append(in_flight)
            return
        queue = self._waiting.setdefault(in_flight.agent, deque())
        position = len(queue)
        while position and queue[position - 1].number > in_flight.number:
            position -= 1
        queue.insert(position, in_flight)

    def drop(self, in_flight: InFlightCall) -> None:
        """Take a call out of where it waits, if it waits."""
        if in_flight in self._alone:
            self._alone.remove(in_flight)
        queue = self._waiting.get(in_flight.agent)
        if queue is None:
            return
        if in_flight in queue:
            queue.remove(in_flight)
        if not queue:
            del self._waiting[in_flight.agent]

    def in_turn(self, row_counts: Counter[str]) -> list[InFlightCall]:
        """The first call of each agent: the agent that holds fewest rows first, then the call that waits longest."""
        return sorted(
            (queue[0] for queue in self._waiting.values()),
            key=lambda in_flight: (row_counts[in_flight.agent], in_flight.number),
        )

    def suspects(self, watched: Counter[str]) -> list[InFlightCall]:
        """Calls to be made alone; those of agents that nothing is known against first."""
        return sorted(self._alone, key=lambda in_flight: (watched[in_flight.agent] > 0, in_flight.number))

    def waiting(self) -> Iterator[InFlightCall]:
        """All that wait."""
        for queue in list(self._waiting.values()):
            yield from list(queue)
        yield from list(self._alone)

    def health(self, agent: str) -> dict[str, int]:
        """How many calls of an agent wait, and how many workers make."""
        queued = len(self._waiting.get(agent, ())) + sum(in_flight.agent == agent for in_flight in self._alone)
        return {"queued": queued, "live": self.inside[agent] - queued}

    def any_waits(self) -> bool:
        """Whether a call waits that is not suspected."""
        return bool(self._waiting)


def max_rows_per_agent(rows: int) -> int:
    """How many of `rows` one agent may hold."""
    return rows if rows < _LEAST_RESERVING_ROWS else rows - max(1, rows // _RESERVED_OF)


# All agents stand on it, so it has no breaker and is never taken out of service.
BASE_AGENT = "base"
# Failures by an agent's own fault. What is wrong with a request, or with its time and room, is no agent's.
AGENT_FAULTS = ("ModelError", "ArtifactError")
_WATCHED_CALLS = 8  # of an agent whose call killed a worker: so many are made alone before it is trusted again
_MOST_KILLERS = 1024


class AgentHealthTracker:
    """Of all agents."""

    def __init__(self, rules: team_config.CircuitBreakerOptions) -> None:
        self._rules = rules
        self._breakers: dict[str, CircuitBreaker] = {}
        self._killers: OrderedDict[str, None] = OrderedDict()
        self._prompts: OrderedDict[str, None] = OrderedDict()
        self.watched: Counter[str] = Counter()

    def enter(self, call: GenerateCall, agent: str) -> bool:
        """Whether the call is the one that tries a half-open breaker.

        Raises ModelError for one that has killed workers, UnavailableError when the agent is out of service.
        """
        if self._killers and _content(call) in self._killers:
            raise ModelError(
                f"this request to {agent} killed the workers that took it",
                "send another prompt: this one is not tried again",
            )
        return agent in self._breakers and self._breakers[agent].enter()

    def is_suspect(self, call: GenerateCall, agent: str) -> bool:
        """Whether it is to be made alone from the start: its agent is watched, or the same prompt has killed as
        another's.

        So whoever steps in for an agent is asked the same at nobody's cost.
        """
        return self.watched[agent] > 0 or (bool(self._prompts) and _prompt(call) in self._prompts)

    def leave(self, agent: str, trial: bool) -> None:
        """A call ended without a verdict."""
        if agent in self._breakers:
            self._breakers[agent].leave(trial)

    def judge(self, in_flight: InFlightCall, event: ReplyDone | ReplyFailed) -> None:
        """A call ended: what that says of its agent."""
        if isinstance(event, ReplyFailed) and event.kind in AGENT_FAULTS:
            self.blame(in_flight.agent, event.problem, in_flight.trial)
        elif isinstance(event, ReplyDone) and event.finish != "cancelled":
            self._praise(in_flight)
        else:
            self.leave(in_flight.agent, in_flight.trial)

    def condemn(self, in_flight: InFlightCall) -> None:
        """A call has killed a worker that served nobody else."""
        for digests, digest in ((self._killers, _content(in_flight.call)), (self._prompts, _prompt(in_flight.call))):
            digests[digest] = None
            while len(digests) > _MOST_KILLERS:
                digests.popitem(last=False)
        if in_flight.agent != BASE_AGENT:
            self.watched[in_flight.agent] = _WATCHED_CALLS

    def blame(self, agent: str, reason: str, trial: bool = False) -> None:
        """Count a failure that is the agent's own."""
        if agent == BASE_AGENT:
            return
        if agent not in self._breakers:
            # versions come and go: those of which nothing is known any more make room
            self._breakers = {name: breaker for name, breaker in self._breakers.items() if not breaker.is_blank}
            self._breakers[agent] = CircuitBreaker(agent, self._rules)
        self._breakers[agent].fail(reason, trial)

    def release(self, agent: str) -> None:
        """See Crew."""
        self._breakers.pop(agent, None)
        self.watched.pop(agent, None)

    @property
    def agents(self) -> set[str]:
        """Those of whom something may be known."""
        return set(self._breakers)

    def health(self, agent: str) -> dict[str, Any]:
        """Of one agent. `reason`: the last failure that opened its breaker."""
        breaker = self._breakers.get(agent)
        fields = {"breaker": breaker.state, "why": breaker.reason} if breaker else {"breaker": "closed", "why": ""}
        return {**fields, "watched": self.watched[agent]}

    def _praise(self, in_flight: InFlightCall) -> None:
        if in_flight.agent in self._breakers:
            self._breakers[in_flight.agent].succeed(in_flight.trial)
        if in_flight.is_suspect and in_flight.agent in self.watched:
            self.watched[in_flight.agent] -= 1
            self.watched += Counter()  # forgets those at 0


def _prompt(call: GenerateCall) -> str:
    """A digest of what is asked in the end, whatever stands before it."""
    return _digest({"asked": call.messages[-1:], "text": call.text})


def _content(call: GenerateCall) -> str:
    """A digest of all that a call asks for, whoever asks."""
    return _digest({**call.as_json(), "id": ""})


def _digest(fields: Mapping[str, Any]) -> str:
    """Of what clients say, in which half of a surrogate pair may stand: canonical JSON has no bytes for that."""
    return hashlib.sha256(frame(fields)).hexdigest()
