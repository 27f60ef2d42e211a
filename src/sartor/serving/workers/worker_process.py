"""Parent's handle of one worker process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from sartor.core import resource_limits
from sartor.core.errors import SartorError, UnavailableError
from sartor.core.ipc import Frames, MalformedFrame, error_from_json, frame
from sartor.inference.engine import BASE, EngineInfo
from sartor.serving.workers.in_flight import InFlightCall

State = Literal["starting", "ready", "retiring", "gone"]
# What is in a dead worker's socket is read after its end; a process that it left behind may hold the socket open.
_LAST_WORDS_S = 1.0
# For GNU's OpenMP (turns) and LLVM's (milliseconds): a small part of what they spin by default
_PATIENT = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
_PING = 0  # its number; other questions have greater ones


EventHandler = Callable[["WorkerProcess", Mapping[str, Any]], None]


class WorkerEnd(StrEnum):
    """Cause of a worker's end.

    CRASHED: by itself, or by its connection. KILLED: by a SIGKILL that is none of ours: the operator's, or the
    kernel's when
    the machine's memory ends. HUNG: silent for too long. MEMORY: far above its limit. RECYCLED: above it. RENEWED: so
    that
    what it holds leaves memory. START: not ready in time, or refused. CLOSED: no longer needed.
    """

    CRASHED = "crashed"
    KILLED = "killed"
    HUNG = "hangs"
    MEMORY = "memory"
    RECYCLED = "recycled"
    RENEWED = "renewed"
    START = "start"
    CLOSED = "closed"

    @property
    def label(self) -> str:
        """Name under `ends` in /health, where a worker that was killed is counted as crashed."""
        return (WorkerEnd.CRASHED if self is WorkerEnd.KILLED else self).value


class WorkerDiedError(Exception):
    """The worker died before it answered."""


class WorkerProcess:
    """One worker process. `on_event` is called with each frame that is no answer to a question."""

    def __init__(self, command: Sequence[str], opening: Mapping[str, Any], on_event: EventHandler) -> None:
        self._command = command
        self._opening = opening
        self._on_event = on_event
        self._pending_answers: dict[int, asyncio.Future[Mapping[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._connection: _WorkerConnection | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._end_watch: asyncio.Task[None] | None = None
        self._is_open: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self.state: State = "starting"
        self.calls: dict[str, InFlightCall] = {}
        self.adapters: set[str] = set()
        self.refused: dict[str, SartorError] = {}
        self.is_serving = False  # not a spare
        self.is_isolated = False  # makes a suspected call, or will when those that it has have ended
        self.owes_turn = False  # others their turn, after a suspected call
        self.died_serving = False  # while it made replies
        self.died_on_request = False  # while it loaded an adapter or embedded
        self.heard_at = time.monotonic()
        self.memory_bytes = 0
        self.malformed = 0
        self.end: WorkerEnd | None = None
        self.detail = ""  # of the end, in words

    @property
    def end_reason(self) -> str:
        """Cause of its end as text; empty while it lives."""
        if self.end is None:
            return ""
        return f"{self.end.label}: {self.detail}" if self.detail else self.end.label

    @property
    def pid(self) -> int:
        """Of its process; 0 before there is one."""
        return self._process.pid if self._process else 0

    @property
    def has_work(self) -> bool:
        """Whether it owes an answer or a reply."""
        return bool(self.calls or self._pending_answers)

    def is_quiet(self, max_s: float) -> bool:
        """Whether it owes something and has not been heard of for so long."""
        return self.has_work and time.monotonic() - self.heard_at > max_s

    @property
    def is_open(self) -> bool:
        """Whether it has said what it serves."""
        return self._is_open.done()

    @property
    def about(self) -> EngineInfo:
        """What it serves, once it is open."""
        return self._is_open.result()

    async def start(self, timeout_s: float) -> EngineInfo:
        """Begin the process and wait until its engine is open.

        Raises the error that the engine told, GoneError when it died, UnavailableError when it took too long.
        """
        loop = asyncio.get_running_loop()
        parent_end, worker_end = socket.socketpair()
        with worker_end:
            command = [*self._command, str(worker_end.fileno())]
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[worker_end.fileno()],
                    start_new_session=True,
                    env=environment(),
                )
            except OSError as error:
                parent_end.close()
                raise UnavailableError(
                    f"{command[0]} cannot be started: {error}",
                    f"ulimit -a shows the limits of processes and memory; ls -l {command[0]}",
                ) from None
        parent_end.setblocking(False)
        _, self._connection = await loop.create_connection(
            lambda: _WorkerConnection(self._on_message), sock=parent_end
        )
        self._end_watch = asyncio.create_task(self._watch_end(self._process, self._connection))
        self._connection.send({"op": "open", **self._opening})
        self.heard_at = time.monotonic()
        pending: list[asyncio.Future[Any]] = [self._is_open, self._connection.lost]
        done, _ = await asyncio.wait(pending, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._is_open in done:
            return self.about
        if done:
            raise WorkerDiedError("it ended before it was open")
        self.kill(WorkerEnd.START, f"not open after {timeout_s:g} s")
        raise UnavailableError(
            f"a worker was not open after {timeout_s:g} s", "raise workers.start_s, or take a smaller base"
        )

    async def wait_exit(self) -> None:
        """Wait for its end, and for all that it said before. Whoever waits for an answer then gets GoneError."""
        if self._end_watch is not None:
            await asyncio.shield(self._end_watch)
        self.state = "gone"

    async def _watch_end(self, process: asyncio.subprocess.Process, connection: _WorkerConnection) -> None:
        exited = asyncio.ensure_future(process.wait())
        pending: list[asyncio.Future[Any]] = [exited, connection.lost]
        await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if not exited.done():  # it closed its end, or it is about to be gone
            await asyncio.wait([exited], timeout=_LAST_WORDS_S)
            if not exited.done():
                self.kill(WorkerEnd.CRASHED, "it closed its connection")
        status = await exited
        await asyncio.wait([connection.lost], timeout=_LAST_WORDS_S)
        connection.close()
        was_killed = status == -signal.SIGKILL
        self._note_end(WorkerEnd.KILLED if was_killed else WorkerEnd.CRASHED, _describe_exit(status))
        self.died_serving = bool(self.calls)
        self.died_on_request = any(number != _PING for number in self._pending_answers)
        self.state = "gone"
        for answer in self._pending_answers.values():
            if not answer.done():
                answer.set_exception(WorkerDiedError(self.end_reason))
        self._pending_answers.clear()
        if not self._is_open.done():
            self._is_open.set_exception(WorkerDiedError(self.end_reason))
            self._is_open.exception()  # seen, if nobody waits for it

    def send(self, message: Mapping[str, Any]) -> None:
        """Tell it something."""
        if self._connection is not None:
            self._connection.send(message)

    async def ask(self, op: str, **fields: Any) -> Mapping[str, Any]:
        """Its answer. Raises the error that it tells, or GoneError."""
        if self.state == "gone":
            raise WorkerDiedError(self.end_reason)
        if not self.has_work:
            self.heard_at = time.monotonic()  # it was idle, and owed nothing until now
        number = next(self._numbers)
        answer: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending_answers[number] = answer
        self.send({"op": op, **fields, "ask": number})
        reply = await answer
        if "error" in reply:
            raise error_from_json(reply["error"])
        return reply

    def ping(self) -> None:
        """Ask for a sign of life; one that does not come makes it one that hangs."""
        self._pending_answers[_PING] = asyncio.get_running_loop().create_future()
        self._pending_answers[_PING].add_done_callback(lambda answer: answer.exception())
        self.heard_at = time.monotonic()
        self.send({"op": "ping", "ask": _PING})

    def knows(self, adapter: str) -> bool:
        """Whether it has the adapter, or has said why it cannot have it."""
        return adapter in self.adapters or adapter in self.refused

    async def attach(self, adapter: str, path: Path) -> None:
        """Load an adapter there. Raises what it tells, or GoneError."""
        if adapter not in self.adapters:
            await self.ask("attach", adapter=adapter, path=str(path))
            self.adapters.add(adapter)
            self.refused.pop(adapter, None)

    async def detach(self, adapter: str) -> None:
        """Let it forget an adapter."""
        self.refused.pop(adapter, None)
        if adapter in self.adapters:
            self.adapters.discard(adapter)
            with contextlib.suppress(WorkerDiedError):
                await self.ask("detach", adapter=adapter)

    def begin(self, in_flight: InFlightCall, wire_id: str) -> None:
        """Give it a call."""
        if not self.has_work:
            self.heard_at = time.monotonic()
        in_flight.wire_id = wire_id
        self.calls[wire_id] = in_flight
        self.send({"op": "call", "call": {**in_flight.call.as_json(), "id": wire_id}})

    def rows_free(self, adapter: str) -> int:
        """How many more calls of an adapter it takes now."""
        if self.state != "ready" or self.is_isolated or (adapter != BASE and adapter not in self.adapters):
            return 0
        return self.about.rows - len(self.calls)

    def measure(self) -> None:
        """Look at its memory: from outside where the system tells, since one that hangs says nothing itself."""
        if self.pid and self.state != "gone":
            self.memory_bytes = resource_limits.resident_bytes(self.pid) or self.memory_bytes

    def kill(self, end: WorkerEnd, detail: str = "") -> None:
        """End it now. The cause is remembered, if none is yet."""
        self._note_end(end, detail)
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self, timeout_s: float) -> None:
        """Ask it to end, and end it when it does not."""
        if self._process is not None and self.state != "starting":  # an engine that opens hears nothing
            self._note_end(WorkerEnd.CLOSED)
            self.send({"op": "close"})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), timeout_s)
        self.kill(WorkerEnd.CLOSED)

    def _note_end(self, end: WorkerEnd, detail: str = "") -> None:
        if self.end is None:
            self.end, self.detail = end, detail

    def _on_message(self, message: Mapping[str, Any] | MalformedFrame) -> None:
        self.heard_at = time.monotonic()
        if isinstance(message, MalformedFrame) or message.get("op") == "malformed":
            self.malformed += 1
            return
        self.memory_bytes = message.get("memory_bytes", self.memory_bytes)
        if "answer" in message:
            answer = self._pending_answers.pop(message["answer"], None)
            if answer is not None and not answer.done():
                answer.set_result(message)
        elif message.get("op") == "ready" and not self._is_open.done():
            self._is_open.set_result(EngineInfo(**message["about"]))
        elif message.get("op") == "failed" and not self._is_open.done():
            self._is_open.set_exception(error_from_json(message["error"]))
        elif "event" in message:
            self._on_event(self, message)


class _WorkerConnection(asyncio.Protocol):
    """The connection to a worker, in frames."""

    def __init__(self, on_message: Callable[[Mapping[str, Any] | MalformedFrame], None]) -> None:
        self._on_message = on_message
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for message in self._frames.feed(data):
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)

    def send(self, message: Mapping[str, Any]) -> None:
        """Hand a frame over; one for a connection that is lost is forgotten, since its end is told elsewhere."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    def close(self) -> None:
        """Give the connection up."""
        if self._transport is not None:
            self._transport.abort()


def environment() -> dict[str, str]:
    """The worker's: the threads of a step give the processor away while they wait for each other.

    OpenMP lets them spin. Where others take the processors (a worker that starts, a second one), those that spin keep
    the one that they wait for from running, and a step takes many times as long. What the user has set holds; GNU's
    count would go before the policy.
    """
    return dict(os.environ) if "OMP_WAIT_POLICY" in os.environ else {**_PATIENT, **os.environ}


def _describe_exit(status: int) -> str:
    """Return how a process ended, in words."""
    if status >= 0:
        return f"exit status {status}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if os.name == "posix" and os.path.exists("/proc") else os.cpu_count() or 1
