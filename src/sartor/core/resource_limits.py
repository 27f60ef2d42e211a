"""Runner of commands under memory, time and CPU limits.

A cgroup (v2 or v1) for the command bounds its memory, where this process may create one (root, or a delegated tree).
The limit also counts page cache, which the kernel reclaims before it kills. The effective bound is therefore on
anonymous and shared memory, and `peak_bytes` reports those. Under v1, a command that writes faster than its disk may
be killed for pages that are not on disk yet, since v1 does not throttle writers by group (cgroup-v1/memory.rst).
Calling `fdatasync` between writes avoids that.

Elsewhere RLIMIT_DATA applies. It is weaker: it counts reserved private memory per process, and neither shared memory
nor the sum over children. Signals bound the time: SIGTERM, on which a tuning run saves its state, and SIGKILL after
GRACE_S.

`run_job` runs a module of Sartor this way, as `python -m MODULE JOB RESULT`. The process reads the JSON file JOB and
writes the JSON file RESULT.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from sartor.core.errors import BudgetError, MissingError

CGROUPS = Path("/sys/fs/cgroup")
# Interval at which memory and clocks are read, s. The report may miss a peak in between; the kernel does not.
LOOK_S = 0.01
GRACE_S = 20.0
LOG_LINES = 3
# less memory than a Python process needs that has imported torch
LEAST_BYTES = 64 << 20
Killed = Literal["", "memory", "wall", "cpu", "stopped"]


@dataclass(frozen=True)
class ResourceLimits:
    """Limits of a command; 0 is no limit.

    memory_bytes: anonymous and shared memory.
    wall_s, cpu_s: time of the whole command.
    Raises BudgetError for a negative limit, or for less memory than LEAST_BYTES.
    """

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
    """Resources that a command used.

    held_by: mechanism that limited its memory.
    peak_bytes: largest sample of anonymous and shared memory, without page cache.
    exit_code: as `subprocess` returns it.
    killed: limit that ended the command early; empty if none did.
    """

    held_by: str
    limit_bytes: int
    peak_bytes: int
    wall_s: float
    cpu_s: float
    exit_code: int
    killed: Killed


class Holder(Protocol):
    """Mechanism that limits memory.

    name: name of the mechanism for the receipt.
    """

    name: str

    def shell(self, memory_bytes: int) -> str:
        """Return the shell commands to run before the command replaces /bin/sh."""
        ...

    def bytes_now(self, pid: int) -> int:
        """Return the current anonymous and shared memory."""
        ...

    def has_killed(self) -> bool:
        """Return whether the kernel killed a process for lack of memory."""
        ...

    def close(self) -> None:
        """Release the mechanism."""
        ...


class Cgroup:
    """A new cgroup for one command. Raises OSError if none can be created."""

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
        """Return the shell command that moves the shell into the cgroup."""
        return f"echo $$ > '{self._folder}/cgroup.procs' || exit 125; "

    def bytes_now(self, pid: int) -> int:
        """Return the cgroup's current anonymous and shared memory."""
        fields = _table((self._folder / "memory.stat").read_text())
        return sum(fields.get(name, 0) for name in self._names)

    def has_killed(self) -> bool:
        """Return whether the kernel's OOM killer ended a process of the cgroup."""
        return _table((self._folder / self._events).read_text()).get("oom_kill", 0) > 0

    def close(self) -> None:
        """Remove the cgroup; retry while its last process is being released."""
        for _ in range(100):  # the kernel releases the last process a moment after its end
            with suppress(OSError):
                self._folder.rmdir()
                return
            time.sleep(LOOK_S)


class DataLimit:
    """Limit by RLIMIT_DATA.

    It bounds reserved private memory; its reports state anonymous and shared memory.
    """

    name = "RLIMIT_DATA"

    def shell(self, memory_bytes: int) -> str:
        """Return the shell command that sets the limit."""
        return f"ulimit -d {memory_bytes >> 10} || exit 125; " if memory_bytes else ""

    def bytes_now(self, pid: int) -> int:
        """Return the process's current anonymous and shared memory."""
        return anonymous_bytes(pid)

    def has_killed(self) -> bool:
        """Return False: an allocation fails instead, and the command's exit code shows it."""
        return False

    def close(self) -> None:
        """Do nothing."""


class NoLimit(DataLimit):
    """No memory limit; memory is still reported."""

    name = "nothing"


def holder(memory_bytes: int, cgroups: Path = CGROUPS) -> Holder:
    """Return the strongest mechanism that this process may use."""
    if not memory_bytes:
        return NoLimit()
    with suppress(OSError):
        return Cgroup(_delegated(cgroups), memory_bytes, 2)
    with suppress(OSError):
        return Cgroup(cgroups / "memory", memory_bytes, 1)
    return DataLimit()


def _delegated(cgroups: Path) -> Path:
    """Return the folder in which a v2 cgroup with a memory limit can be created.

    It is the root or this process's own cgroup. Raises OSError if neither works.
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
    stdin: int | None = None,
    log: Path | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> ResourceUsage:
    """Run a command under limits and wait for its end.

    stdin: as of `subprocess.Popen`.
    log: file for stdout and stderr; None for those of this process.
    stop: polled every LOOK_S; a true result ends the command as a time limit does.
    Raises MissingError if the system's shell cannot start the command.
    """
    memory_holder = holder(limits.memory_bytes, cgroups)
    start_time = time.monotonic()
    try:
        script = f'{memory_holder.shell(limits.memory_bytes)}exec "$@"'
        with (
            log.open("wb") if log else contextlib.nullcontext() as output,
            subprocess.Popen(
                ["/bin/sh", "-c", script, "sh", *command], env=environment, stdin=stdin, stdout=output, stderr=output
            ) as process,
        ):
            watch = _Watch(process, memory_holder, limits=limits, start_time=start_time, stop=stop)
            try:
                watch.wait_for_exit()
            finally:
                if process.poll() is None:
                    process.kill()
        if process.returncode in (125, 126, 127):
            shell_error = log_tail(log)[-1:] if log else []
            raise MissingError(
                ": ".join([f"{command[0]} could not be started under {memory_holder.name}", *shell_error]),
                "look at the line above; run it by hand",
            )
        if memory_holder.has_killed():
            watch.killed = "memory"
        return ResourceUsage(
            held_by=memory_holder.name,
            limit_bytes=limits.memory_bytes,
            peak_bytes=watch.peak_bytes,
            wall_s=round(time.monotonic() - start_time, 3),
            cpu_s=round(watch.cpu_s, 3),
            exit_code=process.returncode,
            killed=watch.killed,
        )
    finally:
        memory_holder.close()


@dataclass(frozen=True)
class JobResult:
    """Result of a job's process.

    payload: JSON object that the process wrote; None if it wrote none, or not the whole.
    log_tail: last lines of its stdout and stderr.
    """

    payload: dict[str, Any] | None
    usage: ResourceUsage
    log_tail: list[str]


def run_job(
    module: str, job: Mapping[str, Any], limits: ResourceLimits, *, stop: Callable[[], bool] = lambda: False
) -> JobResult:
    """Run `python -m MODULE JOB RESULT` under limits, with both files in a temporary folder.

    Its stdin ends when this process does, so that it can end too.
    stop: as of `run`.
    Raises MissingError if the system's shell cannot start Python.
    """
    with tempfile.TemporaryDirectory(prefix="sartor-job-") as folder:
        job_file, result_file, log = (Path(folder) / name for name in ("job.json", "result.json", "log"))
        job_file.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", module, str(job_file), str(result_file)]
        usage = run(command, limits, stdin=subprocess.PIPE, log=log, stop=stop)
        payload = None
        with suppress(FileNotFoundError, ValueError):  # the process may end before or while it writes
            payload = json.loads(result_file.read_text(encoding="utf-8"))
        return JobResult(payload, usage, log_tail(log))


def log_tail(log: Path) -> list[str]:
    """Return the last LOG_LINES lines of a log; none if there is no such file."""
    if not log.is_file():
        return []
    return log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LOG_LINES:]


class _Watch:
    """Watcher of a process: samples its memory and ends it at a time limit."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        memory_holder: Holder,
        limits: ResourceLimits,
        start_time: float,
        stop: Callable[[], bool],
    ) -> None:
        self._process = process
        self._memory_holder = memory_holder
        self._limits = limits
        self._start_time = start_time
        self._stop = stop
        self.peak_bytes, self.cpu_s = 0, 0.0
        self.killed: Killed = ""
        self._terminated_at = 0.0

    def wait_for_exit(self) -> None:
        """Sample the process until it has ended."""
        while self._process.poll() is None:
            with suppress(OSError, ProcessLookupError):  # it may end between two samples
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
        is_stopped = self._stop()
        if 0 < self._limits.wall_s < now - self._start_time:
            self.killed = "wall"
        elif 0 < self._limits.cpu_s < self.cpu_s:
            self.killed = "cpu"
        elif is_stopped:
            self.killed = "stopped"
        if self.killed:
            self._terminated_at = now
            self._process.send_signal(signal.SIGTERM)


def _cpu_s(pid: int) -> float:
    """Return the CPU time of a process and its ended children, s (proc(5), stat fields 14 to 17)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _table(text: str) -> dict[str, int]:
    """Parse `name number` lines of a kernel file."""
    pairs = (line.split()[:2] for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


_PR_SET_PDEATHSIG = 1
# out of 1000: the kernel's out-of-memory killer ends a worker before the server, and before most other processes
_OOM_SCORE = 800
_PAGE_BYTES = resource.getpagesize()


def end_with_parent() -> None:
    """Make the kernel send SIGKILL to this process when its parent dies (Linux only).

    On other systems the worker notices the closed connection between two steps. The signals with which a terminal or a
    service manager ends a whole process group are ignored here: the server handles them and drains, and the worker
    continues until the server tells it to stop.
    """
    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signal_number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_first() -> None:
    """Make the kernel's out-of-memory killer prefer this process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE), encoding="ascii")


def limit_data(limit_bytes: int) -> None:
    """Limit private writable memory (RLIMIT_DATA), so that allocations fail first.

    Without it, a large allocation could exhaust the machine's memory.
    """
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def anonymous_bytes(pid: int) -> int:
    """Return the current anonymous and shared memory of a process. Raises OSError if it has ended."""
    fields = _table(Path(f"/proc/{pid}/status").read_text().replace(":", ""))
    return (fields.get("RssAnon", 0) + fields.get("RssShmem", 0)) << 10


def resident_bytes(pid: int | None = None) -> int:
    """Return the resident memory of a process, by default this one; 0 if it is unknown.

    Without /proc it is the peak of this process.
    """
    try:
        pages = int(Path(f"/proc/{pid or 'self'}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        if pid not in (None, os.getpid()) or sys.platform == "linux":
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * _PAGE_BYTES
