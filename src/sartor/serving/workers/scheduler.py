"""Scheduler that assigns calls to workers."""

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
from sartor.core.remedies import REQUEST_AGAIN
from sartor.inference.engine import BASE, Event, GenerateCall, ReplyDone, ReplyFailed, TextDelta, event_from_json
from sartor.serving.team_config import WorkerOptions
from sartor.serving.workers.adapter_loading import AdapterPool
from sartor.serving.workers.agent_health import AgentHealthTracker, AgentQueues, max_rows_per_agent
from sartor.serving.workers.in_flight import InFlightCall, ReplayMismatchError
from sartor.serving.workers.worker_pool import WorkerSlots
from sartor.serving.workers.worker_process import WorkerEnd, WorkerProcess

# Ends that the operator, the kernel or an overloaded machine may have caused: one of them proves little.
_UNCERTAIN_ENDS = (WorkerEnd.KILLED, WorkerEnd.HUNG)
_LOG = logging.getLogger("sartor.agents")


class CallScheduler:
    """All calls in flight, and their assignment to workers. No call is lost when a worker dies.

    Another worker makes the calls of the dead one again, and the replies continue where they were (in_flight.py). A
    call
    that was running at several deaths then runs alone in a worker. If it kills that one too, it fails and its agent is
    blamed.
    """

    def __init__(self, queues: AgentQueues, agent_health: AgentHealthTracker, rules: WorkerOptions) -> None:
        self._queues = queues
        self._agent_health = agent_health
        self._rules = rules
        self._numbers = itertools.count(1)
        self._is_poked = False
        self.in_flight: set[InFlightCall] = set()
        self.counts: Counter[str] = Counter()

    def use_workers(self, slots: WorkerSlots, adapters: AdapterPool) -> None:
        """Set the workers and adapters. Both call `on_event`, `on_worker_lost` and `poke`, so they are made later."""
        self._slots = slots
        self._adapters = adapters

    def add(self, call: GenerateCall, agent: str, deadline_s: float) -> InFlightCall:
        """Queue a call.

        deadline_s: seconds from now until it fails with DeadlineError.
        Raises UnavailableError (no workers, or the agent is out of service), ModelError (the call has killed workers)
        and
        BusyError (the agent is at its limit).
        """
        if self._slots.is_given_up():
            raise self._no_workers()
        trial = self._agent_health.enter(call, agent)
        try:
            self._queues.enter(agent, self._rows(self._slots.ready()))
        except SartorError:
            self._agent_health.leave(agent, trial)
            raise
        in_flight = InFlightCall(call, agent, trial, next(self._numbers))
        in_flight.is_suspect = self._agent_health.is_suspect(call, agent)
        in_flight.timer = asyncio.get_running_loop().call_later(deadline_s, self._expire, in_flight, deadline_s)
        self.in_flight.add(in_flight)
        self._queues.put(in_flight)
        self._dispatch()
        return in_flight

    def cancel(self, in_flight: InFlightCall) -> None:
        """Cancel a call, because its client has gone."""
        if not in_flight.finished.is_set():
            self.counts["cancelled"] += 1
            self._stop(in_flight)
            self._finish(
                in_flight, ReplyDone(in_flight.call.id, "cancelled", 0, in_flight.replay_buffer.token_position)
            )

    def fail(self, in_flight: InFlightCall, error: SartorError) -> None:
        """End a call with an error."""
        self._stop(in_flight)
        self._finish(in_flight, ReplyFailed(in_flight.call.id, error.kind, error.problem, error.remedy))

    def cut_slow_clients(self, max_s: float) -> None:
        """Fail the calls whose clients have read nothing for more than `max_s`."""
        for in_flight in [in_flight for in_flight in self.in_flight if in_flight.untaken_s > max_s]:
            self.counts["slow_clients"] += 1
            self.fail(
                in_flight, DeadlineError(f"the client took nothing for {max_s:g} s", "read the stream as it comes")
            )

    def poke(self) -> None:
        """Schedule a dispatch for the end of this turn of the event loop. Call it after every change of state."""
        if not self._is_poked:
            self._is_poked = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def on_event(self, worker: WorkerProcess, message: Mapping[str, Any]) -> None:
        """Handle an event of a worker."""
        event = event_from_json(message)
        in_flight = worker.calls.get(event.call)
        if in_flight is None:
            return
        if not isinstance(event, TextDelta):
            del worker.calls[event.call]
            worker.owes_turn = worker.owes_turn or (worker.is_isolated and in_flight.is_suspect)
            worker.is_isolated = worker.is_isolated and bool(worker.calls)
            self.poke()
        if in_flight.finished.is_set() or in_flight.wire_id != event.call:
            return
        try:
            self._tell(in_flight, replace(event, call=in_flight.call.id))
        except ReplayMismatchError:
            self.counts["differing"] += 1
            problem = "a worker died, and the reply that another made in its place was not the same"
            self.fail(in_flight, UnavailableError(problem, REQUEST_AGAIN))

    def on_worker_lost(self, worker: WorkerProcess) -> None:
        """Queue the calls of a worker that ended again, or condemn the one that killed it."""
        in_flight_calls = [
            in_flight
            for name, in_flight in worker.calls.items()
            if in_flight.wire_id == name and not in_flight.finished.is_set()
        ]
        worker.calls.clear()
        for in_flight in in_flight_calls:
            self.counts["made_again"] += 1
            if worker.end is WorkerEnd.RECYCLED:
                in_flight.restart()
                self._queues.put(in_flight)
                continue
            is_to_blame = False
            if worker.is_isolated and not worker.died_on_request and in_flight.is_suspect:
                # the worker ran only this call
                in_flight.deaths_alone += 1
                is_to_blame = in_flight.deaths_alone > 1 or worker.end not in _UNCERTAIN_ENDS
            if is_to_blame:
                self._condemn(in_flight, worker.end_reason)
            else:
                in_flight.died()
                self._queues.put(in_flight)
        self.poke()

    def _tell(self, in_flight: InFlightCall, event: Event) -> None:
        if isinstance(event, TextDelta):
            if (piece := in_flight.replay_buffer.advance(event)) is not None:
                in_flight.add_event(piece)
            return
        if isinstance(event, ReplyDone):
            in_flight.replay_buffer.end()
        self._finish(in_flight, event)

    def _finish(self, in_flight: InFlightCall, event: ReplyDone | ReplyFailed) -> None:
        """End a call. Every call ends here, and only once."""
        if in_flight.finished.is_set():
            return
        in_flight.finished.set()
        if in_flight.timer is not None:
            in_flight.timer.cancel()
        self.in_flight.discard(in_flight)
        self._queues.drop(in_flight)
        self._queues.leave(in_flight.agent, time.monotonic() - in_flight.began_at)
        self._agent_health.judge(in_flight, event)
        in_flight.add_event(event)
        self.poke()

    def _stop(self, in_flight: InFlightCall) -> None:
        """Tell the worker to cancel a call. Its row counts as used until the worker confirms."""
        worker = self._slots.find(in_flight.wire_id)
        if worker is not None:
            worker.send({"op": "cancel", "call": in_flight.wire_id})

    def _expire(self, in_flight: InFlightCall, deadline_s: float) -> None:
        self.counts["late"] += 1
        self.fail(
            in_flight, DeadlineError(f"no whole reply within {deadline_s:g} s", "ask for fewer tokens, or again later")
        )

    def _condemn(self, in_flight: InFlightCall, reason: str) -> None:
        self.counts["condemned"] += 1
        _LOG.error("a call of %s killed a worker that served nobody else: %s", in_flight.agent, reason)
        self._agent_health.condemn(in_flight)
        self.fail(
            in_flight,
            ModelError(
                f"the workers that made this reply of {in_flight.agent} died: {reason}",
                "send another prompt: this one is not tried again",
            ),
        )

    def _no_workers(self) -> UnavailableError:
        problem = f"all workers ended more than {self._rules.restarts} times within {self._rules.window_s:g} s"
        return UnavailableError(problem, f"ask again in {self._rules.window_s:.0f} s; the log says why they ended")

    # Assignment of calls to workers

    def _dispatch(self) -> None:
        self._is_poked = False
        if self._slots.is_given_up():
            for in_flight in self._queues.waiting():
                self.fail(in_flight, self._no_workers())
            return
        answering = self._slots.answering()
        self._dispatch_suspects(answering)
        while (pair := self._next(answering)) is not None:
            worker, in_flight = pair
            worker.owes_turn = False
            self._begin(worker, in_flight)

    def _next(self, answering: list[WorkerProcess]) -> tuple[WorkerProcess, InFlightCall] | None:
        """Return the next call, and the worker with the most free rows that holds its adapter; None if
        none can start.
        """
        row_counts = Counter(in_flight.agent for worker in answering for in_flight in worker.calls.values())
        rows = self._rows(answering)
        max_rows = max_rows_per_agent(rows) if self._adapters.paths else rows
        for in_flight in self._queues.in_turn(row_counts):
            worker = max(answering, key=lambda worker: worker.rows_free(in_flight.call.adapter), default=None)
            if worker is None or row_counts[in_flight.agent] >= max_rows:
                continue
            if worker.rows_free(in_flight.call.adapter) > 0:
                return worker, in_flight
            self._fail_where_all_refuse(in_flight)
        return None

    def _rows(self, workers: list[WorkerProcess]) -> int:
        return sum(worker.about.rows for worker in workers)

    def _begin(self, worker: WorkerProcess, in_flight: InFlightCall) -> None:
        self._queues.drop(in_flight)
        worker.begin(in_flight, str(next(self._numbers)))

    def _fail_where_all_refuse(self, in_flight: InFlightCall) -> None:
        ready = self._slots.ready()
        refusals = [
            worker.refused[in_flight.call.adapter] for worker in ready if in_flight.call.adapter in worker.refused
        ]
        if refusals and len(refusals) == len(ready):
            self.fail(in_flight, refusals[0])

    def _dispatch_suspects(self, answering: list[WorkerProcess]) -> None:
        for in_flight in self._queues.suspects(self._agent_health.watched):
            worker = self._worker_for_suspect(in_flight, answering)
            if worker is None:
                self._fail_where_all_refuse(in_flight)
                continue
            worker.is_isolated = True  # gets no other calls from now on
            if not worker.calls:  # otherwise its current calls end first
                self._begin(worker, in_flight)

    def _worker_for_suspect(self, in_flight: InFlightCall, answering: list[WorkerProcess]) -> WorkerProcess | None:
        """Return a worker for a suspected call; None if it must wait.

        It is a spare. If there is none and none is expected, it is a serving worker, which takes other calls in
        between.
        """
        adapter = in_flight.call.adapter
        candidates = [
            worker
            for worker in self._slots.ready()
            if not worker.is_isolated and (adapter == BASE or adapter in worker.adapters)
        ]
        spares = [worker for worker in candidates if not worker.is_serving]
        if spares or self._slots.spares_expected() or any(worker.is_isolated for worker in answering):
            return next(iter(spares), None)
        candidates = [worker for worker in candidates if not (worker.owes_turn and self._queues.any_waits())]
        return min(candidates, key=lambda worker: len(worker.calls), default=None)
