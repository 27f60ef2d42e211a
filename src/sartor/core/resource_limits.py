"""Runs commands under memory, time and CPU limits.

Memory is held by a cgroup of the command's own (v2 or v1), where this process may make one (root, or a delegated
tree). Its limit counts page cache too, which the kernel takes back before it kills: so what is bounded is anonymous
and shared memory, and that is what `peak_bytes` says. Under v1 a command that writes faster than its disk takes may be
killed for pages that are
not on disk yet: v1 slows no writer down for its own group (cgroup-v1/memory.rst); `fdatasync` between writes does.

Elsewhere RLIMIT_DATA holds, which is weaker: it counts what is reserved of private memory, and neither shared memory
nor what children take together. Time is held by signals: SIGTERM, at which a tuning saves what it has, and SIGKILL
after GRACE_S.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from sartor.core.errors import BudgetError, MissingError

CGROUPS = Path("/sys/fs/cgroup")
# How often memory and clocks are read. A peak between two looks is missed by the report, never by the kernel.
LOOK_S = 0.01
GRACE_S = 20.0
# a smaller process than a Python that has imported torch
LEAST_BYTES = 64 << 20
Killed = Literal["", "memory", "wall", "cpu", "stopped"]


@dataclass(frozen=True)
class ResourceLimits:
    """0 is no limit. memory_bytes: anonymous and shared memory. wall_s, cpu_s: of the whole command."""

    memory_bytes: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __post_init__(self) -> None:
        if min(self.memory_bytes, self.wall_s, self.cpu_s) < 0:
            raise BudgetError(f"a limit is below 0: {self}", "0 is no limit: --memory-bytes 0 --wall-s 0 --cpu-s 0")
        if 0 < self.memory_bytes < LEAST_BYTES:
            raise BudgetError(
                f"{self.memory_bytes:,} bytes of memory hold no Python with torch",
                f"at least {LEAST_BYTES >> 20} MB, rather 300",
            )


@dataclass(frozen=True)
class ResourceUsage:
    """What a command used. held_by: what held its memory. killed: by which limit it ended before its time.

    peak_bytes: most anonymous and shared memory at a look, without page cache. exit_code: as `subprocess` says it.
    """

    held_by: str
    limit_bytes: int
    peak_bytes: int
    wall_s: float
    cpu_s: float
    exit_code: int
    killed: Killed


class Holder(Protocol):
    """Something of the system that holds memory. name: as the receipt says it."""

    name: str

    def shell(self, memory_bytes: int) -> str:
        """What /bin/sh does before the command takes its place."""
        ...

    def bytes_now(self, pid: int) -> int:
        """Anonymous and shared memory now."""
        ...

    def has_killed(self) -> bool:
        """Whether the kernel has killed for want of memory."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


class Cgroup:
    """A cgroup of its own. Raises OSError where none can be made."""

    def __init__(self, parent: Path, memory_bytes: int, version: int) -> None:
        self.name = f"cgroup v{version}"
        self._folder = parent / f"sartor-{os.getpid()}-{secrets.token_hex(4)}"
        self._names = ("anon", "shmem") if version == 2 else ("rss", "shmem")
        self._events = "memory.events" if version == 2 else "memory.oom_control"
        self._folder.mkdir()
        try:
            self._set("memory.max" if version == 2 else "memory.limit_in_bytes", memory_bytes)
            for file_name, limit in (
                ("memory.swap.max", 0),
                ("memory.memsw.limit_in_bytes", memory_bytes),
                ("memory.swappiness", 0),
            ):
                with suppress(OSError):  # a kernel without swap accounting has no such file
                    self._set(file_name, limit)
            (self._folder / "memory.stat").read_text()
        except OSError:
            self.close()
            raise

    def _set(self, name: str, value: int) -> None:
        if not (self._folder / name).exists():
            raise FileNotFoundError(name)
        (self._folder / name).write_text(str(value))

    def shell(self, memory_bytes: int) -> str:
        """See Holder."""
        return f"echo $$ > '{self._folder}/cgroup.procs' || exit 125; "

    def bytes_now(self, pid: int) -> int:
        """See Holder."""
        fields = _table((self._folder / "memory.stat").read_text())
        return sum(fields.get(name, 0) for name in self._names)

    def has_killed(self) -> bool:
        """See Holder."""
        return _table((self._folder / self._events).read_text()).get("oom_kill", 0) > 0

    def close(self) -> None:
        """See Holder."""
        for _ in range(100):  # the kernel lets go of the last process a moment after it has ended
            with suppress(OSError):
                self._folder.rmdir()
                return
            time.sleep(LOOK_S)


class DataLimit:
    """RLIMIT_DATA. Only its reports know anonymous memory; what it holds is what is reserved."""

    name = "RLIMIT_DATA"

    def shell(self, memory_bytes: int) -> str:
        """See Holder."""
        return f"ulimit -d {memory_bytes >> 10} || exit 125; " if memory_bytes else ""

    def bytes_now(self, pid: int) -> int:
        """See Holder."""
        fields = _table(Path(f"/proc/{pid}/status").read_text().replace(":", ""))
        return (fields.get("RssAnon", 0) + fields.get("RssShmem", 0)) << 10

    def has_killed(self) -> bool:
        """See Holder: an allocation fails instead, which the command says by its exit code."""
        return False

    def close(self) -> None:
        """See Holder."""


class NoLimit(DataLimit):
    """Nothing is held; its memory is reported all the same."""

    name = "nothing"


def holder(memory_bytes: int, cgroups: Path = CGROUPS) -> Holder:
    """The strongest that this process may use."""
    if not memory_bytes:
        return NoLimit()
    with suppress(OSError):
        return Cgroup(_delegated(cgroups), memory_bytes, 2)
    with suppress(OSError):
        return Cgroup(cgroups / "memory", memory_bytes, 1)
    return DataLimit()


def _delegated(cgroups: Path) -> Path:
    """Where a v2 cgroup with a memory limit can be made: the root, or this process's own. Raises OSError for
    neither.
    """
    roots = [root for root in (cgroups, cgroups / "unified") if (root / "cgroup.controllers").exists()]
    for root in roots:
        cgroup_path = next(
            (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/"
        )
        for folder in (root, root / cgroup_path.lstrip("/")):
            with suppress(OSError):
                if "memory" not in (folder / "cgroup.subtree_control").read_text().split():
                    (folder / "cgroup.subtree_control").write_text("+memory")
                return folder
    raise FileNotFoundError("no cgroup v2 with a memory controller")


def run(
    command: Sequence[str],
    limits: ResourceLimits,
    *,
    cgroups: Path = CGROUPS,
    environment: Mapping[str, str] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> ResourceUsage:
    """Run a command under limits, and wait for its end. stop: asked now and then; true ends it as a time limit does.

    Raises MissingError where the system's own shell cannot start the command.
    """
    memory_holder = holder(limits.memory_bytes, cgroups)
    start_time = time.monotonic()
    try:
        script = f'{memory_holder.shell(limits.memory_bytes)}exec "$@"'
        process = subprocess.Popen(["/bin/sh", "-c", script, "sh", *command], env=environment)
        with process:
            watch = _Watch(process, memory_holder, limits, start_time, stop)
            try:
                watch.wait_for_exit()
            finally:
                if process.poll() is None:
                    process.kill()
        if process.returncode in (125, 126, 127):
            raise MissingError(
                f"{command[0]} could not be started under {memory_holder.name}",
                "look at the line above; run it by hand",
            )
        if memory_holder.has_killed():
            watch.killed = "memory"
        return ResourceUsage(
            memory_holder.name,
            limits.memory_bytes,
            watch.peak_bytes,
            round(time.monotonic() - start_time, 3),
            round(watch.cpu_s, 3),
            process.returncode,
            watch.killed,
        )
    finally:
        memory_holder.close()


class _Watch:
    """Looks at a process until it ends, and ends it where a clock says so."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        memory_holder: Holder,
        limits: ResourceLimits,
        start_time: float,
        stop: Callable[[], bool],
    ) -> None:
        self._process, self._memory_holder, self._limits, self._start_time, self._stop = (
            process,
            memory_holder,
            limits,
            start_time,
            stop,
        )
        self.peak_bytes, self.cpu_s = 0, 0.0
        self.killed: Killed = ""
        self._terminated_at = 0.0

    def wait_for_exit(self) -> None:
        """Returns when the process has ended."""
        while self._process.poll() is None:
            with suppress(OSError, ProcessLookupError):  # it may end between two looks
                self.peak_bytes = max(self.peak_bytes, self._memory_holder.bytes_now(self._process.pid))
                self.cpu_s = max(self.cpu_s, _cpu_s(self._process.pid))
            self._hold_time()
            time.sleep(LOOK_S)

    def _hold_time(self) -> None:
        now = time.monotonic()
        if self.killed:
            if now - self._terminated_at > GRACE_S:
                self._process.kill()
            return
        exceeded: list[tuple[Killed, bool]] = [
            ("wall", 0 < self._limits.wall_s < now - self._start_time),
            ("cpu", 0 < self._limits.cpu_s < self.cpu_s),
        ]
        self.killed = next((name for name, is_over in exceeded if is_over), "stopped" if self._stop() else "")
        if self.killed:
            self._terminated_at = now
            self._process.send_signal(signal.SIGTERM)


def _cpu_s(pid: int) -> float:
    """Processor time of a process and its ended children, in seconds (proc(5), fields 14 to 17 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _table(text: str) -> dict[str, int]:
    """`name number` lines of a file of the kernel."""
    pairs = (line.split()[:2] for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


_PR_SET_PDEATHSIG = 1
# of 1000: the kernel's out-of-memory killer takes a worker before the front, and before most else of the user's
_OOM_SCORE = 800
_PAGE_BYTES = resource.getpagesize()


def end_with_parent() -> None:
    """SIGKILL when the parent dies (Linux; elsewhere the end of the connection tells, between two steps).

    The signals by which a terminal or a service manager ends a whole group are the front's to hear: it drains, and the
    worker goes on until it is told.
    """
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_first() -> None:
    """When the machine's memory ends, the kernel is to end this process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE), encoding="ascii")


def limit_data(limit_bytes: int) -> None:
    """Allocations beyond fail (Linux counts private writable memory) instead of pushing the machine to its end."""
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def resident_bytes(pid: int | None = None) -> int:
    """Resident memory of a process, by default this one; 0 where the system does not say, or the process is gone.

    Where there is no /proc, of this process its peak.
    """
    try:
        pages = int(Path(f"/proc/{pid or 'self'}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        if pid not in (None, os.getpid()) or sys.platform == "linux":
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * _PAGE_BYTES
