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
# Limit for reading a dead worker's socket to its end: a child process of the worker may hold the socket open
_LAST_WORDS_S = 1.0
# Spin limits of GNU OpenMP (iterations) and LLVM OpenMP (milliseconds), far below their defaults
_PATIENT = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
_PING = 0  # request number of pings; other requests have greater numbers


EventHandler = Callable[["WorkerProcess", Mapping[str, Any]], None]


class WorkerEnd(StrEnum):
    """Cause of a worker's end.

    CRASHED: by itself, or by its connection.
    KILLED: by a SIGKILL that this process did not send, from the operator or from the kernel out of memory.
    HUNG: silent for too long.
    MEMORY: far above its memory limit.
    RECYCLED: above its memory limit.
    RENEWED: replaced, so that its content leaves memory.
    START: not ready in time, or refused.
    CLOSED: no longer needed.
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
        """Name under `ends` in /health, where KILLED counts as crashed."""
        return (WorkerEnd.CRASHED if self is WorkerEnd.KILLED else self).value


class WorkerDiedError(Exception):
    """Worker that died before it answered."""


class WorkerProcess:
    """Handle of one worker process.

    on_event: called with each frame that is an event of a call.
    calls: calls that the worker is running, by wire id.
    adapters: adapters that it holds. refused: errors of adapters that it could not load.
    heard_at: monotonic time of the last frame, s.
    """

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
        self.is_serving = False  # False for a spare
        self.is_isolated = False  # runs a suspected call alone, or will when its current calls have ended
        self.owes_turn = False  # other calls come first now, after a suspected call
        self.died_serving = False  # died while it made replies
        self.died_on_request = False  # died while it loaded an adapter or embedded texts
        self.heard_at = time.monotonic()
        self.memory_bytes = 0
        self.malformed = 0
        self.end: WorkerEnd | None = None
        self.detail = ""  # description of the end

    @property
    def end_reason(self) -> str:
        """Cause of the end as text; "" while the worker lives."""
        if self.end is None:
            return ""
        return f"{self.end.label}: {self.detail}" if self.detail else self.end.label

    @property
    def pid(self) -> int:
        """Process id; 0 before the process exists."""
        return self._process.pid if self._process else 0

    @property
    def has_work(self) -> bool:
        """Whether the worker owes an answer or a reply."""
        return bool(self.calls or self._pending_answers)

    def is_quiet(self, max_s: float) -> bool:
        """Return whether the worker has work and has sent nothing for more than `max_s` seconds."""
        return self.has_work and time.monotonic() - self.heard_at > max_s

    @property
    def is_open(self) -> bool:
        """Whether the worker has reported its engine, or failed to open it."""
        return self._is_open.done()

    @property
    def about(self) -> EngineInfo:
        """Description of the engine, once it is open."""
        return self._is_open.result()

    async def start(self, timeout_s: float) -> EngineInfo:
        """Start the process and wait until its engine is open.

        Raises the engine's error; WorkerDiedError if the worker dies; UnavailableError if it cannot start or is too
        slow.
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
            except BaseException as error:  # also where a server ends while the process is created
                parent_end.close()
                if not isinstance(error, OSError):
                    raise
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
        """Return when the worker has ended and its last messages are read.

        Callers that still wait for an answer then get a WorkerDiedError.
        """
        if self._end_watch is not None:
            await asyncio.shield(self._end_watch)
        self.state = "gone"

    async def _watch_end(self, process: asyncio.subprocess.Process, connection: _WorkerConnection) -> None:
        exited = asyncio.ensure_future(process.wait())
        pending: list[asyncio.Future[Any]] = [exited, connection.lost]
        await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        if not exited.done():  # it closed its end of the connection, or is about to exit
            await asyncio.wait([exited], timeout=_LAST_WORDS_S)
            if not exited.done():
                self.kill(WorkerEnd.CRASHED, "it closed its connection")
        status = await exited
        await asyncio.wait([connection.lost], timeout=_LAST_WORDS_S)
        connection.close()
        was_killed = status == -signal.SIGKILL
        if status >= 0:
            reason = f"exit status {status}"
        else:
            reason = f"killed by signal {-status}"
            with contextlib.suppress(ValueError):  # a signal without a name
                reason = f"killed by {signal.Signals(-status).name}"
        self._note_end(WorkerEnd.KILLED if was_killed else WorkerEnd.CRASHED, reason)
        self.died_serving = bool(self.calls)
        self.died_on_request = any(number != _PING for number in self._pending_answers)
        self.state = "gone"
        for answer in self._pending_answers.values():
            if not answer.done():
                answer.set_exception(WorkerDiedError(self.end_reason))
        self._pending_answers.clear()
        if not self._is_open.done():
            self._is_open.set_exception(WorkerDiedError(self.end_reason))
            self._is_open.exception()  # marks the exception as retrieved, in case nobody awaits it

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message, if the worker is connected."""
        if self._connection is not None:
            self._connection.send(message)

    async def ask(self, op: str, **fields: Any) -> Mapping[str, Any]:
        """Send a request and return the answer.

        Raises the error in the answer, or WorkerDiedError.
        """
        if self.state == "gone":
            raise WorkerDiedError(self.end_reason)
        if not self.has_work:
            self.heard_at = time.monotonic()  # it was idle: its silence counts from now
        number = next(self._numbers)
        answer: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending_answers[number] = answer
        self.send({"op": op, **fields, "ask": number})
        reply = await answer
        if "error" in reply:
            raise error_from_json(reply["error"])
        return reply

    def ping(self) -> None:
        """Request a sign of life. A worker that does not answer is later found to hang."""
        self._pending_answers[_PING] = asyncio.get_running_loop().create_future()
        self._pending_answers[_PING].add_done_callback(lambda answer: answer.exception())
        self.heard_at = time.monotonic()
        self.send({"op": "ping", "ask": _PING})

    def knows(self, adapter: str) -> bool:
        """Return whether the worker holds the adapter or has reported why it cannot."""
        return adapter in self.adapters or adapter in self.refused

    async def attach(self, adapter: str, path: Path) -> None:
        """Load an adapter in the worker. Raises the worker's error, or WorkerDiedError."""
        if adapter not in self.adapters:
            await self.ask("attach", adapter=adapter, path=str(path))
            self.adapters.add(adapter)
            self.refused.pop(adapter, None)

    async def detach(self, adapter: str) -> None:
        """Unload an adapter from the worker."""
        self.refused.pop(adapter, None)
        if adapter in self.adapters:
            self.adapters.discard(adapter)
            with contextlib.suppress(WorkerDiedError):
                await self.ask("detach", adapter=adapter)

    def begin(self, in_flight: InFlightCall, wire_id: str) -> None:
        """Send a call to the worker under this wire id."""
        if not self.has_work:
            self.heard_at = time.monotonic()
        in_flight.wire_id = wire_id
        self.calls[wire_id] = in_flight
        self.send({"op": "call", "call": {**in_flight.call.as_json(), "id": wire_id}})

    def rows_free(self, adapter: str) -> int:
        """Return the number of further calls of an adapter that the worker can take now."""
        if self.state != "ready" or self.is_isolated or (adapter != BASE and adapter not in self.adapters):
            return 0
        return self.about.rows - len(self.calls)

    def measure(self) -> None:
        """Measure the worker's memory. The system is asked first, since a worker that hangs does not report."""
        if self.pid and self.state != "gone":
            self.memory_bytes = resource_limits.resident_bytes(self.pid) or self.memory_bytes

    def kill(self, end: WorkerEnd, detail: str = "") -> None:
        """Kill the worker now. The cause is noted unless there is one already."""
        self._note_end(end, detail)
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self, timeout_s: float) -> None:
        """Ask the worker to end; kill it after `timeout_s`."""
        if self._process is not None and self.state != "starting":  # a worker reads no messages while its engine opens
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
    """Framed connection to a worker."""

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
        """Send a frame; it is dropped if the connection is lost, since the end of the worker is reported elsewhere."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    def close(self) -> None:
        """Abort the connection."""
        if self._transport is not None:
            self._transport.abort()


def environment() -> dict[str, str]:
    """Return the environment of a worker. OpenMP threads in it yield the processor while they wait for each other.

    By default they spin. When other processes need the processors (a starting worker, or a second one), spinning
    threads
    keep the thread that they wait for from running, and a step takes many times as long. The user's own settings
    hold. Nothing is set if OMP_WAIT_POLICY is, because GNU's spin count would override that policy.
    """
    return dict(os.environ) if "OMP_WAIT_POLICY" in os.environ else {**_PATIENT, **os.environ}


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if os.name == "posix" and os.path.exists("/proc") else os.cpu_count() or 1
