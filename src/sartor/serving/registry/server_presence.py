"""Which servers run and what they have reloaded.

    STATE/servers/<pid>-<random>.json    {"pid", "generation"}      the same .lock    held as long as the server runs

By the lock a server is known to run: it goes with the process, whatever its end.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sartor.core import records
from sartor.core.filesystem import write_file_atomic

FOLDER = "servers"
_POLL_S = 0.1


class ServerPresence:
    """A server's own; generation: what it has said last. `close` at its end."""

    def __init__(self, state: Path) -> None:
        self._file = state / FOLDER / f"{os.getpid()}-{secrets.token_hex(4)}.json"
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # held for the process, whichever thread takes it and lets it go
        self._lock = FileLock(self._file.with_suffix(".lock"), thread_local=False)
        self._lock.acquire(timeout=0)
        self.generation = -1
        self.write_generation(-1)

    def write_generation(self, generation: int) -> None:
        """Nothing is held any more that was removed up to this change. A disk that takes nothing delays the news."""
        self.generation = generation
        if not self._file.parent.is_dir():  # a state directory that was removed is not begun anew
            return
        with suppress(OSError):
            # not durable: after a power cut no server runs, and what it heard last is nobody's concern
            content = records.canonical({"pid": os.getpid(), "generation": generation})
            write_file_atomic(self._file, content, durable=False)

    def close(self) -> None:
        """The server ends."""
        self._file.unlink(missing_ok=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def running(state: Path) -> Mapping[int, int]:
    """By process id, the generation that each server of this state directory has heard. What dead ones left is
    removed.
    """
    generations: dict[int, int] = {}
    for file in sorted((state / FOLDER).glob("*.json")):
        lock = FileLock(file.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with suppress(OSError, ValueError, KeyError):
                fields = json.loads(file.read_bytes())
                pid, generation = int(fields["pid"]), int(fields["generation"])
                generations[pid] = min(generation, generations.get(pid, generation))
            continue
        file.unlink(missing_ok=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
    return generations


def wait_for(
    state: Path, generation: int, within_s: float, clock: Callable[[], float] = time.monotonic
) -> tuple[list[int], list[int]]:
    """(servers that have heard of this change, servers that have not within that time)."""
    deadline = clock() + within_s
    while True:
        generations = running(state)
        late = [pid for pid, reported in generations.items() if reported < generation]
        if not late or clock() >= deadline:
            return [pid for pid in generations if pid not in late], late
        time.sleep(_POLL_S)
