"""Supervisor of the workers of a server.

    call -> agent_health.py (breaker, limits, order) -> scheduler.py -> a worker
    worker_pool.py restarts workers, adapter_loading.py loads adapters in them, worker_process.py is the handle of one

Everything runs in one event loop. All times come from the monotonic clock, so a jump of the wall clock has no effect.
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

EMBEDDINGS = "embeddings"  # name under which all embeddings share one limit in AgentQueues
WORKER = (sys.executable, "-m", "sartor.serving.workers.worker_main")
# Limits of one batch for a worker; a single longer text is one batch. A worker finishes its batch even if the client
# has gone, so batches are small.
_EMBED_TEXTS, _EMBED_CHARACTERS = 16, 8192
_MOST_CONDEMNED = 1024


class Supervisor:
    """Supervised workers: a `WorkerBackend` (types.py).

    command: starts a worker; the number of its socket is appended.
    """

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
        """Start the workers, and return the description of the first engine that is ready.

        Raises the error of a worker that cannot start (unknown base, missing package), or UnavailableError.
        """
        try:
            self._about = await self._slots.start()
        except BaseException:
            await self._slots.close()
            raise
        return self._about

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse new calls, give running ones `drain_s` seconds, then fail the rest and end all workers."""
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
        """Description of the engine that every worker runs; known once `start` has returned.

        Raises UnavailableError before.
        """
        if self._about is None:
            raise UnavailableError("no worker has been started", "await start()")
        return self._about

    async def attach(self, adapter: str, path: Path) -> None:
        """Load an admitted adapter in every worker, now and after each restart. Raises ModelError, BudgetError."""
        self._refuse_when_closing()
        await self._adapters.attach(adapter, path)
        self._scheduler.poke()

    async def detach(self, adapter: str) -> None:
        """Unload an adapter once its running calls have ended.

        Nothing is unloaded if it was attached again meanwhile.
        """
        since = self._adapters.attached.get(adapter, 0)
        while in_flight_calls := [
            in_flight for in_flight in self._scheduler.in_flight if in_flight.call.adapter == adapter
        ]:
            await in_flight_calls[0].finished.wait()
        await self._adapters.detach(adapter, since)

    async def reply(self, call: GenerateCall, agent: str, deadline_s: float) -> AsyncIterator[Event]:
        """Begin a reply; return its events when the first one is there.

        Closing the iterator cancels the call.
        Raises BusyError; DeadlineError; UnavailableError (breaker open, no worker, adapter not loaded); ModelError for
        a
        call that has killed a worker before; or the error of the first event.
        """
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
        """Return one vector of unit length for each text.

        encoder: `base`, or the name or directory of an encoder.
        Raises BusyError, DeadlineError, UnavailableError, ModelError for texts that have killed workers, and the
        encoder's
        errors.
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
        """Return the events of each call, made by a trial worker with the adapter in `path`.

        adapter: digest under which it is attached.
        Raises ModelError or BudgetError of the attach; ModelError if the worker dies or hangs; UnavailableError.
        """
        self._refuse_when_closing()
        return await self._trial_worker.events(adapter, path, calls)

    async def renew(self) -> None:
        """Replace every worker, one after the other, so that no content of earlier requests stays in memory."""
        await self._slots.renew()

    def blame(self, agent: str, reason: str) -> None:
        """Count a failure against an agent's breaker that only the caller could detect."""
        self._agent_health.blame(agent, reason)

    def release(self, agent: str) -> None:
        """Return an agent to service after quarantine."""
        self._agent_health.release(agent)

    def health(self) -> Mapping[str, Any]:
        """Return the state of workers and agents, for /health and /metrics.

        counts: events since the start, by kind. ends: number of ended workers, by cause.
        """
        agents = sorted({*self._agent_health.agents, *self._queues.inside} - {EMBEDDINGS})
        return {
            "workers": self._slots.health(),
            "agents": {agent: {**self._agent_health.health(agent), **self._queues.health(agent)} for agent in agents},
            "adapters": len(self._adapters.paths),
            "counts": dict(self._scheduler.counts),
            "ends": dict(self._slots.ends),
        }

    def opening(self) -> dict[str, Any]:
        """Return the frame that opens a worker's engine."""
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
        self._scheduler.poke()  # a worker may have fallen silent, or responded again

    def _refuse_when_closing(self) -> None:
        if self._is_closing:
            raise _closing()

    async def _embed(self, texts: list[str], encoder: str) -> Mapping[str, Any]:
        """Embed a batch in a serving worker; try another one if the first dies.

        A batch that has killed two workers is not tried again.
        Raises ModelError, UnavailableError.
        """
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
    """Yield the texts in order, in batches for one request to a worker."""
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
