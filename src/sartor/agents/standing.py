"""What is known against agents and calls: breakers, agents that are watched, and requests that have killed workers."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

from sartor.agents import team
from sartor.agents.breaker import Breaker
from sartor.agents.live import LiveCall
from sartor.core.errors import ModelError
from sartor.core.ipc import frame
from sartor.inference.engine import Call, Done, Failed

# All agents stand on it, so it has no breaker and is never taken out of service.
BASE_AGENT = "base"
# Failures by an agent's own fault. What is wrong with a request, or with its time and room, is no agent's.
AGENT_FAULTS = ("ModelError", "ArtifactError")
_WATCHED_CALLS = 8  # of an agent whose call killed a worker: so many are made alone before it is trusted again
_MOST_KILLERS = 1024


class Standing:
    """Of all agents."""

    def __init__(self, rules: team.Breaker) -> None:
        self._rules = rules
        self._breakers: dict[str, Breaker] = {}
        self._killers: OrderedDict[str, None] = OrderedDict()
        self._prompts: OrderedDict[str, None] = OrderedDict()
        self.watched: Counter[str] = Counter()

    def enter(self, call: Call, agent: str) -> bool:
        """Whether the call is the one that tries a half-open breaker.

        Raises ModelError for one that has killed workers, UnavailableError when the agent is out of service.
        """
        if self._killers and _content(call) in self._killers:
            raise ModelError(f"this request to {agent} killed the workers that took it", "change the request")
        return agent in self._breakers and self._breakers[agent].enter()

    def is_suspect(self, call: Call, agent: str) -> bool:
        """Whether it is to be made alone from the start: its agent is watched, or the same prompt has killed as another's.

        So whoever steps in for an agent is asked the same at nobody's cost.
        """
        return self.watched[agent] > 0 or (bool(self._prompts) and _prompt(call) in self._prompts)

    def leave(self, agent: str, trial: bool) -> None:
        """A call ended without a verdict."""
        if agent in self._breakers:
            self._breakers[agent].leave(trial)

    def judge(self, live: LiveCall, event: Done | Failed) -> None:
        """A call ended: what that says of its agent."""
        if isinstance(event, Failed) and event.kind in AGENT_FAULTS:
            self.blame(live.agent, event.problem, live.trial)
        elif isinstance(event, Done) and event.finish != "cancelled":
            self._praise(live)
        else:
            self.leave(live.agent, live.trial)

    def condemn(self, live: LiveCall) -> None:
        """A call has killed a worker that served nobody else."""
        for kept, digest in ((self._killers, _content(live.call)), (self._prompts, _prompt(live.call))):
            kept[digest] = None
            while len(kept) > _MOST_KILLERS:
                kept.popitem(last=False)
        if live.agent != BASE_AGENT:
            self.watched[live.agent] = _WATCHED_CALLS

    def blame(self, agent: str, why: str, trial: bool = False) -> None:
        """Count a failure that is the agent's own."""
        if agent == BASE_AGENT:
            return
        if agent not in self._breakers:
            # versions come and go: those of which nothing is known any more make room
            self._breakers = {name: breaker for name, breaker in self._breakers.items() if not breaker.is_blank}
            self._breakers[agent] = Breaker(agent, self._rules)
        self._breakers[agent].fail(why, trial)

    def release(self, agent: str) -> None:
        """See Crew."""
        self._breakers.pop(agent, None)
        self.watched.pop(agent, None)

    @property
    def agents(self) -> set[str]:
        """Those of whom something may be known."""
        return set(self._breakers)

    def health(self, agent: str) -> dict[str, Any]:
        """Of one agent. `why`: the last failure that opened its breaker."""
        breaker = self._breakers.get(agent)
        said = {"breaker": breaker.state, "why": breaker.why} if breaker else {"breaker": "closed", "why": ""}
        return {**said, "watched": self.watched[agent]}

    def _praise(self, live: LiveCall) -> None:
        if live.agent in self._breakers:
            self._breakers[live.agent].succeed(live.trial)
        if live.is_suspect and live.agent in self.watched:
            self.watched[live.agent] -= 1
            self.watched += Counter()  # forgets those at 0


def _prompt(call: Call) -> str:
    """A digest of what is asked in the end, whatever stands before it."""
    return _digest({"asked": call.messages[-1:], "text": call.text})


def _content(call: Call) -> str:
    """A digest of all that a call asks for, whoever asks."""
    return _digest({**call.as_json(), "id": ""})


def _digest(said: Mapping[str, Any]) -> str:
    """Of what clients say, in which half of a surrogate pair may stand: canonical JSON has no bytes for that."""
    return hashlib.sha256(frame(said)).hexdigest()
