"""Golden: what a worker's end is called in /health, in errors and in the log; and which ends are held against a call.

Ends by a signal or an exit status are of real processes (a shell); those that the parent makes are of one that never started.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from sartor.core.errors import ModelError, UnavailableError
from sartor.inference.engine import GenerateCall, ReplyFailed
from sartor.serving.team_config import CircuitBreakerOptions, WorkerOptions
from sartor.serving.workers.adapter_loading import AdapterPool
from sartor.serving.workers.agent_health import AgentHealthTracker, AgentQueues
from sartor.serving.workers.in_flight import InFlightCall
from sartor.serving.workers.scheduler import CallScheduler
from sartor.serving.workers.worker_pool import Hooks, WorkerSlots
from sartor.serving.workers.worker_process import WorkerDiedError, WorkerProcess

RULES = WorkerOptions(memory_bytes=1000, hang_s=10.0, start_s=120.0)
MADE = (
    "far above",
    "over",
    "renewed",
    "hangs",
    "hangs in start",
    "closed",
    "status",
    "SIGKILL",
    "SIGTERM",
    "start",
)
# what `last_end` of /health says; the label is the key under `ends`
TEXTS = {
    "far above": "memory: it took 1501 bytes; workers.memory_bytes is 1000",
    "over": "recycled: it took more than workers.memory_bytes",
    "renewed": "renewed: nothing that it held is to stay in memory",
    "hangs": "hangs: said nothing for 11.0 s",
    "hangs in start": "hangs: no sign of life for 31.0 s while it started",
    "closed": "closed",
    "status": "crashed: exit status 3",
    "SIGKILL": "crashed: killed by SIGKILL",
    "SIGTERM": "crashed: killed by SIGTERM",
    "start": "start: not open after 0.05 s",
}
LABELS = {
    "far above": "memory",
    "over": "recycled",
    "renewed": "renewed",
    "hangs": "hangs",
    "hangs in start": "hangs",
    "closed": "closed",
    "status": "crashed",
    "SIGKILL": "crashed",
    "SIGTERM": "crashed",
    "start": "start",
}
SCRIPTS = {"status": "exit 3", "SIGKILL": "kill -9 $$", "SIGTERM": "kill -15 $$", "start": "exec sleep 60"}


async def no_adapters(child: WorkerProcess) -> None:
    """A Places without adapters."""


def places() -> WorkerSlots:
    def make() -> WorkerProcess:
        raise AssertionError("no worker is to be started")

    return WorkerSlots(RULES, make, Hooks(no_adapters, lambda: None, lambda child: None, lambda: None))


async def ended(how: str, of: WorkerSlots | None = None) -> WorkerProcess:
    """A worker that ended so, in the first place of `of`."""
    held = of or places()
    child = WorkerProcess(["/bin/sh", "-c", SCRIPTS.get(how, "")], {}, lambda child, frame: None)
    place = held._slots[0]
    place.worker = child
    if how in SCRIPTS:
        with contextlib.suppress(WorkerDiedError, UnavailableError):
            await child.start(0.05 if how == "start" else 30.0)
        await child.wait_exit()
    elif how == "closed":
        await child.close(0.0)
    else:
        look(held, child, how)
    return child


def look(held: WorkerSlots, child: WorkerProcess, how: str) -> None:
    """Let its place look at it, until it is ended."""
    place = held._slots[0]
    child.state = "ready"
    if how != "hangs in start":
        child._is_open.set_result(None)  # type: ignore[arg-type]
    child.memory_bytes = {"far above": 1501, "over": 1001}.get(how, 10)
    if how == "renewed":
        held._outdated.add(child)
        held._slots[1:] = []
    with pytest.MonkeyPatch.context() as patch:
        now = time.monotonic()
        patch.setattr(time, "monotonic", lambda: now)
        if how.startswith("hangs"):
            child._pending_answers[1] = asyncio.get_running_loop().create_future()
            child.heard_at = now - (31.0 if how == "hangs in start" else 11.0)
        for _ in range(2):
            held._watch(place, child, 0.0)


@pytest.mark.parametrize("how", MADE)
async def test_text_and_label_of_an_end_are_golden(how: str) -> None:
    held = places()
    child = await ended(how, held)
    held._ended(child)
    result = held.health()[0]["last_end"], dict(held.ends)
    assert result == (TEXTS[how], {LABELS[how]: 1})


async def test_cancelled_start_leaves_no_socket_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ends while it starts a worker."""
    pair = socket.socketpair()
    creating = asyncio.Event()

    async def create(*_: Any, **__: Any) -> None:
        creating.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(socket, "socketpair", lambda: pair)
    monkeypatch.setattr(asyncio, "create_subprocess_exec", create)
    starting = asyncio.create_task(WorkerProcess(["worker"], {}, lambda child, frame: None).start(30.0))
    await creating.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert [end.fileno() for end in pair] == [-1, -1]


async def test_first_end_of_a_worker_stays() -> None:
    held = places()
    child = await ended("over", held)
    await child.close(0.0)
    result = str(held.health()[0]["last_end"])
    assert result == TEXTS["over"]


async def test_question_of_a_worker_that_ended_has_the_text() -> None:
    child = await ended("SIGKILL")
    with pytest.raises(WorkerDiedError, match="^crashed: killed by SIGKILL$"):
        await child.ask("embed")


async def deaths(how: str) -> tuple[list[Any], dict[str, int]]:
    """What a suspected call says after the first and the second worker that made it alone ended so, and the counts."""
    calls = CallScheduler(AgentQueues(4), AgentHealthTracker(CircuitBreakerOptions()), RULES)
    calls.use_workers(places(), AdapterPool(lambda: [], no_worker))
    calls._is_poked = True  # nothing is to be dispatched
    calls._queues.enter("a@1", rows=1)
    live = InFlightCall(GenerateCall("c", "a", text="hello"), "a@1", False, 1)
    said: list[Any] = []
    for number in range(2):
        child = await ended(how)
        child.is_isolated, live.is_suspect, live.wire_id = True, True, str(number)
        child.calls[live.wire_id] = live
        calls.on_worker_lost(child)
        said.append(live._final_event)
        if live._final_event is not None:
            break
    return said, dict(calls.counts)


async def no_worker() -> WorkerProcess:
    raise AssertionError("nobody is to try an adapter")


@pytest.mark.parametrize("how", ["status", "SIGTERM", "far above"])
async def test_an_end_that_is_certain_condemns_a_call_at_once(how: str) -> None:
    (failed,), counts = await deaths(how)
    assert failed == ReplyFailed(
        "c",
        "ModelError",
        f"the workers that made this reply of a@1 died: {TEXTS[how]}",
        "send another prompt: this one is not tried again",
    )
    assert counts == {"made_again": 1, "condemned": 1}


@pytest.mark.parametrize("how", ["SIGKILL", "hangs", "hangs in start"])
async def test_uncertain_worker_end_condemns_at_the_second(how: str) -> None:
    """SIGKILL and hangs may come from outside, so that the call is tried again once."""
    said, counts = await deaths(how)
    assert said[0] is None and said[1].problem == f"the workers that made this reply of a@1 died: {TEXTS[how]}"
    assert counts == {"made_again": 2, "condemned": 1}


async def test_a_recycled_worker_is_held_against_no_call() -> None:
    said, counts = await deaths("over")
    assert said == [None, None] and counts == {"made_again": 2}


@pytest.mark.parametrize(("how", "loads"), [("SIGKILL", 5), ("status", 2), ("hangs", 2)])
async def test_an_adapter_is_blamed_by_how_workers_ended(how: str, loads: int) -> None:
    """Workers that may have been killed from outside count less."""

    tries = 0

    async def to_try() -> WorkerProcess:
        nonlocal tries
        tries += 1
        child = await ended(how)
        child.state = "gone"
        return child

    shelf = AdapterPool(lambda: [], to_try)
    with pytest.raises(ModelError) as caught:
        await shelf.attach("adapter-of-a-team", Path("/adapter"))
    assert caught.value.problem == f"workers died while they loaded the adapter adapter-of-a: {TEXTS[how]}"
    assert tries == loads


def test_cases_are_complete() -> None:
    assert set(MADE) == set(TEXTS) == set(LABELS)
