"""Runner of commands under memory, time and CPU limits.

A cgroup (v2 or v1) for the command bounds its memory, where this process may create one (root, or a delegated tree).
The limit also counts page cache, which the kernel reclaims before it kills. The effective bound is therefore on
anonymous and shared memory, and `peak_bytes` reports those. Under v1, a command that writes faster than its disk may
be killed for pages that are not on disk yet, since v1 does not throttle writers by group (cgroup-v1/memory.rst).
Calling `fdatasync` between writes avoids that.

Elsewhere RLIMIT_DATA applies to each process, and the sum over all processes of the command is sampled: above the
limit they are killed. It counts reserved private memory; a peak shorter than TREE_S may pass unseen.

Every limit holds for the command and all its descendants. The command leads a session of its own, and a cgroup where
one can be created, with or without a memory limit. `cgroup.kill` then ends all of its processes and `cpu.stat` counts
all of their time. Elsewhere /proc is scanned every TREE_S for processes of the session, for children of known ones and
for those that carry the command's mark in their environment, so that a double fork or `setsid` does not hide one.

Signals bound the time: SIGTERM, on which a tuning run saves its state, and SIGKILL after GRACE_S. What outlives the
command itself is killed at once. What even SIGKILL does not end is named in `ResourceUsage.not_ended`.

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
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

from sartor.core.errors import BudgetError, MissingError

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")
# Interval at which memory and clocks are read, s. The report may miss a peak in between; the kernel does not.
LOOK_S = 0.01
# Interval at which processes without a cgroup are searched for, s. A scan reads one line per process of the machine.
TREE_S = 0.1
GRACE_S = 20.0
# Seconds within which killed processes must have ended; the kernel needs longer only for one that waits for a device.
END_S = 5.0
# environment variable by which a descendant without a cgroup is recognised
MARK = "LIMITED_BY_SARTOR"
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
            raise BudgetError(
                f"a limit is below 0: {self}", "give 0, which is no limit, in place of the negative number"
            )
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
    cpu_s: processor time of the command and its descendants.
    exit_code: as `subprocess` returns it.
    killed: limit that ended the command early; empty if none did.
    not_ended: processes that outlived SIGKILL, and a cgroup that could not be removed; empty as a rule.
    """

    held_by: str
    limit_bytes: int
    peak_bytes: int
    wall_s: float
    cpu_s: float
    exit_code: int
    killed: Killed
    not_ended: list[str] = field(default_factory=list)


class Holder(Protocol):
    """Mechanism that limits memory.

    name: name of the mechanism for the receipt.
    folders: cgroups of the command, which hold all its processes.
    """

    name: str
    folders: list[Path]

    def shell(self, memory_bytes: int) -> str:
        """Return the shell commands to run before the command replaces /bin/sh."""
        ...

    def bytes_now(self) -> int | None:
        """Return the current anonymous and shared memory; None if the processes must be summed up."""
        ...

    def has_killed(self) -> bool:
        """Return whether the kernel killed a process for lack of memory."""
        ...

    def close(self) -> list[str]:
        """Release the mechanism; return what could not be released."""
        ...


class Cgroup:
    """A new cgroup for one command. Raises OSError if none can be created."""

    def __init__(self, parent: Path, memory_bytes: int, version: int) -> None:
        self.name = f"cgroup v{version}"
        self._folder = parent / f"sartor-{os.getpid()}-{secrets.token_hex(4)}"
        self.folders = [self._folder]
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

    def bytes_now(self) -> int | None:
        """Return the cgroup's current anonymous and shared memory."""
        fields = _table((self._folder / "memory.stat").read_text())
        return sum(fields.get(name, 0) for name in self._names)

    def has_killed(self) -> bool:
        """Return whether the kernel's OOM killer ended a process of the cgroup."""
        return _table((self._folder / self._events).read_text()).get("oom_kill", 0) > 0

    def close(self) -> list[str]:
        """Remove the cgroup; return it if it cannot be removed."""
        return _remove_cgroup(self._folder)


class DataLimit:
    """Limit by RLIMIT_DATA for each process; the sum over the processes is sampled."""

    name = "RLIMIT_DATA"

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def shell(self, memory_bytes: int) -> str:
        """Return the shell command that sets the limit."""
        return f"ulimit -d {memory_bytes >> 10} || exit 125; " if memory_bytes else ""

    def bytes_now(self) -> int | None:
        """Return None: no file of the kernel has the sum."""
        return None

    def has_killed(self) -> bool:
        """Return False: an allocation fails instead, and the command's exit code shows it."""
        return False

    def close(self) -> list[str]:
        """Return an empty list: there is nothing to release."""
        return []


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


def _remove_cgroup(folder: Path) -> list[str]:
    """Remove a cgroup, retrying while its last process is being released; return it if it cannot be removed."""
    for _ in range(100):  # the kernel releases the last process a moment after its end
        with suppress(FileNotFoundError):
            with suppress(OSError):
                folder.rmdir()
                return []
            folder.stat()
            time.sleep(LOOK_S)
            continue
        return []
    return [f"cgroup {folder}"]


def _counting_cgroup(cgroups: Path) -> Path | None:
    """Create a cgroup without limits that counts processor time and holds the processes; None if none can be."""
    for root, file_name in (
        *((folder, "cpu.stat") for folder in _v2_parents(cgroups)),
        (cgroups / "cpuacct", _V1_CPU),
    ):
        folder = root / f"sartor-{os.getpid()}-{secrets.token_hex(4)}"
        with suppress(OSError):
            if not (root / "cgroup.procs").exists():
                continue
            folder.mkdir()
            if (folder / file_name).exists() and (folder / "cgroup.procs").exists():
                return folder
            _remove_cgroup(folder)
    return None


def _v2_parents(cgroups: Path) -> Iterator[Path]:
    """Yield the folders of v2 in which a cgroup may be created: each root, and this process's own cgroup."""
    for root in (cgroups, cgroups / "unified"):
        if (root / "cgroup.controllers").exists():
            cgroup_path = next(
                (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")),
                "/",
            )
            yield from dict.fromkeys((root, root / cgroup_path.lstrip("/")))


def _delegated(cgroups: Path) -> Path:
    """Return the folder in which a v2 cgroup with a memory limit can be created.

    It is the root or this process's own cgroup. Raises OSError if neither works.
    """
    for folder in _v2_parents(cgroups):
        with suppress(OSError):
            if "memory" not in (folder / "cgroup.subtree_control").read_text().split():
                (folder / "cgroup.subtree_control").write_text("+memory")
            return folder
    raise FileNotFoundError("no cgroup v2 with a memory controller")


_V1_CPU = "cpuacct.usage"  # ns
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class _Stat:
    """Line of /proc/PID/stat. `cpu_s` is the process's own time, `reaped_s` that of children whose end it awaited."""

    pid: int
    parent: int
    session: int
    is_dead: bool
    started: int
    cpu_s: float
    reaped_s: float

    @property
    def key(self) -> tuple[int, int]:
        """Identity of the process: its number may be reused, with another start."""
        return self.pid, self.started


def _stat(pid: int) -> _Stat:
    """Return the line of a process (proc(5)). Raises OSError if it has ended."""
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    user, system, reaped_user, reaped_system = (int(field) / _TICKS for field in fields[11:15])
    return _Stat(
        pid=pid,
        parent=int(fields[1]),
        session=int(fields[3]),
        is_dead=fields[0] in "ZX",
        started=int(fields[19]),
        cpu_s=user + system,
        reaped_s=reaped_user + reaped_system,
    )


class ProcessTree:
    """All processes of a command: those of its cgroups, or else those that /proc shows as its descendants.

    mark: value of the environment variable MARK of the command.
    """

    def __init__(self, folders: Sequence[Path], mark: str) -> None:
        self._folders = list(folders)
        self._mark = f"{MARK}={mark}".encode()
        self._root = 0
        self._seen: dict[tuple[int, int], _Stat] = {}
        self._foreign: set[tuple[int, int]] = set()
        self._scanned_at = -1.0
        self._cpu_s = 0.0
        self._bytes = 0

    def start(self, pid: int) -> None:
        """Begin with the command's own process."""
        self._root = pid
        with suppress(OSError):
            stat = _stat(pid)
            self._seen[stat.key] = stat

    def look(self) -> None:
        """Update the processes and their time."""
        if self._is_counted:
            self._cpu_s = max(self._cpu_s, self._counted_s())
            return
        now = time.monotonic()
        if now - self._scanned_at >= TREE_S:
            self._scan()
            self._scanned_at = time.monotonic()
            self._bytes = self._summed_bytes()
        else:
            for stat in list(self._seen.values()):
                if not stat.is_dead:
                    self._update(stat)
        self._cpu_s = max(self._cpu_s, self._known_s())

    @property
    def cpu_s(self) -> float:
        """Processor time of all processes so far, s."""
        return self._cpu_s

    def bytes_now(self) -> int:
        """Return anonymous and shared memory of all processes; memory that they share counts once."""
        alive = self.alive()
        return (
            anonymous_bytes(alive[0]) if len(alive) == 1 else self._summed_bytes() if self._is_counted else self._bytes
        )

    def alive(self) -> list[int]:
        """Return the numbers of the processes that have not ended, as of the last look."""
        numbers = {stat.pid for stat in self._seen.values() if not stat.is_dead}
        for folder in self._folders:
            with suppress(OSError):
                numbers |= {int(number) for number in (folder / "cgroup.procs").read_text().split()}
        return sorted(number for number in numbers if self._lives(number))

    def send(self, signal_number: int) -> None:
        """Send a signal to every process; on a system without /proc, to the process group of the command."""
        if not (PROC / "self" / "stat").exists():
            with suppress(OSError):
                os.killpg(self._root, signal_number)
            return
        if signal_number == signal.SIGKILL:
            for folder in self._folders:
                with suppress(OSError):
                    if (folder / "cgroup.kill").exists():
                        (folder / "cgroup.kill").write_text("1")
        for number in self.alive():
            with suppress(OSError):
                os.kill(number, signal_number)

    def end(self) -> list[int]:
        """Kill every process and wait up to END_S; return those that have not ended."""
        deadline = time.monotonic() + END_S
        while True:
            if not self._is_counted:
                self._scan()
            self.send(signal.SIGKILL)
            alive = self.alive()
            if not alive or time.monotonic() > deadline:
                return alive
            time.sleep(LOOK_S)

    def _lives(self, number: int) -> bool:
        try:
            return not _stat(number).is_dead
        except OSError:
            return False

    @property
    def _is_counted(self) -> bool:
        """Whether a cgroup with a count of its processor time holds the processes."""
        return any((folder / name).exists() for folder in self._folders for name in ("cpu.stat", _V1_CPU))

    def _counted_s(self) -> float:
        seconds = 0.0
        for folder in self._folders:
            with suppress(OSError):
                seconds = max(seconds, _table((folder / "cpu.stat").read_text()).get("usage_usec", 0) / 1e6)
            with suppress(OSError, ValueError):
                seconds = max(seconds, int((folder / _V1_CPU).read_text()) / 1e9)
        return seconds

    def _known_s(self) -> float:
        """Return the time of the known processes, counted in two ways that both err to the low side; the larger one.

        A process that its parent awaited is in the parent's `reaped_s`; one that nobody of the tree awaited is not.
        """
        own = sum(stat.cpu_s for stat in self._seen.values())
        alive = [stat for stat in self._seen.values() if not stat.is_dead]
        by_parent = sum(stat.cpu_s + stat.reaped_s for stat in alive)
        root = next(iter(self._seen.values()), None)
        return max(own, by_parent, root.cpu_s + root.reaped_s if root else 0.0)

    def _update(self, stat: _Stat) -> None:
        try:
            fresh = _stat(stat.pid)
            if fresh.key != stat.key:
                raise ProcessLookupError
        except OSError:
            fresh = _Stat(**{**vars(stat), "is_dead": True})
        self._seen[stat.key] = fresh

    def _scan(self) -> None:
        """Find the descendants among all processes of the machine."""
        for stat in list(self._seen.values()):
            if not stat.is_dead:
                self._update(stat)
        fresh = []
        with suppress(OSError):
            for name in os.listdir(PROC):
                if name.isdigit():
                    with suppress(OSError, IndexError, ValueError):
                        stat = _stat(int(name))
                        if stat.key not in self._seen and stat.key not in self._foreign:
                            fresh.append(stat)
        fresh.sort(key=lambda stat: stat.started)  # parents before children, up to one tick
        for _ in range(2):
            for stat in fresh:
                if stat.key not in self._seen and self._is_ours(stat):
                    self._seen[stat.key] = stat
        self._foreign |= {stat.key for stat in fresh if stat.key not in self._seen}

    def _is_ours(self, stat: _Stat) -> bool:
        if stat.session == self._root or any(stat.parent == known.pid for known in self._seen.values()):
            return True
        with suppress(OSError):
            return self._mark in Path(f"/proc/{stat.pid}/environ").read_bytes().split(b"\0")
        return False

    def _summed_bytes(self) -> int:
        total = 0
        for number in self.alive():
            with suppress(OSError):
                try:
                    fields = _table(Path(f"/proc/{number}/smaps_rollup").read_text().replace(":", ""))
                    total += (fields["Pss_Anon"] + fields["Pss_Shmem"]) << 10
                except (OSError, KeyError):  # an older kernel has no such file or fields
                    total += anonymous_bytes(number)
        return total


@contextmanager
def _ending_signals() -> Iterator[None]:
    """Turn signals that would end this process at once into SystemExit, so that the command is ended first.

    The command leads a session of its own: what a terminal or a service manager sends to this process does not reach
    it. Handlers of the program stay as they are; only the main thread may set any.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signal_number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signal_number)

    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


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
    counting = None
    if not any((folder / "cpu.stat").exists() for folder in memory_holder.folders):
        counting = _counting_cgroup(cgroups)
    mark = secrets.token_hex(8)
    tree = ProcessTree([*memory_holder.folders, *([counting] if counting else [])], mark)
    start_time = time.monotonic()
    not_ended: list[str] = []
    try:
        # the cgroup that only counts is no condition: without it /proc is scanned
        join = f"echo $$ 2>/dev/null > '{counting}/cgroup.procs' || :; " if counting else ""
        script = f'{join}{memory_holder.shell(limits.memory_bytes)}exec "$@"'
        with (
            log.open("wb") if log else contextlib.nullcontext() as output,
            _ending_signals(),
            subprocess.Popen(
                ["/bin/sh", "-c", script, "sh", *command],
                env={**(os.environ if environment is None else environment), MARK: mark},
                stdin=stdin,
                stdout=output,
                stderr=output,
                start_new_session=True,
            ) as process,
        ):
            tree.start(process.pid)
            watch = _Watch(process, memory_holder, tree=tree, limits=limits, start_time=start_time, stop=stop)
            try:
                watch.wait_for_exit()
            finally:
                not_ended += [f"process {number}" for number in watch.end()]
        if process.returncode in (125, 126, 127):
            shell_error = log_tail(log)[-1:] if log else []
            raise MissingError(
                ": ".join([f"{command[0]} could not be started under {memory_holder.name}", *shell_error]),
                "look at the line above; run it by hand",
            )
        if memory_holder.has_killed():
            watch.killed = "memory"
    finally:
        not_ended += memory_holder.close()
        not_ended += _remove_cgroup(counting) if counting else []
    return ResourceUsage(
        held_by=memory_holder.name,
        limit_bytes=limits.memory_bytes,
        peak_bytes=watch.peak_bytes,
        wall_s=round(time.monotonic() - start_time, 3),
        cpu_s=round(tree.cpu_s, 3),
        exit_code=process.returncode,
        killed=watch.killed,
        not_ended=not_ended,
    )


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
    """Watcher of a command: samples its processes and ends them at a limit."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        memory_holder: Holder,
        tree: ProcessTree,
        limits: ResourceLimits,
        start_time: float,
        stop: Callable[[], bool],
    ) -> None:
        self._process = process
        self._memory_holder = memory_holder
        self._tree = tree
        self._limits = limits
        self._start_time = start_time
        self._stop = stop
        self.peak_bytes = 0
        self.killed: Killed = ""
        self._terminated_at = 0.0

    def wait_for_exit(self) -> None:
        """Sample the processes until the command itself has ended."""
        while self._process.poll() is None:
            with suppress(OSError, ProcessLookupError):  # it may end between two samples
                self._tree.look()
                counted = self._memory_holder.bytes_now()
                in_use = self._tree.bytes_now() if counted is None else counted
                self.peak_bytes = max(self.peak_bytes, in_use)
                # the kernel kills one process of a cgroup; a parent that waits for it would go on without it
                is_above = (
                    0 < self._limits.memory_bytes < in_use if counted is None else self._memory_holder.has_killed()
                )
                if is_above and self._process.poll() is None:
                    self.killed = "memory"
                    self.end()
            self._hold_time()
            time.sleep(LOOK_S)

    def end(self) -> list[int]:
        """Kill what is left of the command; return the processes that have not ended."""
        with suppress(OSError):
            self._tree.look()
        return [number for number in self._tree.end() if number != self._process.pid]

    def _hold_time(self) -> None:
        now = time.monotonic()
        if self.killed:
            if now - self._terminated_at > GRACE_S:
                self.end()
            return
        is_stopped = self._stop()
        if 0 < self._limits.wall_s < now - self._start_time:
            self.killed = "wall"
        elif 0 < self._limits.cpu_s < self._tree.cpu_s:
            self.killed = "cpu"
        elif is_stopped:
            self.killed = "stopped"
        if self.killed:
            self._terminated_at = now
            self._tree.send(signal.SIGTERM)


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
