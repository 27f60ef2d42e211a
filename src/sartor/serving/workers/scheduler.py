"""Schedules calls onto workers."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sartor.core.errors import DeadlineError, ModelError, SartorError, UnavailableError
from sartor.inference.engine import BASE, Event, GenerateCall, ReplyDone, ReplyFailed, TextDelta, event_from_json
from sartor.serving.team_config import WorkerOptions
from sartor.serving.workers.adapter_loading import AdapterPool
from sartor.serving.workers.agent_health import AgentHealthTracker, AgentQueues, most_rows
from sartor.serving.workers.in_flight import InFlightCall, ReplayMismatchError
from sartor.serving.workers.worker_pool import WorkerSlots
from sartor.serving.workers.worker_process import WorkerEnd, WorkerProcess

# Ends that the operator, the kernel or a machine without time may have caused: they prove little by happening once.
_UNCERTAIN_ENDS = (WorkerEnd.KILLED, WorkerEnd.HUNG)
_LOG = logging.getLogger("sartor.agents")


class CallScheduler:
    """All that live. A worker that dies takes none with it.

    Its calls are made again by another and go on where they were (in_flight.py). A call at whose side workers die is
    made by a worker that serves nobody else; if it kills that, too, it fails, and its agent is blamed.
    """

    def __init__(self, bulkhead: AgentQueues, standing: AgentHealthTracker, rules: WorkerOptions) -> None:
        self._bulkhead = bulkhead
        self._standing = standing
        self._rules = rules
        self._numbers = itertools.count(1)
        self._is_poked = False
        self.lives: set[InFlightCall] = set()
        self.counts: Counter[str] = Counter()

    def use(self, places: WorkerSlots, shelf: AdapterPool) -> None:
        """Who makes them. Both tell `heard`, `lost` and `poke`, so they are made after this."""
        self._places = places
        self._shelf = shelf

    def add(self, call: GenerateCall, agent: str, deadline_s: float) -> InFlightCall:
        """A call that waits from here on.

        Raises UnavailableError, ModelError and BusyError as Standing and Bulkhead do.
        """
        if self._places.is_given_up():
            raise self._no_workers()
        trial = self._standing.enter(call, agent)
        try:
            self._bulkhead.enter(agent, self._rows(self._places.ready()))
        except SartorError:
            self._standing.leave(agent, trial)
            raise
        live = InFlightCall(call, agent, trial, next(self._numbers))
        live.is_suspect = self._standing.is_suspect(call, agent)
        live.timer = asyncio.get_running_loop().call_later(deadline_s, self._late, live, deadline_s)
        self.lives.add(live)
        self._bulkhead.put(live)
        self._dispatch()
        return live

    def cancel(self, live: InFlightCall) -> None:
        """Its client wants no more."""
        if not live.over.is_set():
            self.counts["cancelled"] += 1
            self._stop(live)
            self._finish(live, ReplyDone(live.call.id, "cancelled", 0, live.story.at_tokens))

    def fail(self, live: InFlightCall, error: SartorError) -> None:
        """End it with an error."""
        self._stop(live)
        self._finish(live, ReplyFailed(live.call.id, error.kind, error.problem, error.remedy))

    def cut_slow_clients(self, most_s: float) -> None:
        """End those whose clients take nothing."""
        for live in [live for live in self.lives if live.untaken_s > most_s]:
            self.counts["slow_clients"] += 1
            self.fail(live, DeadlineError(f"the client took nothing for {most_s:g} s", "read the stream as it comes"))

    def poke(self) -> None:
        """Something has changed: dispatch once this turn of the loop is over."""
        if not self._is_poked:
            self._is_poked = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def heard(self, child: WorkerProcess, said: Mapping[str, Any]) -> None:
        """A worker said an event."""
        event = event_from_json(said)
        live = child.calls.get(event.call)
        if live is None:
            return
        if not isinstance(event, TextDelta):
            del child.calls[event.call]
            child.owes = child.owes or (child.alone and live.is_suspect)
            child.alone = child.alone and bool(child.calls)
            self.poke()
        if live.over.is_set() or live.wire_id != event.call:
            return
        try:
            self._tell(live, replace(event, call=live.call.id))
        except ReplayMismatchError:
            self.counts["differing"] += 1
            problem = "a worker died, and the reply that another made in its place was not the same"
            self.fail(live, UnavailableError(problem, "ask again"))

    def lost(self, child: WorkerProcess) -> None:
        """A worker is gone."""
        lives = [live for name, live in child.calls.items() if live.wire_id == name and not live.over.is_set()]
        child.calls.clear()
        for live in lives:
            self.counts["made_again"] += 1
            if child.end is WorkerEnd.RECYCLED:
                live.again()
                self._bulkhead.put(live)
            elif child.alone and not child.died_asked and live.is_suspect and _has_killed(live, child.end):
                self._condemn(live, child.why)
            else:
                live.died()
                self._bulkhead.put(live)
        self.poke()

    def _tell(self, live: InFlightCall, event: Event) -> None:
        if isinstance(event, TextDelta):
            if (piece := live.story.more(event)) is not None:
                live.say(piece)
            return
        if isinstance(event, ReplyDone):
            live.story.end()
        self._finish(live, event)

    def _finish(self, live: InFlightCall, event: ReplyDone | ReplyFailed) -> None:
        """The one way by which a call ends."""
        if live.over.is_set():
            return
        live.over.set()
        if live.timer is not None:
            live.timer.cancel()
        self.lives.discard(live)
        self._bulkhead.drop(live)
        self._bulkhead.leave(live.agent, time.monotonic() - live.began_at)
        self._standing.judge(live, event)
        live.say(event)
        self.poke()

    def _stop(self, live: InFlightCall) -> None:
        """Its worker is told. The row counts as taken until the worker says that it is free."""
        child = self._places.find(live.wire_id)
        if child is not None:
            child.send({"op": "cancel", "call": live.wire_id})

    def _late(self, live: InFlightCall, deadline_s: float) -> None:
        self.counts["late"] += 1
        self.fail(live, DeadlineError(f"no whole reply within {deadline_s:g} s", "ask for fewer tokens, or again later"))

    def _condemn(self, live: InFlightCall, why: str) -> None:
        self.counts["condemned"] += 1
        _LOG.error("a call of %s killed a worker that served nobody else: %s", live.agent, why)
        self._standing.condemn(live)
        self.fail(live, ModelError(f"the workers that made this reply of {live.agent} died: {why}", "change the request"))

    def _no_workers(self) -> UnavailableError:
        problem = f"all workers ended more than {self._rules.restarts} times within {self._rules.window_s:g} s"
        return UnavailableError(problem, f"ask again in {self._rules.window_s:.0f} s; the log says why they ended")

    # Below: giving calls to workers.

    def _dispatch(self) -> None:
        self._is_poked = False
        if self._places.is_given_up():
            for live in self._bulkhead.waiting():
                self.fail(live, self._no_workers())
            return
        answering = self._places.answering()
        self._dispatch_suspects(answering)
        while (pair := self._next(answering)) is not None:
            child, live = pair
            child.owes = False
            self._begin(child, live)

    def _next(self, answering: list[WorkerProcess]) -> tuple[WorkerProcess, InFlightCall] | None:
        """Whose turn it is, and the worker with most free rows that has the adapter."""
        held = Counter(live.agent for child in answering for live in child.calls.values())
        rows = self._rows(answering)
        most = most_rows(rows) if self._shelf.paths else rows
        for live in self._bulkhead.in_turn(held):
            child = max(answering, key=lambda child: child.rows_free(live.call.adapter), default=None)
            if child is None or held[live.agent] >= most:
                continue
            if child.rows_free(live.call.adapter) > 0:
                return child, live
            self._fail_where_all_refuse(live)
        return None

    def _rows(self, children: list[WorkerProcess]) -> int:
        return sum(child.about.rows for child in children)

    def _begin(self, child: WorkerProcess, live: InFlightCall) -> None:
        self._bulkhead.drop(live)
        child.begin(live, str(next(self._numbers)))

    def _fail_where_all_refuse(self, live: InFlightCall) -> None:
        ready = self._places.ready()
        refusals = [child.refused[live.call.adapter] for child in ready if live.call.adapter in child.refused]
        if refusals and len(refusals) == len(ready):
            self.fail(live, refusals[0])

    def _dispatch_suspects(self, answering: list[WorkerProcess]) -> None:
        for live in self._bulkhead.suspects(self._standing.watched):
            child = self._lonely(live, answering)
            if child is None:
                self._fail_where_all_refuse(live)
                continue
            child.alone = True  # gets no other calls from here on
            if not child.calls:  # else those that it has end first
                self._begin(child, live)

    def _lonely(self, live: InFlightCall, answering: list[WorkerProcess]) -> WorkerProcess | None:
        """For a suspected call: a spare; where there is none nor will be, one that answers, in turn with other calls."""
        adapter = live.call.adapter
        able = [child for child in self._places.ready() if not child.alone and (adapter == BASE or adapter in child.adapters)]
        spares = [child for child in able if not child.answers]
        if spares or self._places.spares_expected() or any(child.alone for child in answering):
            return next(iter(spares), None)
        able = [child for child in able if not (child.owes and self._bulkhead.any_waits())]
        return min(able, key=lambda child: len(child.calls), default=None)


def _has_killed(live: InFlightCall, end: WorkerEnd | None) -> bool:
    """Count a worker that made nothing else and ended, and return whether that is enough to blame the call."""
    live.deaths_alone += 1
    return live.deaths_alone > 1 or end not in _UNCERTAIN_ENDS
