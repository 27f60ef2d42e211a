"""Canary and shadow rollout of a new version.

A trial (canary or shadow) compares the candidate with the live version on replies of the same period. After a
promotion the new version is compared for `watch_s` with the last replies of its predecessor. `sequential_tests` holds
the statistical test.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from sartor.core.confidence_sequences import FailureRate
from sartor.core.errors import SartorError
from sartor.inference.engine import GenerateCall, ReplyDone, ReplyFailed
from sartor.serving.dispatch.reply_stream import ReplyStream
from sartor.serving.dispatch.sequential_tests import WINDOW_REPLIES, VersionTally, first_alarm
from sartor.serving.registry.registry_schema import Agent
from sartor.serving.team_config import Rollout
from sartor.serving.types import EventStream, WorkerBackend


def in_fraction(fraction: float, subject: str, id: str) -> bool:
    """Return whether the request with this id falls into `fraction` of all requests.

    The answer depends only on the arguments: SHA-256 of subject and id, as a uniform number in [0, 1).
    """
    number = int.from_bytes(hashlib.sha256(f"{subject}:{id}".encode()).digest()[:8], "big")
    return number < fraction * 2**64


def is_json(text: str) -> bool:
    """Return whether a reply is one whole JSON object or list, the only format that the monitors know."""
    stripped = text.strip()
    if stripped[:1] not in ("{", "["):
        return False
    try:
        json.loads(stripped)
    except (ValueError, RecursionError):
        return False
    return True


@dataclass(frozen=True)
class ObservedReply:
    """Measurements of one reply.

    agent: exact version.
    token_s: seconds per token; 0 for a reply without tokens.
    in_flight: number of replies that ran when it began.
    """

    agent: str
    failed: bool
    is_json: bool = False
    token_s: float = 0.0
    in_flight: int = 1


@dataclass(frozen=True)
class RolloutVerdict:
    """Decision about a version on trial or under watch, with its reason and numbers."""

    agent: str
    version: str
    action: Literal["roll back", "promote"]
    reason: str
    numbers: Mapping[str, Any]


@dataclass
class _Comparison:
    """Comparison of one version with another.

    live: version that the candidate is compared with. is_frozen: whether `live` answers no more (a watch).
    deadline: monotonic time, s. window: number of the current window, from 1.
    """

    name: str
    candidate: str
    live: str
    is_frozen: bool
    deadline: float
    candidate_tally: VersionTally = field(default_factory=VersionTally)
    live_tally: VersionTally = field(default_factory=VersionTally)
    window: int = 1
    replies: int = 0
    differing: FailureRate = field(default_factory=FailureRate)
    is_over: bool = False


class Rollouts:
    """All trials and watches of a team. Not thread-safe; use it in the event loop's thread."""

    def __init__(self, rules: Rollout, clock: Callable[[], float] = time.monotonic) -> None:
        self._rules = rules
        self._clock = clock
        self._comparisons: dict[str, _Comparison] = {}
        # live version -> its last full window and the current one; its successor is compared with both
        self._live_tallies: dict[str, tuple[VersionTally, VersionTally]] = {}

    def follow(self, agent: Agent, previous: Agent | None) -> None:
        """Begin or end the trial or watch of an agent that has changed."""
        current = self._comparisons.get(agent.name)
        if agent.candidate:
            if (
                current is None
                or current.is_frozen
                or (current.candidate, current.live) != (agent.candidate, agent.live)
            ):
                self._comparisons[agent.name] = _Comparison(
                    agent.name, candidate=agent.candidate, live=agent.live, is_frozen=False, deadline=float("inf")
                )
        elif previous is not None and previous.live != agent.live and agent.previous == previous.live:
            watch = _Comparison(
                agent.name,
                candidate=agent.live,
                live=previous.live,
                is_frozen=True,
                deadline=self._clock() + self._rules.watch_s,
            )
            for tally in self._live_tallies.get(f"{agent.name}@{previous.live}", ()):
                watch.live_tally.add(tally)
            self._comparisons[agent.name] = watch
        elif current is not None and (not current.is_frozen or current.candidate != agent.live):
            del self._comparisons[agent.name]
        if previous is not None and previous.live != agent.live:
            self._live_tallies.pop(f"{previous.name}@{previous.live}", None)
        self._live_tallies.setdefault(f"{agent.name}@{agent.live}", (VersionTally(), VersionTally()))

    def forget(self, name: str) -> None:
        """Remove an agent that is not served any more."""
        self._comparisons.pop(name, None)
        self._live_tallies = {
            version: tallies for version, tallies in self._live_tallies.items() if version.rpartition("@")[0] != name
        }

    def observe_reply(self, reply: ObservedReply) -> RolloutVerdict | None:
        """Count a reply that has ended; return a verdict if there is a new one."""
        if reply.agent in self._live_tallies:
            self._count(self._current(reply.agent), reply)
        comparison = self._comparison(reply.agent)
        if comparison is None:
            return None
        name, _, version = reply.agent.rpartition("@")
        if version == comparison.candidate:
            comparison.replies += 1
            self._count(comparison.candidate_tally, reply)
            return self._judge(comparison)
        if version == comparison.live and not comparison.is_frozen:
            self._count(comparison.live_tally, reply)
        return None

    def observe_rating(self, agent: str, is_bad: bool) -> RolloutVerdict | None:
        """Count a user's rating of a reply by this exact version; return a verdict if there is a new one."""
        if agent in self._live_tallies:
            self._current(agent).feedback.count(is_bad)
        comparison = self._comparison(agent)
        if comparison is None:
            return None
        version = agent.rpartition("@")[2]
        if version == comparison.candidate:
            comparison.candidate_tally.feedback.count(is_bad)
            return self._judge(comparison)
        if version == comparison.live and not comparison.is_frozen:
            comparison.live_tally.feedback.count(is_bad)
        return None

    def observe_comparison(self, agent: str, is_same: bool) -> None:
        """Count a shadow reply of the candidate.

        agent: exact version. is_same: whether its text equals that of the live version.
        """
        comparison = self._comparison(agent)
        if comparison is not None and agent == f"{comparison.name}@{comparison.candidate}":
            comparison.differing.count(not is_same)

    def condemn(self, agent: str, reason: str) -> RolloutVerdict | None:
        """Return a roll-back verdict for a version on trial or under watch that another check found bad.

        One such check is the quarantine of its circuit breaker.
        """
        comparison = self._comparison(agent)
        if comparison is None or agent != f"{comparison.name}@{comparison.candidate}":
            return None
        return self._over(comparison, "roll back", reason, {"candidate": comparison.candidate_tally.as_json()})

    def undecided(self, name: str) -> None:
        """Allow a new verdict, because the last one could not be carried out."""
        if name in self._comparisons:
            self._comparisons[name].is_over = False

    def status(self, name: str) -> dict[str, Any]:
        """Return the trial or watch of an agent, for /health; empty if there is none."""
        comparison = self._comparisons.get(name)
        if comparison is None:
            return {}
        kind = "watch" if comparison.is_frozen else "trial"
        fields = {
            "kind": kind,
            "version": comparison.candidate,
            "against": comparison.live,
            "replies": comparison.replies,
        }
        return {**fields, "differing": vars(comparison.differing), "candidate": comparison.candidate_tally.as_json()}

    def _comparison(self, agent: str) -> _Comparison | None:
        """Return the comparison of this version's agent if it is still undecided; else None."""
        comparison = self._comparisons.get(agent.rpartition("@")[0])
        if comparison is None or comparison.is_over:
            return None
        if self._clock() > comparison.deadline:
            del self._comparisons[comparison.name]
            return None
        return comparison

    def _current(self, agent: str) -> VersionTally:
        _, current = self._live_tallies[agent]
        if current.failures.seen >= WINDOW_REPLIES:
            self._live_tallies[agent] = (current, VersionTally())
        return self._live_tallies[agent][1]

    def _count(self, tally: VersionTally, reply: ObservedReply) -> None:
        tally.count_reply(failed=reply.failed, is_json=reply.is_json, token_s=reply.token_s, in_flight=reply.in_flight)

    def _judge(self, comparison: _Comparison) -> RolloutVerdict | None:
        alarm = first_alarm(comparison.candidate_tally, comparison.live_tally, self._rules, comparison.window)
        if alarm is not None:
            numbers = {"monitor": alarm.monitor, "window": comparison.window, **alarm.numbers}
            return self._over(comparison, "roll back", alarm.reason, numbers)
        required_replies = self._rules.canary_requests
        if required_replies and not comparison.is_frozen and comparison.replies >= required_replies:
            numbers = {"candidate": comparison.candidate_tally.as_json(), "live": comparison.live_tally.as_json()}
            return self._over(comparison, "promote", f"{comparison.replies} replies without alarm", numbers)
        if comparison.candidate_tally.failures.seen >= WINDOW_REPLIES:
            comparison.candidate_tally, comparison.window = VersionTally(), comparison.window + 1
            comparison.live_tally = comparison.live_tally if comparison.is_frozen else VersionTally()
        return None

    def _over(
        self, comparison: _Comparison, action: Literal["roll back", "promote"], reason: str, numbers: Mapping[str, Any]
    ) -> RolloutVerdict:
        # No second verdict. The change in the registry removes the comparison.
        comparison.is_over = True
        return RolloutVerdict(
            agent=comparison.name, version=comparison.candidate, action=action, reason=reason, numbers=numbers
        )


MOST_WAITING = 16
ROOM_S = 0.05


@dataclass(frozen=True)
class Shadow:
    """Answered request that the candidate repeats.

    agent: exact version of the candidate. live_reply: text of the live version's reply.
    """

    call: GenerateCall
    agent: str
    live_reply: str


@dataclass(frozen=True)
class ShadowOutcome:
    """Result of a shadow request: its last event and the reply."""

    shadow: Shadow
    event: ReplyDone | ReplyFailed
    text: str = ""
    tokens: int = 0
    took_s: float = 0.0


class Shadows:
    """Shadow requests of a team. A live reply never waits for one; shadows without room are dropped and counted.

    has_room: returns whether the workers are idle enough.
    leased: keeps the candidate's adapter loaded.
    report: called with each outcome.
    answered, left_out: number of shadows that ended and that were dropped.
    """

    def __init__(
        self,
        workers: WorkerBackend,
        has_room: Callable[[], bool],
        leased: Callable[[str], AbstractContextManager[None]],
        report: Callable[[ShadowOutcome], object],
        deadline_s: float,
    ) -> None:
        self._workers = workers
        self._has_room = has_room
        self._leased = leased
        self._report = report
        self._deadline_s = deadline_s
        self._waiting: deque[Shadow] = deque()
        self._has_work = asyncio.Event()
        self.answered = 0
        self.left_out = 0

    def offer(self, shadow: Shadow) -> None:
        """Queue a shadow. If the queue is full, its oldest entry is dropped."""
        if len(self._waiting) == MOST_WAITING:
            self._waiting.popleft()
            self.left_out += 1
        self._waiting.append(shadow)
        self._has_work.set()

    async def run(self) -> None:
        """Answer queued shadows until cancelled."""
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            while self._waiting:
                if self._has_room():
                    await self._answer(self._waiting.popleft())
                else:
                    await asyncio.sleep(ROOM_S)

    async def _answer(self, shadow: Shadow) -> None:
        with self._leased(shadow.call.adapter):
            began = time.monotonic()
            try:
                events = cast(EventStream, await self._workers.reply(shadow.call, shadow.agent, self._deadline_s))
            except SartorError as error:
                self._report(
                    ShadowOutcome(shadow, ReplyFailed(shadow.call.id, error.kind, error.problem, error.remedy))
                )
                return
            # the lease lasts as long as the shadow, not only until the stream ends
            stream = ReplyStream(events, lambda: None, _ended, time.monotonic() - began)
            try:
                await self._follow(shadow, stream)
            finally:
                await stream.aclose()

    async def _follow(self, shadow: Shadow, stream: ReplyStream) -> None:
        async for event in stream:
            if isinstance(event, (ReplyDone, ReplyFailed)):
                self.answered += 1
                self._report(
                    ShadowOutcome(shadow, event, text=stream.text, tokens=stream.tokens, took_s=stream.took_s)
                )
            elif not self._has_room():
                self.left_out += 1
                return


async def _ended(stream: ReplyStream, event: ReplyDone | ReplyFailed) -> None:
    """Do nothing at the end: no client waits for a shadow's last event."""
