"""Canary and shadow rollout of a new version.

A trial (canary or shadow) compares the candidate with the live version on replies of the same period. After a
promotion the new version is compared for `watch_s` with the last replies of its predecessor. `sequential_tests` holds
the statistical test, `key_shares` the weight of API keys.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from sartor.core.confidence_sequences import FailureRate
from sartor.core.errors import SartorError
from sartor.inference.engine import GenerateCall, ReplyDone, ReplyFailed
from sartor.serving.dispatch.key_shares import LEAST_KEYS, KeyShares
from sartor.serving.dispatch.reply_stream import ReplyStream
from sartor.serving.dispatch.sequential_tests import WINDOW_REPLIES, Alarm, VersionTally, first_alarm
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
    key: id of the API key that asked; empty on a server without keys.
    """

    agent: str
    failed: bool
    is_json: bool = False
    token_s: float = 0.0
    in_flight: int = 1
    key: str = ""


@dataclass(frozen=True)
class RolloutVerdict:
    """Decision about a version on trial or under watch, with its reason and numbers.

    A freeze leaves everything as it is: the version keeps its share of the requests and is not promoted, until an
    admin promotes it or rolls it back.
    """

    agent: str
    version: str
    action: Literal["roll back", "promote", "freeze"]
    reason: str
    numbers: Mapping[str, Any]


@dataclass
class _WeighedTally:
    """Tally of one version in which no key has more than a third.

    by_key: its parts; their sum is `tally`.
    """

    tally: VersionTally = field(default_factory=VersionTally)
    by_key: dict[str, VersionTally] = field(default_factory=dict)
    replies: KeyShares[ObservedReply] = field(default_factory=KeyShares)
    ratings: KeyShares[bool] = field(default_factory=KeyShares)

    def next_reply(self) -> bool:
        """Count the next reply that has room; return whether there was one."""
        admitted = self.replies.next()
        if admitted is not None:
            for tally in self._tallies(admitted[0]):
                _count(tally, admitted[1])
        return admitted is not None

    def next_rating(self) -> bool:
        """Count the next rating that has room; return whether there was one."""
        admitted = self.ratings.next()
        if admitted is not None:
            for tally in self._tallies(admitted[0]):
                tally.feedback.count(admitted[1])
        return admitted is not None

    def without_each(self) -> Iterator[VersionTally]:
        """Yield the tally without one key, for each key; none for the owner of a server without keys."""
        for left_out in filter(None, self.by_key):
            rest = VersionTally()
            for key, tally in self.by_key.items():
                if key != left_out:
                    rest.add(tally)
            yield rest

    def restart(self) -> None:
        """Begin a new window."""
        self.tally, self.by_key = VersionTally(), {}

    def catch_up(self) -> None:
        """Count everything that has room."""
        while self.next_reply() or self.next_rating():
            pass

    def is_fair(self, monitor: str) -> bool:
        """Return whether three keys are counted for a monitor and none has more than a third."""
        return (self.ratings if monitor == "feedback" else self.replies).is_fair

    def _tallies(self, key: str) -> tuple[VersionTally, VersionTally]:
        return self.tally, self.by_key.setdefault(key, VersionTally())


@dataclass
class _VersionRecord:
    """Observations of one version: all of them, and the same with the keys weighed."""

    all: VersionTally = field(default_factory=VersionTally)
    weighed: _WeighedTally = field(default_factory=_WeighedTally)

    def add_reply(self, reply: ObservedReply) -> None:
        """Take one reply; the weighed tally counts it when its key has room."""
        _count(self.all, reply)
        self.weighed.replies.add(reply.key, reply)

    def add_rating(self, is_bad: bool, key: str) -> None:
        """Take one rating."""
        self.all.feedback.count(is_bad)
        self.weighed.ratings.add(key, is_bad)


@dataclass
class _Comparison:
    """Comparison of one version with another.

    live: version that the candidate is compared with. is_watch: whether `live` answers no more.
    deadline: monotonic time, s.
    window, weighed_window: numbers of the current windows of all observations and of the weighed ones, from 1.
    failed_keys: keys that the candidate failed.
    frozen: reason why an admin is asked; empty if nobody is.
    is_refused: whether the registry's rules refuse the rollback; it is not tried again until the freeze ends.
    """

    name: str
    candidate: str
    live: str
    is_watch: bool
    deadline: float
    candidate_record: _VersionRecord = field(default_factory=_VersionRecord)
    live_record: _VersionRecord = field(default_factory=_VersionRecord)
    window: int = 1
    weighed_window: int = 1
    replies: int = 0
    failed_keys: set[str] = field(default_factory=set)
    frozen: str = ""
    differing: FailureRate = field(default_factory=FailureRate)
    is_over: bool = False
    is_refused: bool = False


def _count(tally: VersionTally, reply: ObservedReply) -> None:
    tally.count_reply(failed=reply.failed, is_json=reply.is_json, token_s=reply.token_s, in_flight=reply.in_flight)


class Rollouts:
    """All trials and watches of a team. Not thread-safe; use it in the event loop's thread.

    An alarm rolls a version back only if it also sounds where each API key has at most a third of the observations,
    and without any one of the keys. Otherwise it freezes the trial and asks an admin. On a server without keys every
    alarm rolls back.
    """

    def __init__(self, rules: Rollout, clock: Callable[[], float] = time.monotonic) -> None:
        self._rules = rules
        self._clock = clock
        self._comparisons: dict[str, _Comparison] = {}
        # live version -> its last full window and the current one; its successor is compared with both
        self._live_records: dict[str, tuple[_VersionRecord, _VersionRecord]] = {}
        # by agent, the reasons of freezes in the registry
        self._frozen: Mapping[str, str] = {}

    def follow(self, agent: Agent, previous: Agent | None) -> None:
        """Begin or end the trial or watch of an agent that has changed."""
        current = self._comparisons.get(agent.name)
        if agent.candidate:
            if (
                current is None
                or current.is_watch
                or (current.candidate, current.live) != (agent.candidate, agent.live)
            ):
                self._comparisons[agent.name] = _Comparison(
                    agent.name, candidate=agent.candidate, live=agent.live, is_watch=False, deadline=float("inf")
                )
        elif previous is not None and previous.live != agent.live and agent.previous == previous.live:
            watch = _Comparison(
                agent.name,
                candidate=agent.live,
                live=previous.live,
                is_watch=True,
                deadline=self._clock() + self._rules.watch_s,
            )
            for record in self._live_records.get(f"{agent.name}@{previous.live}", ()):
                record.weighed.catch_up()
                watch.live_record.all.add(record.all)
                watch.live_record.weighed.tally.add(record.weighed.tally)
            self._comparisons[agent.name] = watch
        elif current is not None and (not current.is_watch or current.candidate != agent.live):
            del self._comparisons[agent.name]
        if previous is not None and previous.live != agent.live:
            self._live_records.pop(f"{previous.name}@{previous.live}", None)
        self._live_records.setdefault(f"{agent.name}@{agent.live}", (_VersionRecord(), _VersionRecord()))
        self._apply_freeze(agent.name)

    def keep_frozen(self, frozen: Mapping[str, str]) -> None:
        """Apply the freezes that the registry holds: the reason of each, by agent. Others have ended."""
        self._frozen = dict(frozen)
        for name in self._comparisons:
            self._apply_freeze(name)

    def forget(self, name: str) -> None:
        """Remove an agent that is not served any more."""
        self._comparisons.pop(name, None)
        self._live_records = {
            version: records for version, records in self._live_records.items() if version.rpartition("@")[0] != name
        }

    def observe_reply(self, reply: ObservedReply) -> RolloutVerdict | None:
        """Count a reply that has ended; return a verdict if there is a new one."""
        if reply.agent in self._live_records:
            self._current(reply.agent).add_reply(reply)
        comparison = self._comparison(reply.agent)
        if comparison is None:
            return None
        version = reply.agent.rpartition("@")[2]
        if version == comparison.candidate:
            comparison.replies += 1
            if reply.failed:
                comparison.failed_keys.add(reply.key)
            comparison.candidate_record.add_reply(reply)
            return self._judge(comparison)
        if version == comparison.live and not comparison.is_watch:
            comparison.live_record.add_reply(reply)
        return None

    def observe_rating(self, agent: str, is_bad: bool, key: str = "") -> RolloutVerdict | None:
        """Count a user's rating of a reply by this exact version; return a verdict if there is a new one.

        key: id of the API key that rates; empty on a server without keys.
        """
        if agent in self._live_records:
            self._current(agent).add_rating(is_bad, key)
        comparison = self._comparison(agent)
        if comparison is None:
            return None
        version = agent.rpartition("@")[2]
        if version == comparison.candidate:
            comparison.candidate_record.add_rating(is_bad, key)
            return self._judge(comparison)
        if version == comparison.live and not comparison.is_watch:
            comparison.live_record.add_rating(is_bad, key)
        return None

    def observe_comparison(self, agent: str, is_same: bool) -> None:
        """Count a shadow reply of the candidate.

        agent: exact version. is_same: whether its text equals that of the live version.
        """
        comparison = self._comparison(agent)
        if comparison is not None and agent == f"{comparison.name}@{comparison.candidate}":
            comparison.differing.count(not is_same)

    def condemn(self, agent: str, reason: str, key: str = "") -> RolloutVerdict | None:
        """Return the verdict on a version on trial or under watch that another check found bad.

        One such check is the quarantine of its circuit breaker. It rolls back if the version failed three keys, or on
        a server without keys; else it freezes.
        key: id of the API key whose request met the quarantine.
        """
        comparison = self._comparison(agent)
        if comparison is None or agent != f"{comparison.name}@{comparison.candidate}":
            return None
        numbers = {"candidate": comparison.candidate_record.all.as_json(), "keys": len(comparison.failed_keys)}
        if not key or len(comparison.failed_keys) >= LEAST_KEYS:
            return self._over(comparison, "roll back", reason, numbers)
        return self._freeze(comparison, reason, numbers)

    def undecided(self, name: str) -> None:
        """Allow a new verdict, because the last one could not be carried out."""
        if name in self._comparisons:
            self._comparisons[name].is_over = False
            self._comparisons[name].frozen = self._frozen.get(name, "")

    def refuse(self, name: str) -> None:
        """Return no verdict until the freeze ends: the last one was refused by the rules of the registry."""
        if name in self._comparisons:
            self._comparisons[name].is_refused = True

    def status(self, name: str) -> dict[str, Any]:
        """Return the trial or watch of an agent, for /health; empty if there is none.

        `frozen`: why an admin is asked; empty if nobody is. `keys`: whose replies are weighed. `counted`: replies that
        count for `canary_requests`, of which no key has more than a third.
        """
        comparison = self._comparisons.get(name)
        if comparison is None:
            return {"frozen": self._frozen[name]} if name in self._frozen else {}
        kind = "watch" if comparison.is_watch else "trial"
        record = comparison.candidate_record
        fields = {
            "kind": kind,
            "version": comparison.candidate,
            "against": comparison.live,
            "replies": comparison.replies,
            "keys": record.weighed.replies.keys,
            "counted": record.weighed.replies.counted,
            "frozen": comparison.frozen,
        }
        return {**fields, "differing": vars(comparison.differing), "candidate": record.all.as_json()}

    def _comparison(self, agent: str) -> _Comparison | None:
        """Return the comparison of this version's agent if it is still undecided; else None."""
        comparison = self._comparisons.get(agent.rpartition("@")[0])
        if comparison is None or comparison.is_over:
            return None
        if self._clock() > comparison.deadline:
            del self._comparisons[comparison.name]
            return None
        return comparison

    def _current(self, agent: str) -> _VersionRecord:
        _, current = self._live_records[agent]
        if current.all.failures.seen >= WINDOW_REPLIES:
            self._live_records[agent] = (current, _VersionRecord())
        return self._live_records[agent][1]

    def _judge(self, comparison: _Comparison) -> RolloutVerdict | None:
        weighed_alarm = self._weighed_alarm(comparison)
        if weighed_alarm is not None:
            numbers = {"monitor": weighed_alarm.monitor, "window": comparison.weighed_window, **weighed_alarm.numbers}
            return self._over(comparison, "roll back", weighed_alarm.reason, numbers)
        mine, theirs = comparison.candidate_record, comparison.live_record
        alarm = first_alarm(mine.all, theirs.all, self._rules, comparison.window)
        if alarm is not None and not comparison.frozen:
            numbers = {"monitor": alarm.monitor, "window": comparison.window, **alarm.numbers}
            return self._freeze(comparison, alarm.reason, numbers)
        required_replies, counted = self._rules.canary_requests, mine.weighed.replies.counted
        is_promotable = not comparison.is_watch and not comparison.frozen
        if required_replies and is_promotable and counted >= required_replies:
            numbers = {
                "candidate": mine.all.as_json(),
                "live": theirs.all.as_json(),
                "keys": mine.weighed.replies.keys,
                "replies": comparison.replies,
            }
            return self._over(comparison, "promote", f"{counted} replies without alarm", numbers)
        if mine.all.failures.seen >= WINDOW_REPLIES:
            mine.all, comparison.window = VersionTally(), comparison.window + 1
            theirs.all = theirs.all if comparison.is_watch else VersionTally()
        return None

    def _weighed_alarm(self, comparison: _Comparison) -> Alarm | None:
        """Count the observations that have room by now, and return the first alarm that three keys bear."""
        mine, theirs = comparison.candidate_record, comparison.live_record
        theirs.weighed.catch_up()
        while mine.weighed.next_reply() or mine.weighed.next_rating():
            weighed = mine.weighed
            alarm = self._alarm(weighed.tally, comparison)
            if alarm is not None and weighed.is_fair(alarm.monitor):
                rest = [self._alarm(tally, comparison) for tally in weighed.without_each()]
                if all(other is not None for other in rest):
                    return alarm
            if weighed.tally.failures.seen >= WINDOW_REPLIES:
                weighed.restart()
                comparison.weighed_window += 1
                if not comparison.is_watch:
                    theirs.weighed.restart()
        return None

    def _alarm(self, tally: VersionTally, comparison: _Comparison) -> Alarm | None:
        """Return the first alarm of a weighed tally of the candidate."""
        return first_alarm(tally, comparison.live_record.weighed.tally, self._rules, comparison.weighed_window)

    def _apply_freeze(self, name: str) -> None:
        comparison = self._comparisons.get(name)
        if comparison is None:
            return
        comparison.frozen = self._frozen.get(name, "")
        if comparison.is_refused and not comparison.frozen:  # an admin has changed something
            comparison.is_refused = comparison.is_over = False

    def _freeze(self, comparison: _Comparison, reason: str, numbers: Mapping[str, Any]) -> RolloutVerdict | None:
        if comparison.frozen:
            return None
        keys = comparison.candidate_record.weighed.replies.keys
        comparison.frozen = f"{reason}; fewer than {LEAST_KEYS} keys bear it, and nothing was changed"
        return RolloutVerdict(
            agent=comparison.name,
            version=comparison.candidate,
            action="freeze",
            reason=comparison.frozen,
            numbers={"keys": keys, **numbers},
        )

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
    key: id of the API key that asked.
    """

    call: GenerateCall
    agent: str
    live_reply: str
    key: str = ""


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
