"""Loading of adapters into workers, and the trial worker of admission."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sartor.core.errors import ModelError, SartorError, UnavailableError
from sartor.inference.engine import Event, GenerateCall, event_from_json
from sartor.serving.workers.in_flight import InFlightCall
from sartor.serving.workers.worker_process import WorkerDiedError, WorkerEnd, WorkerProcess

# Consecutive deaths of workers during the load of an adapter before the adapter is blamed. A death is doubtful if the
# worker was killed from outside or was generating replies, so more of those are needed.
_MOST_DEATHS, _MOST_DOUBTFUL = 2, 5


class AdapterPool:
    """Adapters that every worker must hold.

    ready: returns the workers that are ready.
    expendable_worker: waits for a worker that may be risked, since an adapter can kill it.
    paths: directory of each loaded adapter.
    attached: number of the latest `attach` of each adapter.
    """

    def __init__(
        self, ready: Callable[[], list[WorkerProcess]], expendable_worker: Callable[[], Awaitable[WorkerProcess]]
    ) -> None:
        self._ready = ready
        self._expendable_worker = expendable_worker
        self._deaths: Counter[str] = Counter()
        self._doubtful_deaths: Counter[str] = Counter()
        self._lock = asyncio.Lock()
        self.paths: dict[str, Path] = {}
        self._numbers = itertools.count(1)
        self.attached: dict[str, int] = {}  # a delayed `detach` compares it to see whether it is still wanted

    async def attach(self, adapter: str, path: Path) -> None:
        """Load an adapter in every worker, a spare first.

        No reply waits for a spare's load or dies with it.
        Raises ModelError or BudgetError; a newly attached adapter is then unloaded from all workers.
        """
        self.attached[adapter] = next(self._numbers)
        async with self._lock:
            self._forgive(adapter)
            for worker in self._ready():
                worker.refused.pop(adapter, None)
            await self._load_everywhere(adapter, path)

    async def detach(self, adapter: str, since: int) -> None:
        """Unload an adapter from every worker, unless it was attached after `since`.

        since: number in `attached` when the detach was requested.
        """
        async with self._lock:
            if self.attached.get(adapter, 0) == since:
                self.attached.pop(adapter, None)
                await self._unload(adapter)

    async def _load_everywhere(self, adapter: str, path: Path) -> None:
        is_served = adapter in self.paths
        while adapter not in self.paths:
            await self._load_in(await self._expendable_worker(), adapter, path)
        self.paths[adapter] = path
        while missing := [worker for worker in self._ready() if not worker.knows(adapter)]:
            try:
                await self._load_in(missing[0], adapter, path)
            except SartorError as error:
                if not is_served:
                    await self._unload(adapter)
                    raise
                missing[0].refused[adapter] = error  # its calls go to the workers that hold the adapter

    async def _load_in(self, worker: WorkerProcess, adapter: str, path: Path) -> None:
        """Load an adapter in one worker; a death of the worker is counted and not raised.

        Raises ModelError once enough workers died of it, and the error that the worker reports.
        """
        try:
            await worker.attach(adapter, path)
        except WorkerDiedError as error:
            self._died(adapter, worker)
            if self._is_deadly(adapter):
                problem = f"workers died while they loaded the adapter {adapter[:12]}: {error}"
                raise ModelError(
                    problem,
                    "sartor verify RELEASE; if it is whole, sartor tune RECIPE --out ADAPTER --replace, and release "
                    "it",
                ) from None
            return
        self._forgive(adapter)
        self.paths[adapter] = path  # from now on new workers load it, too

    async def _unload(self, adapter: str) -> None:
        self.paths.pop(adapter, None)
        for worker in self._ready():
            await worker.detach(adapter)

    async def equip(self, worker: WorkerProcess) -> None:
        """Load all adapters in a new worker. Errors of an adapter are stored in `worker.refused`.

        Raises WorkerDiedError when the worker dies.
        """
        while missing := [name for name in self.paths if not worker.knows(name)]:
            for adapter in missing:
                await self._equip(worker, adapter)

    async def _equip(self, worker: WorkerProcess, adapter: str) -> None:
        path = self.paths.get(adapter)
        if path is None:  # detached meanwhile
            return
        if self._is_deadly(adapter):
            problem = f"workers died while they loaded the adapter {adapter[:12]}"
            worker.refused[adapter] = ModelError(problem, "promote or roll back the agent that has it")
            return
        try:
            await worker.attach(adapter, path)
            self._forgive(adapter)
        except WorkerDiedError:
            self._died(adapter, worker)
            raise
        except SartorError as error:
            worker.refused[adapter] = error

    def _died(self, adapter: str, worker: WorkerProcess) -> None:
        doubtful = worker.died_serving or worker.end is WorkerEnd.KILLED
        (self._doubtful_deaths if doubtful else self._deaths)[adapter] += 1

    def _is_deadly(self, adapter: str) -> bool:
        return self._deaths[adapter] >= _MOST_DEATHS or self._doubtful_deaths[adapter] >= _MOST_DOUBTFUL

    def _forgive(self, adapter: str) -> None:
        self._deaths.pop(adapter, None)
        self._doubtful_deaths.pop(adapter, None)


# Limits of the trial worker: its few prompts need no more memory, and the serving workers have priority. It has one
# thread, since two threads of one step would wait for each other while the serving workers use the processors.
_MOST_ROWS, _CACHE_TOKENS = 16, 8192
_NICE = 5
_POLL_S = 0.25
AGENT = "probation"


class TrialWorker:
    """Separate worker in which admission tries an adapter.

    It runs one adapter at a time, since each trial takes the memory of a base.
    command, opening: as for the serving workers. start_s: limit for the start and for silence, s.
    """

    def __init__(self, command: Sequence[str], opening: Mapping[str, Any], start_s: float) -> None:
        engine = dict(opening["engine"])
        engine["rows"] = min(_MOST_ROWS, engine["rows"])
        if "cache_tokens" in engine:
            engine["cache_tokens"] = min(_CACHE_TOKENS, engine["cache_tokens"])
        if "threads" in engine:
            engine["threads"] = 1
        self._command = command
        self._opening = {**opening, "engine": engine, "nice": _NICE}
        self._start_s = start_s
        self._lock = asyncio.Lock()

    async def events(self, adapter: str, path: Path, calls: Sequence[GenerateCall]) -> list[tuple[Event, ...]]:
        """Return the events of each call, with the adapter in `path` attached as `adapter`. Calls may also use the
        base.

        Raises ModelError or BudgetError of the attach; ModelError if the worker dies or is silent for `start_s`;
        UnavailableError and others if the worker cannot start.
        """
        async with self._lock:
            events_by_call: dict[str, list[Event]] = {call.id: [] for call in calls}
            ended = asyncio.Event()

            def heard(worker: WorkerProcess, message: Mapping[str, Any]) -> None:
                event = event_from_json(message)
                events_by_call[event.call].append(event)
                if message["event"] != "piece":
                    worker.calls.pop(event.call, None)
                if not worker.calls:
                    ended.set()

            worker = WorkerProcess(self._command, self._opening, heard)
            try:
                await self._start(worker)
                async with self._watched(worker):
                    await worker.attach(adapter, path)
                    for index, call in enumerate(calls):
                        worker.begin(InFlightCall(call, AGENT, False, index), call.id)
                    if calls:
                        await self._wait_all(worker, ended)
            except WorkerDiedError as error:
                raise ModelError(
                    f"a worker that tried the adapter in {path} ended: {error}",
                    "sartor tune RECIPE --out ADAPTER --replace, then sartor evaluate ADAPTER --replace and release "
                    "it",
                ) from None
            finally:
                worker.kill(WorkerEnd.CLOSED)
                await worker.wait_exit()
            return [tuple(events_by_call[call.id]) for call in calls]

    async def _start(self, worker: WorkerProcess) -> None:
        try:
            await worker.start(self._start_s)
        except WorkerDiedError as error:
            raise UnavailableError(
                f"a worker to try the adapter could not start: {error}",
                "the log on stderr says why: sartor serve TEAM 2> serve.log, then grep error serve.log",
            ) from None

    @contextlib.asynccontextmanager
    async def _watched(self, worker: WorkerProcess) -> AsyncIterator[None]:
        """Kill the worker if it is silent for `start_s` while the context is open.

        The limit is long, because with little processor time a worker may be slow without hanging.
        """

        async def watch() -> None:
            while time.monotonic() - worker.heard_at < self._start_s:
                await asyncio.sleep(_POLL_S)
            worker.kill(WorkerEnd.HUNG, f"said nothing for {self._start_s:g} s")

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()

    async def _wait_all(self, worker: WorkerProcess, ended: asyncio.Event) -> None:
        """Return when all calls have ended. Raises WorkerDiedError if the worker ends first."""
        exited = asyncio.ensure_future(worker.wait_exit())
        done = asyncio.ensure_future(ended.wait())
        await asyncio.wait([exited, done], return_when=asyncio.FIRST_COMPLETED)
        for waiter in (exited, done):
            waiter.cancel()
        if worker.calls:
            raise WorkerDiedError(worker.end_reason)
