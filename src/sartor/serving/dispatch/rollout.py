"""How a new version comes in: which request it answers, what is seen of it, and when it goes back or becomes live by itself.

A trial (canary or shadow) compares the candidate with the live version on the replies of the same hours. After a promotion the
new version is compared for `watch_s` with what was last seen of the one before it. `monitors` has the rule.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sartor.agents.entries import Agent
from sartor.agents.monitors import WINDOW_REPLIES, Alarm, Rate, Tally, alarm
from sartor.agents.team import Rollout


def takes(fraction: float, of: str, id: str) -> bool:
    """Whether the request with this id falls into `fraction` of all: always the same answer for the same words."""
    number = int.from_bytes(hashlib.sha256(f"{of}:{id}".encode()).digest()[:8], "big")
    return number < fraction * 2**64


def is_json(text: str) -> bool:
    """Whether a reply is one whole JSON object or list: the only format that monitors know."""
    bare = text.strip()
    if bare[:1] not in ("{", "["):
        return False
    try:
        json.loads(bare)
    except (ValueError, RecursionError):
        return False
    return True


@dataclass(frozen=True)
class Seen:
    """What is known of one reply. agent: the exact version. token_s: seconds per token; 0 where there was none."""

    agent: str
    failed: bool
    is_json: bool = False
    token_s: float = 0.0
    in_flight: int = 1


@dataclass(frozen=True)
class Verdict:
    """What is to be done about a version on trial or under watch, and what that rests on."""

    agent: str
    version: str
    does: Literal["roll back", "promote"]
    why: str
    numbers: Mapping[str, Any]


@dataclass
class _Comparison:
    """One version under eyes. live: the one that it is compared with; `frozen` if that one answers no more."""

    name: str
    candidate: str
    live: str
    frozen: bool
    until: float
    seen: Tally = field(default_factory=Tally)
    beside: Tally = field(default_factory=Tally)
    window: int = 1
    replies: int = 0
    differing: Rate = field(default_factory=Rate)
    is_over: bool = False


class Rollouts:
    """Every trial and watch of a team. Not thread-safe: the event loop's own."""

    def __init__(self, rules: Rollout, clock: Callable[[], float] = time.monotonic) -> None:
        self._rules = rules
        self._clock = clock
        self._comparisons: dict[str, _Comparison] = {}
        # of each live version, the last whole window and the one that fills: what its successor is compared with
        self._known: dict[str, tuple[Tally, Tally]] = {}

    def follow(self, agent: Agent, was: Agent | None) -> None:
        """An agent has changed: begin or end its trial or watch."""
        standing = self._comparisons.get(agent.name)
        if agent.candidate:
            if standing is None or standing.frozen or (standing.candidate, standing.live) != (agent.candidate, agent.live):
                self._comparisons[agent.name] = _Comparison(agent.name, agent.candidate, agent.live, False, float("inf"))
        elif was is not None and was.live != agent.live and agent.previous == was.live:
            watch = _Comparison(agent.name, agent.live, was.live, True, self._clock() + self._rules.watch_s)
            for tally in self._known.get(f"{agent.name}@{was.live}", ()):
                watch.beside.add(tally)
            self._comparisons[agent.name] = watch
        elif standing is not None and (not standing.frozen or standing.candidate != agent.live):
            del self._comparisons[agent.name]
        if was is not None and was.live != agent.live:
            self._known.pop(f"{was.name}@{was.live}", None)
        self._known.setdefault(f"{agent.name}@{agent.live}", (Tally(), Tally()))

    def forget(self, name: str) -> None:
        """An agent is served no more."""
        self._comparisons.pop(name, None)
        self._known = {version: known for version, known in self._known.items() if version.rpartition("@")[0] != name}

    def saw(self, seen: Seen) -> Verdict | None:
        """A reply has ended. What is to be done now, said once."""
        if seen.agent in self._known:
            self._count(self._current(seen.agent), seen)
        comparison = self._comparison(seen.agent)
        if comparison is None:
            return None
        name, _, version = seen.agent.rpartition("@")
        if version == comparison.candidate:
            comparison.replies += 1
            self._count(comparison.seen, seen)
            return self._judge(comparison)
        if version == comparison.live and not comparison.frozen:
            self._count(comparison.beside, seen)
        return None

    def heard(self, agent: str, is_bad: bool) -> Verdict | None:
        """A person has rated a reply of this exact version."""
        if agent in self._known:
            self._current(agent).feedback.count(is_bad)
        comparison = self._comparison(agent)
        if comparison is None:
            return None
        version = agent.rpartition("@")[2]
        if version == comparison.candidate:
            comparison.seen.feedback.count(is_bad)
            return self._judge(comparison)
        if version == comparison.live and not comparison.frozen:
            comparison.beside.feedback.count(is_bad)
        return None

    def compared(self, agent: str, same: bool) -> None:
        """The candidate, an exact version, was asked beside the live one: whether their replies are the same text."""
        comparison = self._comparison(agent)
        if comparison is not None and agent == f"{comparison.name}@{comparison.candidate}":
            comparison.differing.count(not same)

    def condemn(self, agent: str, why: str) -> Verdict | None:
        """A version under eyes was found bad by somebody else: quarantined, say."""
        comparison = self._comparison(agent)
        if comparison is None or agent != f"{comparison.name}@{comparison.candidate}":
            return None
        return self._over(comparison, "roll back", why, {"candidate": comparison.seen.as_json()})

    def undecided(self, name: str) -> None:
        """What a verdict asked for could not be done: the next reply may ask again."""
        if name in self._comparisons:
            self._comparisons[name].is_over = False

    def status(self, name: str) -> dict[str, Any]:
        """The trial or watch of an agent, for /health; empty if there is none."""
        comparison = self._comparisons.get(name)
        if comparison is None:
            return {}
        kind = "watch" if comparison.frozen else "trial"
        told = {"kind": kind, "version": comparison.candidate, "against": comparison.live, "replies": comparison.replies}
        return {**told, "differing": vars(comparison.differing), "candidate": comparison.seen.as_json()}

    def _comparison(self, agent: str) -> _Comparison | None:
        """The one that this exact version's agent is in, if it is still to be judged."""
        comparison = self._comparisons.get(agent.rpartition("@")[0])
        if comparison is None or comparison.is_over:
            return None
        if self._clock() > comparison.until:
            del self._comparisons[comparison.name]
            return None
        return comparison

    def _current(self, agent: str) -> Tally:
        _, filling = self._known[agent]
        if filling.failures.seen >= WINDOW_REPLIES:
            self._known[agent] = (filling, Tally())
        return self._known[agent][1]

    def _count(self, tally: Tally, seen: Seen) -> None:
        tally.count_reply(failed=seen.failed, is_json=seen.is_json, token_s=seen.token_s, in_flight=seen.in_flight)

    def _judge(self, comparison: _Comparison) -> Verdict | None:
        found = alarm(comparison.seen, comparison.beside, self._rules, comparison.window)
        if found is not None:
            return self._over(comparison, "roll back", found.why, _numbers(found, comparison))
        enough = self._rules.canary_requests
        if enough and not comparison.frozen and comparison.replies >= enough:
            numbers = {"candidate": comparison.seen.as_json(), "live": comparison.beside.as_json()}
            return self._over(comparison, "promote", f"{comparison.replies} replies without alarm", numbers)
        if comparison.seen.failures.seen >= WINDOW_REPLIES:
            comparison.seen, comparison.window = Tally(), comparison.window + 1
            comparison.beside = comparison.beside if comparison.frozen else Tally()
        return None

    def _over(
        self, comparison: _Comparison, does: Literal["roll back", "promote"], why: str, numbers: Mapping[str, Any]
    ) -> Verdict:
        comparison.is_over = True  # the registry's answer, not this, ends it: until then nothing more is said
        return Verdict(comparison.name, comparison.candidate, does, why, numbers)


def _numbers(found: Alarm, comparison: _Comparison) -> dict[str, Any]:
    return {"monitor": found.monitor, "window": comparison.window, **found.numbers}
