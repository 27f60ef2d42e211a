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

# A worker above its limit gets no new calls, and so long for those that it has; this far above, it is ended at once.
_RETIRE_S = 30.0
_FAR_ABOVE = 1.5
_MOST_BEAT_S = 1.0
_CLOSE_S = 2.0
_LOOK_S = 0.02
# One that starts says that it lives, too; a library that loads may keep it from that for a while
SILENT_START_S = 30.0
_LOG = logging.getLogger("sartor.agents")


@dataclass(frozen=True)
class Hooks:
    """Who is told. equip: loads what a worker must hold before it is ready. changed: one is ready, or a place is given up."""

    equip: Callable[[WorkerProcess], Awaitable[None]]
    changed: Callable[[], None]
    lost: Callable[[WorkerProcess], None]
    beat: Callable[[], None]


@dataclass
class WorkerSlot:
    """Where a worker stands, and how often one ended there."""

    restarts: Restarts
    child: WorkerProcess | None = None
    retiring_since: float = 0.0


class WorkerSlots:
    """`count` workers that answer and `spare` that wait, as `rules` say. `make` makes a Child that is not started."""

    def __init__(self, rules: WorkerOptions, make: Callable[[], WorkerProcess], hooks: Hooks) -> None:
        self._rules = rules
        self._make = make
        self._hooks = hooks
        self._places = [WorkerSlot(Restarts(rules)) for _ in range(rules.count + rules.spare)]
        self._tasks: list[asyncio.Task[None]] = []
        self._some_ready = asyncio.Event()
        self._first: asyncio.Future[EngineInfo] | None = None
        self._silent: set[WorkerProcess] = set()
        self._outdated: set[WorkerProcess] = set()
        self._beat_s = min(_MOST_BEAT_S, rules.hang_s / 4)
        self.ends: Counter[str] = Counter()

    async def start(self) -> EngineInfo:
        """Begin, and wait for the first worker. Raises the error that it told, or UnavailableError when none comes up."""
        self._first = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._keep(place)) for place in self._places]
        self._tasks.append(asyncio.create_task(self._beats()))
        return await self._first

    async def close(self) -> None:
        """End all workers, and wait until they are gone."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        children = [child for child in self._children() if child.state != "gone"]
        await asyncio.gather(*(child.close(_CLOSE_S) for child in children))
        await asyncio.gather(*(child.gone() for child in children))

    async def renew(self) -> None:
        """End every worker that there is now, one after the other as others are ready; returns when they are gone."""
        old = [child for child in self._children() if child.state != "gone"]
        self._outdated |= set(old)
        await asyncio.gather(*(child.gone() for child in old))

    def ready(self) -> list[WorkerProcess]:
        """The workers that are ready, spares first."""
        return sorted((child for child in self._children() if child.state == "ready"), key=lambda child: child.answers)

    def answering(self) -> list[WorkerProcess]:
        """The workers that answer. A spare steps in for one that is missing, or quiet: that may hang, or take a long step.

        When a quiet one is heard again there is one too many, who takes no new calls and is the spare. Where nobody can step
        in, the quiet ones answer.
        """
        quiet_s = self._beat_s
        ready = [child for child in self.ready() if not child.is_quiet(quiet_s)]
        answering = [child for child in ready if child.answers]
        for spare in (child for child in ready if not (child.answers or child.alone)):
            if len(answering) >= self._rules.count:
                break
            spare.answers = True
            answering.append(spare)
        for surplus in answering[self._rules.count :]:
            surplus.answers = False
        return answering[: self._rules.count] or [child for child in self.ready() if child.answers]

    def spares_expected(self) -> bool:
        """Whether there is a spare, or will be one soon."""
        coming = [child for child in self._children() if child.state in ("starting", "ready")]
        return len(coming) > self._rules.count

    def is_given_up(self) -> bool:
        """Whether no worker is there and none will be soon."""
        return all(place.restarts.is_given_up for place in self._places)

    async def some_ready(self) -> None:
        """Wait until a worker is ready. Raises UnavailableError when that takes longer than a start may."""
        try:
            async with asyncio.timeout(self._rules.start_s):
                while not self.ready():
                    self._some_ready.clear()
                    await self._some_ready.wait()
        except TimeoutError:
            raise UnavailableError(f"no worker was ready within {self._rules.start_s:g} s", "see what the log says") from None

    async def to_try(self) -> WorkerProcess:
        """A worker for what may kill it: a spare that does nothing else, if there is to be one, else any that is ready.

        Raises UnavailableError.
        """
        until = time.monotonic() + self._rules.start_s
        while self._rules.spare and time.monotonic() < until and not any(place.restarts.is_given_up for place in self._places):
            for child in self.ready():
                if not (child.answers or child.alone or child.calls):
                    return child
            await asyncio.sleep(_LOOK_S)
        await self.some_ready()
        return self.ready()[0]

    def find(self, wire_id: str) -> WorkerProcess | None:
        """The worker that has a call."""
        return next((child for child in self._children() if wire_id in child.calls), None)

    def health(self) -> list[dict[str, Any]]:
        """One row per place.

        state: starting, ready, retiring, waiting (for its restart), given up. role of one that is ready: answers, spare, alone
        (makes a suspected call).
        """
        return [
            {
                "state": "given up" if place.restarts.is_given_up else _state(place.child),
                "role": _role(place.child),
                "pid": place.child.pid if place.child else 0,
                "memory_bytes": place.child.memory_bytes if place.child and place.child.state != "gone" else 0,
                "live": len(place.child.calls) if place.child else 0,
                "restarts": place.restarts.count,
                "last_end": place.child.why if place.child else "",
            }
            for place in self._places
        ]

    def _children(self) -> list[WorkerProcess]:
        return [place.child for place in self._places if place.child is not None]

    async def _keep(self, place: WorkerSlot) -> None:
        while True:
            child = place.child = self._make()
            try:
                await self._open(child)
            except WorkerDiedError:
                pass
            except SartorError as error:
                _LOG.error("a worker could not start: %s", error.problem)
                child.kill(WorkerEnd.START, error.problem)
                self._failed(error)
            await child.gone()
            self._ended(child)
            wait_s = place.restarts.ended()
            if place.restarts.is_given_up:
                _LOG.error("%d workers of one place ended within %g s; next start in %.1f s", self._rules.restarts + 1,
                           self._rules.window_s, wait_s)  # fmt: skip
                self._failed(UnavailableError(f"workers end as soon as they start: {child.why}", "see what the log says"))
                self._hooks.changed()
            await asyncio.sleep(wait_s)
            place.restarts.starting()

    async def _open(self, child: WorkerProcess) -> None:
        about = await child.start(self._rules.start_s)
        known = self._first.result() if self._first and self._first.done() and not self._first.exception() else about
        if (about.base_digest, about.template_digest) != (known.base_digest, known.template_digest):
            raise ModelError(f"the base {about.base} was changed on disk while it was served", "start the server again")
        child.measure()
        limit = self._rules.memory_bytes
        if limit and child.memory_bytes > limit:
            problem = f"a worker takes {child.memory_bytes} bytes before its first call; workers.memory_bytes is {limit}"
            raise BudgetError(problem, f"workers: {{memory_bytes: {2 * child.memory_bytes}}}, or a smaller base")
        await self._hooks.equip(child)
        if child.state != "starting":
            raise WorkerDiedError(child.why)
        child.state = "ready"
        self._some_ready.set()
        if self._first and not self._first.done():
            self._first.set_result(about)
        self._hooks.changed()

    def _failed(self, error: SartorError) -> None:
        if self._first and not self._first.done():
            self._first.set_exception(error)

    def _ended(self, child: WorkerProcess) -> None:
        self._silent.discard(child)
        self._outdated.discard(child)
        if child.end is not None:
            self.ends[child.end.label] += 1
        _LOG.warning("worker %d ended: %s", child.pid, child.why)
        self._hooks.lost(child)

    async def _beats(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(self._beat_s)
            late_s = time.monotonic() - before - self._beat_s
            for place in self._places:
                if place.child is not None and place.child.state != "gone":
                    self._watch(place, place.child, late_s)
            self._hooks.beat()

    def _watch(self, place: WorkerSlot, child: WorkerProcess, late_s: float) -> None:
        """`late_s`: for so long this process heard nobody, by its own fault."""
        child.heard_at += late_s
        child.measure()
        self._watch_memory(place, child)
        quiet_s = time.monotonic() - child.heard_at
        # an engine that opens, and an adapter that a new worker loads, may take their time
        most_s = self._rules.start_s if child.state == "starting" else self._rules.hang_s
        if not child.is_open and quiet_s > max(SILENT_START_S, self._rules.hang_s):
            child.kill(WorkerEnd.HUNG, f"no sign of life for {quiet_s:.1f} s while it started")
        if child.has_work and quiet_s > most_s:
            # what it said may be there and not be read yet: it is ended at the second look
            if child in self._silent:
                child.kill(WorkerEnd.HUNG, f"said nothing for {quiet_s:.1f} s")
            self._silent.add(child)
            return
        self._silent.discard(child)
        if child.state == "ready" and not child.has_work:
            child.ping()  # so that one that hangs while it is idle is known before a call comes

    def _watch_memory(self, place: WorkerSlot, child: WorkerProcess) -> None:
        limit = self._rules.memory_bytes
        if limit and child.memory_bytes > _FAR_ABOVE * limit:
            child.kill(WorkerEnd.MEMORY, f"it took {child.memory_bytes} bytes; workers.memory_bytes is {limit}")
        elif child.state == "retiring":
            if not child.calls or time.monotonic() - place.retiring_since > _RETIRE_S:
                self._replace(child)
        elif self._is_to_retire(child, limit):
            child.state, place.retiring_since = "retiring", time.monotonic()
            self._hooks.changed()

    def _replace(self, child: WorkerProcess) -> None:
        if child in self._outdated:
            child.kill(WorkerEnd.RENEWED, "nothing that it held is to stay in memory")
        else:
            child.kill(WorkerEnd.RECYCLED, "it took more than workers.memory_bytes")

    def _is_to_retire(self, child: WorkerProcess, limit: int) -> bool:
        if child.state != "ready" or self._is_one_retiring():
            return False
        if child in self._outdated:  # not before all that ended stand again
            return len(self.ready()) == len(self._places)
        return bool(limit) and child.memory_bytes > limit

    def _is_one_retiring(self) -> bool:
        return any(child.state == "retiring" for child in self._children())


def _state(child: WorkerProcess | None) -> str:
    return "waiting" if child is None or child.state == "gone" else child.state


def _role(child: WorkerProcess | None) -> str:
    if child is None or child.state != "ready":
        return ""
    return "alone" if child.alone else "answers" if child.answers else "spare"
