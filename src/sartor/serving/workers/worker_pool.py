"""Worker slots, restarts, hang and memory checks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from sartor.core.errors import BudgetError, ModelError, SartorError, UnavailableError
from sartor.inference.engine import EngineInfo
from sartor.serving.team_config import WorkerOptions
from sartor.serving.workers.agent_health import Restarts
from sartor.serving.workers.worker_process import WorkerDiedError, WorkerEnd, WorkerProcess

# A worker above its memory limit gets no new calls and _RETIRE_S seconds for its current ones. Above _FAR_ABOVE times
# the limit it is killed at once.
_RETIRE_S = 30.0
_FAR_ABOVE = 1.5
_MOST_BEAT_S = 1.0
_CLOSE_S = 2.0
_LOOK_S = 0.02
# A starting worker sends signs of life too, but a library that loads may delay them for a while
SILENT_START_S = 30.0
_LOG = logging.getLogger("sartor.agents")


@dataclass(frozen=True)
class Hooks:
    """Callbacks of the worker slots.

    equip: loads the adapters into a new worker before it is ready.
    changed: called when a worker is ready or retiring, or a slot is given up.
    lost: called with each worker that has ended.
    beat: called at each beat.
    """

    equip: Callable[[WorkerProcess], Awaitable[None]]
    changed: Callable[[], None]
    lost: Callable[[WorkerProcess], None]
    beat: Callable[[], None]


@dataclass
class WorkerSlot:
    """Slot of one worker, with the restart delays of its workers.

    retiring_since: monotonic time, s.
    """

    restarts: Restarts
    worker: WorkerProcess | None = None
    retiring_since: float = 0.0


class WorkerSlots:
    """Slots for `count` workers that serve and `spare` workers that wait.

    make: returns a WorkerProcess that is not started.
    ends: number of ended workers, by cause.
    """

    def __init__(self, rules: WorkerOptions, make: Callable[[], WorkerProcess], hooks: Hooks) -> None:
        self._rules = rules
        self._make = make
        self._hooks = hooks
        self._slots = [WorkerSlot(Restarts(rules)) for _ in range(rules.count + rules.spare)]
        self._tasks: list[asyncio.Task[None]] = []
        self._ready_event = asyncio.Event()
        self._first: asyncio.Future[EngineInfo] | None = None
        self._silent: set[WorkerProcess] = set()
        self._outdated: set[WorkerProcess] = set()
        self._beat_s = min(_MOST_BEAT_S, rules.hang_s / 4)
        self.ends: Counter[str] = Counter()

    async def start(self) -> EngineInfo:
        """Start all workers; return the engine's description when the first one is ready.

        Raises the error of a worker that could not start, or UnavailableError if none comes up.
        """
        self._first = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._run_slot(slot)) for slot in self._slots]
        self._tasks.append(asyncio.create_task(self._beats()))
        return await self._first

    async def close(self) -> None:
        """End all workers; return when they are gone."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        workers = [worker for worker in self._workers() if worker.state != "gone"]
        await asyncio.gather(*(worker.close(_CLOSE_S) for worker in workers))
        await asyncio.gather(*(worker.wait_exit() for worker in workers))

    async def renew(self) -> None:
        """End all current workers, one after the other as their replacements are ready; return when they are gone."""
        outdated = [worker for worker in self._workers() if worker.state != "gone"]
        self._outdated |= set(outdated)
        await asyncio.gather(*(worker.wait_exit() for worker in outdated))

    def ready(self) -> list[WorkerProcess]:
        """Return the workers that are ready, spares first."""
        return sorted(
            (worker for worker in self._workers() if worker.state == "ready"), key=lambda worker: worker.is_serving
        )

    def answering(self) -> list[WorkerProcess]:
        """Return the workers that serve. A spare replaces a missing or silent one, which may hang or run a long step.

        When the silent worker responds again, there is one too many; the surplus takes no new calls and becomes the
        spare. If no spare can step in, the silent workers are returned.
        """
        quiet_s = self._beat_s
        ready = [worker for worker in self.ready() if not worker.is_quiet(quiet_s)]
        answering = [worker for worker in ready if worker.is_serving]
        for spare in (worker for worker in ready if not (worker.is_serving or worker.is_isolated)):
            if len(answering) >= self._rules.count:
                break
            spare.is_serving = True
            answering.append(spare)
        for surplus in answering[self._rules.count :]:
            surplus.is_serving = False
        return answering[: self._rules.count] or [worker for worker in self.ready() if worker.is_serving]

    def spares_expected(self) -> bool:
        """Return whether there is a spare worker, or will be one soon."""
        available = [worker for worker in self._workers() if worker.state in ("starting", "ready")]
        return len(available) > self._rules.count

    def is_given_up(self) -> bool:
        """Return whether all slots are given up, so that no worker will be ready soon."""
        return all(slot.restarts.is_given_up for slot in self._slots)

    async def wait_ready(self) -> None:
        """Return when a worker is ready.

        Raises UnavailableError if that takes longer than `start_s`.
        """
        try:
            async with asyncio.timeout(self._rules.start_s):
                while not self.ready():
                    self._ready_event.clear()
                    await self._ready_event.wait()
        except TimeoutError:
            raise UnavailableError(
                f"no worker was ready within {self._rules.start_s:g} s",
                "the log on stderr says why: sartor serve TEAM 2> serve.log, then grep error serve.log",
            ) from None

    async def expendable_worker(self) -> WorkerProcess:
        """Return a worker for work that may kill it.

        It is an idle spare if spares are configured and one comes up in time; else any ready worker.
        Raises UnavailableError.
        """
        deadline = time.monotonic() + self._rules.start_s
        while (
            self._rules.spare
            and time.monotonic() < deadline
            and not any(slot.restarts.is_given_up for slot in self._slots)
        ):
            for worker in self.ready():
                if not (worker.is_serving or worker.is_isolated or worker.calls):
                    return worker
            await asyncio.sleep(_LOOK_S)
        await self.wait_ready()
        return self.ready()[0]

    def find(self, wire_id: str) -> WorkerProcess | None:
        """Return the worker that runs the call with this wire id; None if there is none."""
        return next((worker for worker in self._workers() if wire_id in worker.calls), None)

    def health(self) -> list[dict[str, Any]]:
        """Return one row for each slot.

        state: starting, ready, retiring, waiting (for its restart), given up.
        role: of a ready worker: answers, spare, alone (makes a suspected call).
        """
        rows = []
        for slot in self._slots:
            worker = slot.worker
            is_running = worker is not None and worker.state != "gone"
            state = worker.state if worker and is_running else "waiting"
            if worker is None or worker.state != "ready":
                role = ""
            elif worker.is_isolated:
                role = "alone"
            else:
                role = "answers" if worker.is_serving else "spare"
            rows.append(
                {
                    "state": "given up" if slot.restarts.is_given_up else state,
                    "role": role,
                    "pid": worker.pid if worker else 0,
                    "memory_bytes": worker.memory_bytes if worker and is_running else 0,
                    "live": len(worker.calls) if worker else 0,
                    "restarts": slot.restarts.count,
                    "last_end": worker.end_reason if worker else "",
                }
            )
        return rows

    def _workers(self) -> list[WorkerProcess]:
        return [slot.worker for slot in self._slots if slot.worker is not None]

    async def _run_slot(self, slot: WorkerSlot) -> None:
        while True:
            worker = slot.worker = self._make()
            try:
                await self._open(worker)
            except WorkerDiedError:
                pass
            except SartorError as error:
                _LOG.error("a worker could not start: %s", error.problem)
                worker.kill(WorkerEnd.START, error.problem)
                self._failed(error)
            await worker.wait_exit()
            self._ended(worker)
            wait_s = slot.restarts.ended()
            if slot.restarts.is_given_up:
                _LOG.error(
                    "%d workers of one place ended within %g s; next start in %.1f s",
                    self._rules.restarts + 1,
                    self._rules.window_s,
                    wait_s,
                )
                self._failed(
                    UnavailableError(
                        f"workers end as soon as they start: {worker.end_reason}",
                        "the log on stderr says why: sartor serve TEAM 2> serve.log, then grep error serve.log",
                    )
                )
                self._hooks.changed()
            await asyncio.sleep(wait_s)
            slot.restarts.starting()

    async def _open(self, worker: WorkerProcess) -> None:
        about = await worker.start(self._rules.start_s)
        first_about = (
            self._first.result() if self._first and self._first.done() and not self._first.exception() else about
        )
        if (about.base_digest, about.template_digest) != (first_about.base_digest, first_about.template_digest):
            raise ModelError(
                f"the base {about.base} was changed on disk while it was served",
                "sartor serve TEAM, once nobody changes the base's files any more",
            )
        worker.measure()
        limit = self._rules.memory_bytes
        if limit and worker.memory_bytes > limit:
            problem = (
                f"a worker takes {worker.memory_bytes} bytes before its first call; workers.memory_bytes is {limit}"
            )
            raise BudgetError(problem, f"workers: {{memory_bytes: {2 * worker.memory_bytes}}}, or a smaller base")
        await self._hooks.equip(worker)
        if worker.state != "starting":
            raise WorkerDiedError(worker.end_reason)
        worker.state = "ready"
        self._ready_event.set()
        if self._first and not self._first.done():
            self._first.set_result(about)
        self._hooks.changed()

    def _failed(self, error: SartorError) -> None:
        if self._first and not self._first.done():
            self._first.set_exception(error)

    def _ended(self, worker: WorkerProcess) -> None:
        self._silent.discard(worker)
        self._outdated.discard(worker)
        if worker.end is not None:
            self.ends[worker.end.label] += 1
        _LOG.warning("worker %d ended: %s", worker.pid, worker.end_reason)
        self._hooks.lost(worker)

    async def _beats(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(self._beat_s)
            late_s = time.monotonic() - before - self._beat_s
            for slot in self._slots:
                if slot.worker is not None and slot.worker.state != "gone":
                    self._watch(slot, slot.worker, late_s)
            self._hooks.beat()

    def _watch(self, slot: WorkerSlot, worker: WorkerProcess, late_s: float) -> None:
        """Check one worker: memory, silence and sign of life.

        late_s: delay of this process's own beat. The worker is not blamed for silence in that time.
        """
        worker.heard_at += late_s
        worker.measure()
        self._watch_memory(slot, worker)
        quiet_s = time.monotonic() - worker.heard_at
        # opening an engine and loading adapters into a new worker may take up to start_s
        max_s = self._rules.start_s if worker.state == "starting" else self._rules.hang_s
        if not worker.is_open and quiet_s > max(SILENT_START_S, self._rules.hang_s):
            worker.kill(WorkerEnd.HUNG, f"no sign of life for {quiet_s:.1f} s while it started")
        if worker.has_work and quiet_s > max_s:
            # its messages may have arrived and not been read yet, so it is killed at the second look
            if worker in self._silent:
                worker.kill(WorkerEnd.HUNG, f"said nothing for {quiet_s:.1f} s")
            self._silent.add(worker)
            return
        self._silent.discard(worker)
        if worker.state == "ready" and not worker.has_work:
            worker.ping()  # finds a worker that hangs while idle before a call is sent to it

    def _watch_memory(self, slot: WorkerSlot, worker: WorkerProcess) -> None:
        limit = self._rules.memory_bytes
        if limit and worker.memory_bytes > _FAR_ABOVE * limit:
            worker.kill(WorkerEnd.MEMORY, f"it took {worker.memory_bytes} bytes; workers.memory_bytes is {limit}")
        elif worker.state == "retiring":
            is_due = not worker.calls or time.monotonic() - slot.retiring_since > _RETIRE_S
            if is_due and worker in self._outdated:
                worker.kill(WorkerEnd.RENEWED, "nothing that it held is to stay in memory")
            elif is_due:
                worker.kill(WorkerEnd.RECYCLED, "it took more than workers.memory_bytes")
        elif self._is_to_retire(worker, limit):
            worker.state, slot.retiring_since = "retiring", time.monotonic()
            self._hooks.changed()

    def _is_to_retire(self, worker: WorkerProcess, limit: int) -> bool:
        is_any_retiring = any(other.state == "retiring" for other in self._workers())
        if worker.state != "ready" or is_any_retiring:
            return False
        if worker in self._outdated:  # only while all slots are ready, so one worker is replaced at a time
            return len(self.ready()) == len(self._slots)
        return bool(limit) and worker.memory_bytes > limit
