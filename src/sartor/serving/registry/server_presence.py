"""Running servers of a team, and the changes that they have loaded.

    STATE/servers/<pid>-<random>.json    {"pid", "generation"}      the same .lock    held as long as the server runs

The lock shows that a server runs: the system releases it when the process ends, for whatever reason.
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
from sartor.core.filesystem import PRIVATE, write_file_atomic

FOLDER = "servers"
_POLL_S = 0.1


class ServerPresence:
    """Presence file of this server. Call `close` at its end.

    generation: the last one written.
    """

    def __init__(self, state: Path) -> None:
        self._file = state / FOLDER / f"{os.getpid()}-{secrets.token_hex(4)}.json"
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # held by the process: any thread may acquire and release it
        self._lock = FileLock(self._file.with_suffix(".lock"), thread_local=False)
        self._lock.acquire(timeout=0)
        self.generation = -1
        self.write_generation(-1)

    def write_generation(self, generation: int) -> None:
        """Store the generation up to which this server has unloaded everything that was removed.

        If the disk fails, the file keeps the older number.
        """
        self.generation = generation
        if not self._file.parent.is_dir():  # a state directory that was removed is not created again
            return
        with suppress(OSError):
            # not durable: after a power cut no server runs, and the number no longer matters
            content = records.canonical({"pid": os.getpid(), "generation": generation})
            write_file_atomic(self._file, content, mode=PRIVATE, durable=False)

    def close(self) -> None:
        """Remove the file and release the lock."""
        self._file.unlink(missing_ok=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def running(state: Path) -> Mapping[int, int]:
    """Return the generation of each running server of this state directory, by process id.

    Files of dead servers are removed.
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
    """Wait up to `within_s` seconds until all servers have loaded a change.

    Returns (process ids of servers that have, those that have not).
    """
    deadline = clock() + within_s
    while True:
        generations = running(state)
        late = [pid for pid, reported in generations.items() if reported < generation]
        if not late or clock() >= deadline:
            return [pid for pid in generations if pid not in late], late
        time.sleep(_POLL_S)
