"""Circuit breakers, bounded queues and quarantine of agents.

    closed --failures within window_s--> open --open_s--> half-open --one good call--> closed
                                           ^                 |
                                           +--- a relapse ---+   open_s doubled; after `quarantine` relapses:
                                                                 quarantined

Circuit breaker and bulkhead: Nygard 2007, "Release It!". Restart intensity: as in Erlang/OTP's supervisors.
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
    """Circuit breaker of one agent.

    Each call that `enter` admits ends with exactly one of `succeed`, `fail` and `leave`.
    relapses: number of consecutive reopenings, by a failed trial or by failures within window_s of the closing.
    reason: last failure that opened it.
    """

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
        """Current state. An open breaker becomes half-open after its wait."""
        if self._state == "open" and self._clock() >= self._until:
            self._state, self._tried = "half-open", False
        return self._state

    @property
    def is_blank(self) -> bool:
        """Whether the breaker is in the same state as a new one: closed, without recent failures or
        a recent closing.
        """
        return self.state == "closed" and not self._recent() and self._clock() - self._closed_at > self._rules.window_s

    def enter(self) -> bool:
        """Admit a call; return whether it is the trial of a half-open breaker.

        Raises UnavailableError while the breaker is open, quarantined, or half-open with a trial under way.
        """
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
        """Record a successful call.

        Only the trial closes a half-open breaker: other calls began before it opened.
        """
        if trial and self.state == "half-open":
            self._state, self._closed_at = "closed", self._clock()
            self._failures.clear()

    def fail(self, reason: str, trial: bool = False) -> None:
        """Record a failure that is the agent's own fault."""
        state, now = self.state, self._clock()
        if state == "half-open" and trial:
            self._open(reason, relapse=True)
        elif state == "closed":
            self._failures.append(now)
            if len(self._recent()) >= self._rules.failures:
                self._open(reason, relapse=now - self._closed_at <= self._rules.window_s)

    def leave(self, trial: bool = False) -> None:
        """Record a call without a verdict (cancelled, late, the client's fault).

        The next call may then be the trial.
        """
        if trial and self.state == "half-open":
            self._tried = False

    def release(self) -> None:
        """Reset the breaker to closed."""
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
    """Restart delays of the worker in one slot.

    count: number of ends so far.
    is_given_up: whether the slot has had too many ends and waits for its window to pass.
    draw: returns a random number in [0, 1).
    """

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
        """Record the end of a worker; return the seconds until the next start.

        The wait doubles with each end within the window, up to `backoff_most_s`; up to half of it is random jitter.
        With more than `restarts` ends, the slot is given up until the oldest of them has left the window.
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
        # exponential backoff with jitter: min(b * 2^(n-1), b_max) * U, U uniform in [0.5, 1)
        wait_s = min(self._rules.backoff_s * 2.0 ** (recent - 1), self._rules.backoff_most_s)
        return wait_s * (0.5 + self._draw() / 2)

    def starting(self) -> None:
        """End the wait: the slot is not given up any more."""
        self.is_given_up = False


_RESERVED_OF = 8  # one of so many rows is reserved for other agents
_LEAST_RESERVING_ROWS = 4  # with fewer rows none is reserved
_MEAN_DECAY = 0.9  # weight of the past in the exponential moving average of a call's time


class AgentQueues:
    """Waiting calls of each agent, and the number of its calls in progress (bulkhead).

    per_agent: limit for the calls of one agent that wait or run. inside: number of those calls, by agent.
    """

    def __init__(self, per_agent: int) -> None:
        self._per_agent = per_agent
        self._waiting: dict[str, deque[InFlightCall]] = {}
        self._alone: list[InFlightCall] = []
        self._mean_s: dict[str, float] = {}
        self.inside: Counter[str] = Counter()

    def enter(self, agent: str, rows: int) -> None:
        """Count a new call.

        rows: number of calls that run in parallel, for the estimate of the wait.
        Raises BusyError if the agent has reached its limit.
        """
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
        """Count the end of a call that took `took_s` seconds."""
        self.inside[agent] -= 1
        if not self.inside[agent]:
            del self.inside[agent]
        self._mean_s[agent] = _MEAN_DECAY * self._mean_s.get(agent, took_s) + (1 - _MEAN_DECAY) * took_s

    def put(self, in_flight: InFlightCall) -> None:
        """Queue a call by its number among its agent's calls.

        A suspected call joins the calls that run alone in a worker.
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
        """Remove a call from its queue, if it waits."""
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
        """Return the first call of each agent, in the order of service.

        Agents that hold fewer rows come first, then calls with a lower number.
        row_counts: rows in use, by agent.
        """
        return sorted(
            (queue[0] for queue in self._waiting.values()),
            key=lambda in_flight: (row_counts[in_flight.agent], in_flight.number),
        )

    def suspects(self, watched: Counter[str]) -> list[InFlightCall]:
        """Return the suspected calls. Those of agents that are not watched come first."""
        return sorted(self._alone, key=lambda in_flight: (watched[in_flight.agent] > 0, in_flight.number))

    def waiting(self) -> Iterator[InFlightCall]:
        """Yield all waiting calls."""
        for queue in list(self._waiting.values()):
            yield from list(queue)
        yield from list(self._alone)

    def health(self, agent: str) -> dict[str, int]:
        """Return the number of an agent's waiting calls (`queued`) and running calls (`live`)."""
        queued = len(self._waiting.get(agent, ())) + sum(in_flight.agent == agent for in_flight in self._alone)
        return {"queued": queued, "live": self.inside[agent] - queued}

    def any_waits(self) -> bool:
        """Return whether a call waits that is not suspected."""
        return bool(self._waiting)


def max_rows_per_agent(rows: int) -> int:
    """Return the number of `rows` that one agent may hold."""
    return rows if rows < _LEAST_RESERVING_ROWS else rows - max(1, rows // _RESERVED_OF)


# All agents share the base, so it has no breaker and is never taken out of service.
BASE_AGENT = "base"
# Kinds of errors that are an agent's own fault. Errors of the request, of deadlines and of capacity are not.
AGENT_FAULTS = ("ModelError", "ArtifactError")
_WATCHED_CALLS = 8  # after an agent's call killed a worker: successful calls alone until the agent is trusted again
_MOST_KILLERS = 1024


class AgentHealthTracker:
    """Circuit breakers of all agents, and the calls that have killed workers.

    watched: by agent, number of its next calls that must run alone in a worker.
    """

    def __init__(self, rules: team_config.CircuitBreakerOptions) -> None:
        self._rules = rules
        self._breakers: dict[str, CircuitBreaker] = {}
        self._killers: OrderedDict[str, None] = OrderedDict()
        self._prompts: OrderedDict[str, None] = OrderedDict()
        self.watched: Counter[str] = Counter()

    def enter(self, call: GenerateCall, agent: str) -> bool:
        """Admit a call; return whether it is the trial of a half-open breaker.

        Raises ModelError for a call that has killed workers; UnavailableError if the agent is out of service.
        """
        if self._killers and _content(call) in self._killers:
            raise ModelError(
                f"this request to {agent} killed the workers that took it",
                "send another prompt: this one is not tried again",
            )
        return agent in self._breakers and self._breakers[agent].enter()

    def is_suspect(self, call: GenerateCall, agent: str) -> bool:
        """Return whether a call must run alone from the start.

        That holds if its agent is watched, or if the same prompt killed workers in a call of any agent. An agent that
        stands in for another thus gets the same prompt without risk to other calls.
        """
        return self.watched[agent] > 0 or (bool(self._prompts) and _prompt(call) in self._prompts)

    def leave(self, agent: str, trial: bool) -> None:
        """Record a call that ended without a verdict."""
        if agent in self._breakers:
            self._breakers[agent].leave(trial)

    def judge(self, in_flight: InFlightCall, event: ReplyDone | ReplyFailed) -> None:
        """Record the result of a call as the agent's success, failure or neither."""
        if isinstance(event, ReplyFailed) and event.kind in AGENT_FAULTS:
            self.blame(in_flight.agent, event.problem, in_flight.trial)
        elif isinstance(event, ReplyDone) and event.finish != "cancelled":
            if in_flight.agent in self._breakers:
                self._breakers[in_flight.agent].succeed(in_flight.trial)
            if in_flight.is_suspect and in_flight.agent in self.watched:
                self.watched[in_flight.agent] -= 1
                self.watched += Counter()  # removes entries at 0
        else:
            self.leave(in_flight.agent, in_flight.trial)

    def condemn(self, in_flight: InFlightCall) -> None:
        """Record a call that killed a worker in which it ran alone."""
        for digests, digest in ((self._killers, _content(in_flight.call)), (self._prompts, _prompt(in_flight.call))):
            digests[digest] = None
            while len(digests) > _MOST_KILLERS:
                digests.popitem(last=False)
        if in_flight.agent != BASE_AGENT:
            self.watched[in_flight.agent] = _WATCHED_CALLS

    def blame(self, agent: str, reason: str, trial: bool = False) -> None:
        """Count a failure that is the agent's own fault. The base is never blamed."""
        if agent == BASE_AGENT:
            return
        if agent not in self._breakers:
            # versions come and go, so breakers in their initial state are dropped
            self._breakers = {name: breaker for name, breaker in self._breakers.items() if not breaker.is_blank}
            self._breakers[agent] = CircuitBreaker(agent, self._rules)
        self._breakers[agent].fail(reason, trial)

    def release(self, agent: str) -> None:
        """Return an agent to service: drop its breaker and its watch."""
        self._breakers.pop(agent, None)
        self.watched.pop(agent, None)

    @property
    def agents(self) -> set[str]:
        """Agents that have a breaker."""
        return set(self._breakers)

    def health(self, agent: str) -> dict[str, Any]:
        """Return the breaker's state of an agent, why it opened last (`why`), and the number of watched calls."""
        breaker = self._breakers.get(agent)
        fields = {"breaker": breaker.state, "why": breaker.reason} if breaker else {"breaker": "closed", "why": ""}
        return {**fields, "watched": self.watched[agent]}


def _prompt(call: GenerateCall) -> str:
    """Return a digest of the last message or the text, without what precedes it."""
    return _digest({"asked": call.messages[-1:], "text": call.text})


def _content(call: GenerateCall) -> str:
    """Return a digest of a call without its id."""
    return _digest({**call.as_json(), "id": ""})


def _digest(fields: Mapping[str, Any]) -> str:
    """Return the SHA-256 of client data as a frame.

    A client's text may hold a lone surrogate, which canonical JSON cannot encode.
    """
    return hashlib.sha256(frame(fields)).hexdigest()
