"""Canary and shadow rollout of a new version.

A trial (canary or shadow) compares the candidate with the live version on the replies of the same hours. After a promotion the
new version is compared for `watch_s` with what was last seen of the one before it. `monitors` has the rule.
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

from sartor.core.errors import SartorError
from sartor.inference.engine import GenerateCall, ReplyDone, ReplyFailed
from sartor.serving.dispatch.reply_stream import ReplyStream
from sartor.serving.dispatch.sequential_tests import WINDOW_REPLIES, Alarm, FailureRate, VersionTally, first_alarm
from sartor.serving.registry.registry_schema import Agent
from sartor.serving.team_config import Rollout
from sartor.serving.types import EventStream, WorkerBackend


def in_fraction(fraction: float, of: str, id: str) -> bool:
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
class ObservedReply:
    """What is known of one reply. agent: the exact version. token_s: seconds per token; 0 where there was none."""

    agent: str
    failed: bool
    is_json: bool = False
    token_s: float = 0.0
    in_flight: int = 1


@dataclass(frozen=True)
class RolloutVerdict:
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
    seen: VersionTally = field(default_factory=VersionTally)
    beside: VersionTally = field(default_factory=VersionTally)
    window: int = 1
    replies: int = 0
    differing: FailureRate = field(default_factory=FailureRate)
    is_over: bool = False


class Rollouts:
    """Every trial and watch of a team. Not thread-safe: the event loop's own."""

    def __init__(self, rules: Rollout, clock: Callable[[], float] = time.monotonic) -> None:
        self._rules = rules
        self._clock = clock
        self._comparisons: dict[str, _Comparison] = {}
        # of each live version, the last whole window and the one that fills: what its successor is compared with
        self._known: dict[str, tuple[VersionTally, VersionTally]] = {}

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
        self._known.setdefault(f"{agent.name}@{agent.live}", (VersionTally(), VersionTally()))

    def forget(self, name: str) -> None:
        """An agent is served no more."""
        self._comparisons.pop(name, None)
        self._known = {version: known for version, known in self._known.items() if version.rpartition("@")[0] != name}

    def saw(self, seen: ObservedReply) -> RolloutVerdict | None:
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

    def heard(self, agent: str, is_bad: bool) -> RolloutVerdict | None:
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

    def condemn(self, agent: str, why: str) -> RolloutVerdict | None:
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

    def _current(self, agent: str) -> VersionTally:
        _, filling = self._known[agent]
        if filling.failures.seen >= WINDOW_REPLIES:
            self._known[agent] = (filling, VersionTally())
        return self._known[agent][1]

    def _count(self, tally: VersionTally, seen: ObservedReply) -> None:
        tally.count_reply(failed=seen.failed, is_json=seen.is_json, token_s=seen.token_s, in_flight=seen.in_flight)

    def _judge(self, comparison: _Comparison) -> RolloutVerdict | None:
        found = first_alarm(comparison.seen, comparison.beside, self._rules, comparison.window)
        if found is not None:
            return self._over(comparison, "roll back", found.why, _numbers(found, comparison))
        enough = self._rules.canary_requests
        if enough and not comparison.frozen and comparison.replies >= enough:
            numbers = {"candidate": comparison.seen.as_json(), "live": comparison.beside.as_json()}
            return self._over(comparison, "promote", f"{comparison.replies} replies without alarm", numbers)
        if comparison.seen.failures.seen >= WINDOW_REPLIES:
            comparison.seen, comparison.window = VersionTally(), comparison.window + 1
            comparison.beside = comparison.beside if comparison.frozen else VersionTally()
        return None

    def _over(
        self, comparison: _Comparison, does: Literal["roll back", "promote"], why: str, numbers: Mapping[str, Any]
    ) -> RolloutVerdict:
        comparison.is_over = True  # the registry's answer, not this, ends it: until then nothing more is said
        return RolloutVerdict(comparison.name, comparison.candidate, does, why, numbers)


def _numbers(found: Alarm, comparison: _Comparison) -> dict[str, Any]:
    return {"monitor": found.monitor, "window": comparison.window, **found.numbers}


MOST_WAITING = 16
ROOM_S = 0.05


@dataclass(frozen=True)
class Shadow:
    """A request that was answered, to be answered again. agent: the candidate's exact version. said: the live reply."""

    call: GenerateCall
    agent: str
    said: str


@dataclass(frozen=True)
class ShadowOutcome:
    """What came of a shadow: how it ended, and the reply."""

    shadow: Shadow
    end: ReplyDone | ReplyFailed
    text: str = ""
    tokens: int = 0
    took_s: float = 0.0


class Shadows:
    """Those of a team. What does not find room is left out, and counted: a live reply never waits for a shadow.

    has_room: whether the crew is idle enough. leased: keeps the candidate's adapter. report: what came of one.
    """

    def __init__(
        self,
        crew: WorkerBackend,
        has_room: Callable[[], bool],
        leased: Callable[[str], AbstractContextManager[None]],
        report: Callable[[ShadowOutcome], object],
        deadline_s: float,
    ) -> None:
        self._crew = crew
        self._has_room = has_room
        self._leased = leased
        self._report = report
        self._deadline_s = deadline_s
        self._waiting: deque[Shadow] = deque()
        self._news = asyncio.Event()
        self.answered = 0
        self.left_out = 0

    def offer(self, shadow: Shadow) -> None:
        """Answer this too, when there is room for it; the oldest that waits makes place."""
        if len(self._waiting) == MOST_WAITING:
            self._waiting.popleft()
            self.left_out += 1
        self._waiting.append(shadow)
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                if self._has_room():
                    await self._answer(self._waiting.popleft())
                else:
                    await asyncio.sleep(ROOM_S)

    async def _answer(self, shadow: Shadow) -> None:
        with self._leased(shadow.call.adapter):
            began = time.monotonic()
            try:
                events = cast(EventStream, await self._crew.reply(shadow.call, shadow.agent, self._deadline_s))
            except SartorError as error:
                self._report(ShadowOutcome(shadow, ReplyFailed(shadow.call.id, error.kind, error.problem, error.remedy)))
                return
            reply = ReplyStream(events, _free, _ended, time.monotonic() - began)
            try:
                await self._follow(shadow, reply)
            finally:
                await reply.aclose()

    async def _follow(self, shadow: Shadow, reply: ReplyStream) -> None:
        async for event in reply:
            if isinstance(event, (ReplyDone, ReplyFailed)):
                self.answered += 1
                self._report(ShadowOutcome(shadow, event, reply.text, reply.tokens, reply.took_s))
            elif not self._has_room():
                self.left_out += 1
                return


def _free() -> None:
    """The lease lasts as long as the shadow."""


async def _ended(reply: ReplyStream, event: ReplyDone | ReplyFailed) -> None:
    """Nobody waits for a shadow's last event."""
