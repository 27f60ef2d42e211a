"""Worker processes, parallel map, deferred termination signals.

`multiprocessing` is not used. Its spawned children import the caller's script again, which repeats the whole work in a
script without a `__main__` guard. Its forked children inherit locks of threads that they do not have (rensa's,
Arrow's).
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import Any, Self, TypeVar

from sartor.core.errors import BudgetError

T = TypeVar("T")
_CHILD = "import sys; sys.path[:] = {path!r}; from sartor.core.processes import serve; serve({number})"


class WorkerPool:
    """Pool of `count` worker processes that live until the block ends; 0 runs everything in this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._children: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        self._connections: list[Connection] = []

    def __enter__(self) -> Self:
        for _ in range(self.count):
            parent_end, child_end = socket.socketpair()
            with child_end:
                code = _CHILD.format(path=sys.path, number=child_end.fileno())
                # one thread each: the processes already use the cores
                environment = {**os.environ, "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
                self._children.append(
                    subprocess.Popen(
                        [sys.executable, "-c", code],
                        pass_fds=[child_end.fileno()],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                    )
                )
            connection = Connection(parent_end.detach())
            self._connections.append(connection)
            self._idle.put(connection)
        return self

    def __exit__(self, *exception: object) -> None:
        for connection in self._connections:
            connection.close()
        for child in self._children:
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def spread(self, function: Callable[..., T], items: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """Yield `function(*item)` for every item, in order; a few more than `count` are in work at a time."""
        if not self.count:
            yield from (function(*item) for item in items)
            return
        waiting: deque[Future[T]] = deque()
        with ThreadPoolExecutor(self.count) as threads:
            try:
                for item in items:
                    waiting.append(threads.submit(self._call, function, item))
                    if len(waiting) > self.count + 2:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def _call(self, function: Callable[..., T], item: tuple[Any, ...]) -> T:
        connection = self._idle.get()
        try:
            connection.send((function, item))
            failed, value = connection.recv()
        except (EOFError, OSError):
            raise BudgetError(
                "a worker process ended before its work was done, as the system does when memory runs out",
                "use one process: --workers 1 of sartor curate, --processes 1 of sartor dedup; or give smaller files",
            ) from None
        finally:
            self._idle.put(connection)
        if failed:
            raise value
        return value  # type: ignore[no-any-return]


def serve(descriptor: int) -> None:
    """Run a worker's loop on an inherited socket.

    It receives (function, arguments) and sends (failed, result or error).
    """
    gc.set_threshold(100_000)  # rows create millions of lists but no reference cycles
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    connection = Connection(descriptor)
    while True:
        try:
            function, item = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = (False, function(*item))
        except Exception as error:  # any error is raised in the caller's process
            answer = (True, error)
        try:
            connection.send(answer)
        except OSError:
            return


def _silent(stage: str, done: int, of: int) -> None:
    pass


def serial(function: Callable[..., T], items: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """Yield `function(*item)` for every item, in order, in this process."""
    return (function(*item) for item in items)


@dataclass(frozen=True)
class ProcessId:
    """A process of this machine: its number, and its start, since numbers are reused.

    started: boot id and start time in clock ticks since the boot (proc(5)); empty where /proc does not tell.
    """

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Return the identity of a running process. Raises ProcessLookupError if there is none."""
        os.kill(pid, 0)
        return cls(pid, _start_of(pid))

    @property
    def is_alive(self) -> bool:
        """Whether this very process runs; one that has ended and was not awaited does not."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's process has the number
            return False
        return _start_of(self.pid) == self.started


def _start_of(pid: int) -> str:
    """Return the boot id and start time of a process; "ended" for one that has ended, "" without /proc."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        boot_id = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "ended" if _PROC.is_dir() else ""
    return "ended" if fields[0] in "ZX" else f"{boot_id}:{fields[19]}"


_PROC = Path("/proc")


@dataclass(frozen=True)
class Executor:
    """Callbacks for progress and parallel work.

    show: receives progress as (stage, done, total).
    spread: calls a module-level function on items, in order.
    """

    show: Callable[[str, int, int], None] = _silent
    spread: Callable[..., Iterator[Any]] = serial


ALONE = Executor()


class DeferredSignals:
    """Context manager that records SIGINT or SIGTERM instead of ending the process.

    received: the signal that came, or None.
    notice: receives a line when a signal comes.

    The first signal restores the previous handlers, so a second one has its usual effect (Ctrl-C: ends at once). A
    signal that the process ignores (`nohup`) stays ignored. Outside the main thread nothing is done, since Python
    allows handlers only there.
    """

    def __init__(self, notice: Callable[[str], object] = lambda line: None) -> None:
        self.received: signal.Signals | None = None
        self._notice = notice
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> DeferredSignals:
        if threading.current_thread() is threading.main_thread():
            for signal_number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(signal_number)
                if handler is not None and handler != signal.SIG_IGN:
                    self._previous[signal_number] = signal.signal(signal_number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _receive(self, signal_number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(signal_number)
        self.__exit__()
        # the handler may interrupt a write to the same stream, which then refuses a second write
        with contextlib.suppress(RuntimeError):
            self._notice(
                f"{self.received.name}: the update in work is finished and saved; the same again ends at once"
            )
