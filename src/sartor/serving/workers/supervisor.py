"""Supervises the workers of a server.

    call -> agent_health.py (in service? room? whose turn?) -> scheduler.py -> a worker
    worker_pool.py restarts workers, adapter_loading.py brings adapters to them, worker_process.py is the handle of one

Everything runs in one event loop; all times are of the monotonic clock, so a jump of the wall clock changes nothing.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sartor.core import config, records
from sartor.core.errors import DeadlineError, ModelError, UnavailableError
from sartor.inference.engine import BASE, EngineInfo, Event, GenerateCall
from sartor.serving.team_config import OpenAiEngineOptions, Team
from sartor.serving.types import EmbeddingResult
from sartor.serving.workers.adapter_loading import AdapterPool, TrialWorker
from sartor.serving.workers.agent_health import AgentHealthTracker, AgentQueues
from sartor.serving.workers.in_flight import InFlightEvents
from sartor.serving.workers.scheduler import CallScheduler
from sartor.serving.workers.worker_pool import Hooks, WorkerSlots
from sartor.serving.workers.worker_process import WorkerDiedError, WorkerProcess, cores

EMBEDDINGS = "embeddings"  # the bulkhead that all embeddings share
WORKER = (sys.executable, "-m", "sartor.serving.workers.worker_main")
# Asked of a worker at once, unless one text alone has more: what is asked is worked off though its client may have
# gone
_EMBED_TEXTS, _EMBED_CHARACTERS = 16, 8192
_MOST_CONDEMNED = 1024


class Supervisor:
    """A `Crew` (types.py). `command`: what starts a worker; the number of its socket is added."""

    def __init__(self, team: Team, command: Sequence[str] = WORKER) -> None:
        self._team = team
        self._command = tuple(command)
        self._queues = AgentQueues(team.limits.per_agent)
        self._agent_health = AgentHealthTracker(team.breaker)
        self._scheduler = CallScheduler(self._queues, self._agent_health, team.workers)
        hooks = Hooks(
            lambda worker: self._adapters.equip(worker),
            self._scheduler.poke,
            self._scheduler.on_worker_lost,
            self._beat,
        )
        self._slots = WorkerSlots(
            team.workers, lambda: WorkerProcess(self._command, self.opening(), self._scheduler.on_event), hooks
        )
        self._adapters = AdapterPool(self._slots.ready, self._slots.expendable_worker)
        self._scheduler.use_workers(self._slots, self._adapters)
        self._trial_worker = TrialWorker(self._command, self.opening(), team.workers.start_s)
        self._about: EngineInfo | None = None
        self._condemned: deque[str] = deque(maxlen=_MOST_CONDEMNED)
        self._is_closing = False

    async def start(self) -> EngineInfo:
        """Start the workers, and wait for the first. Raises what it told (no such base, no such package),
        UnavailableError.
        """
        try:
            self._about = await self._slots.start()
        except BaseException:
            await self._slots.close()
            raise
        return self._about

    async def close(self, drain_s: float = 0.0) -> None:
        """Take no more calls, let those that live end for so long, and end all workers."""
        self._is_closing = True
        waiters = [asyncio.ensure_future(in_flight.finished.wait()) for in_flight in self._scheduler.in_flight]
        if waiters:
            _, late = await asyncio.wait(waiters, timeout=drain_s)
            for waiter in late:
                waiter.cancel()
        for in_flight in list(self._scheduler.in_flight):
            self._scheduler.fail(in_flight, _closing())
        await self._slots.close()

    @property
    def about(self) -> EngineInfo:
        """See Crew; known once `start` has returned."""
        if self._about is None:
            raise UnavailableError("no worker has been started", "await start()")
        return self._about

    async def attach(self, adapter: str, path: Path) -> None:
        """See Crew."""
        self._refuse_when_closing()
        await self._adapters.attach(adapter, path)
        self._scheduler.poke()

    async def detach(self, adapter: str) -> None:
        """See Crew. Returns when its live calls have ended and it is forgotten, or at once when it was attached
        again.
        """
        since = self._adapters.attached.get(adapter, 0)
        while in_flight_calls := [
            in_flight for in_flight in self._scheduler.in_flight if in_flight.call.adapter == adapter
        ]:
            await in_flight_calls[0].finished.wait()
        await self._adapters.detach(adapter, since)

    async def reply(self, call: GenerateCall, agent: str, deadline_s: float) -> AsyncIterator[Event]:
        """See Crew. ModelError for a call that has killed a worker before."""
        self._refuse_when_closing()
        if call.adapter != BASE and call.adapter not in self._adapters.paths:
            raise UnavailableError(
                f"the adapter of {agent} is not loaded", "sartor agents list, then sartor agents promote NAME VERSION"
            )
        in_flight = self._scheduler.add(call, agent, deadline_s)
        try:
            await in_flight.wait()
        except asyncio.CancelledError:
            self._scheduler.cancel(in_flight)
            raise
        if (error := in_flight.error()) is not None:
            raise error
        return InFlightEvents(in_flight, self._scheduler.cancel)

    async def embed(self, texts: Sequence[str], encoder: str) -> EmbeddingResult:
        """See Crew. Raises BusyError, DeadlineError, UnavailableError, ModelError for texts that have killed workers,
        and what the encoder tells.
        """
        self._refuse_when_closing()
        self._queues.enter(EMBEDDINGS, 1)
        began, deadline_s = time.monotonic(), self._team.limits.deadline_s
        vectors: list[list[float]] = []
        cut: list[int] = []
        tokens = 0
        try:
            async with asyncio.timeout(deadline_s):
                for batch in _batches(texts):
                    answer = await self._embed(batch, encoder)
                    cut += [len(vectors) + index for index in answer["cut"]]
                    vectors += answer["vectors"]
                    tokens += answer["tokens"]
        except TimeoutError:
            raise DeadlineError(
                f"{len(texts)} texts took more than {deadline_s:g} s",
                f"send at most {max(1, len(texts) // 2)} texts a request",
            ) from None
        finally:
            self._queues.leave(EMBEDDINGS, time.monotonic() - began)
        return EmbeddingResult(vectors, tokens, tuple(cut))

    async def probe(self, adapter: str, path: Path, calls: Sequence[GenerateCall]) -> list[tuple[Event, ...]]:
        """What each call says when the adapter in `path` is attached as `adapter` to a worker of its own, for
        admission.

        Raises what attaching tells (ModelError, BudgetError), ModelError when the worker dies or hangs,
        UnavailableError.
        """
        self._refuse_when_closing()
        return await self._trial_worker.events(adapter, path, calls)

    async def renew(self) -> None:
        """See Crew."""
        await self._slots.renew()

    def blame(self, agent: str, reason: str) -> None:
        """See Crew."""
        self._agent_health.blame(agent, reason)

    def release(self, agent: str) -> None:
        """See Crew."""
        self._agent_health.release(agent)

    def health(self) -> Mapping[str, Any]:
        """See Crew. `counts`: what has happened since the start; `ends`: why workers ended."""
        agents = sorted({*self._agent_health.agents, *self._queues.inside} - {EMBEDDINGS})
        return {
            "workers": self._slots.health(),
            "agents": {agent: {**self._agent_health.health(agent), **self._queues.health(agent)} for agent in agents},
            "adapters": len(self._adapters.paths),
            "counts": dict(self._scheduler.counts),
            "ends": dict(self._slots.ends),
        }

    def opening(self) -> dict[str, Any]:
        """The frame that opens a worker's engine."""
        rules, engine = self._team.workers, self._team.engine
        if not isinstance(engine, OpenAiEngineOptions) and engine.threads == 0:
            engine = replace(engine, threads=max(1, cores() // rules.count))
        return {
            "engine": config.dump(engine),
            "base": self._team.base,
            "memory_bytes": rules.memory_bytes,
            "media_seconds": self._team.media.seconds,
        }

    def _beat(self) -> None:
        self._scheduler.cut_slow_clients(self._team.limits.slow_client_s)
        self._scheduler.poke()  # a worker may have become quiet, or be heard again

    def _refuse_when_closing(self) -> None:
        if self._is_closing:
            raise _closing()

    async def _embed(self, texts: list[str], encoder: str) -> Mapping[str, Any]:
        """By a worker that answers; once more by another one when it dies. What kills two is not asked again."""
        texts_digest = records.digest([encoder, texts])
        if texts_digest in self._condemned:
            raise ModelError(
                "these texts killed the workers that embedded them",
                "send the texts in several requests, to find the one that does it; it is not tried again",
            )
        for _ in range(2):
            await self._slots.wait_ready()
            workers = self._slots.answering() or self._slots.ready()
            try:
                return await min(workers, key=lambda worker: len(worker.calls)).ask(
                    "embed", texts=texts, encoder=encoder
                )
            except WorkerDiedError:
                continue
        self._condemned.append(texts_digest)
        raise UnavailableError(
            "two workers died while they embedded these texts",
            "send the texts in several requests; those of this one are not tried again",
        )


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Of the texts, in their order, what is asked at once."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and (len(batch) == _EMBED_TEXTS or size + len(text) > _EMBED_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _closing() -> UnavailableError:
    return UnavailableError(
        "the server is stopping and takes no more requests", "ask another one, or again when it is up"
    )
