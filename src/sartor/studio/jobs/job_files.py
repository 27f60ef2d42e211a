"""Journal of a job on disk, and the state that follows from it.

    jobs/ID/job.json         what was asked: command line, who, when, whether it waits for other heavy jobs
    jobs/ID/runner.json      process that waits for its turn and then for the command's end (job_runner.py)
    jobs/ID/process.json     process of the command, written by itself before it runs
    jobs/ID/output.txt       stdout: the command's JSON on its last line
    jobs/ID/log.txt          stderr: its notices
    jobs/ID/progress.jsonl   its progress (core/progress.py)
    jobs/ID/stop.json        a person asked it to stop
    jobs/ID/end.json         exit code, or the signal that ended it
    jobs/heavy.lock          held by the command of the heavy job that runs

Nothing here is kept in memory: the state is read from these files and from the processes that they name, so it is the
same for every studio on the folder and after any kill. A process is named with its start time, since numbers are
reused.
"""

from __future__ import annotations

import json
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from sartor.core.errors import ConfigError
from sartor.core.filesystem import PRIVATE, make_private_folder, write_file_atomic
from sartor.core.processes import ProcessId

JOB, RUNNER, PROCESS, STOP, END = "job.json", "runner.json", "process.json", "stop.json", "end.json"
OUTPUT, LOG, PROGRESS = "output.txt", "log.txt", "progress.jsonl"
HEAVY_LOCK = "heavy.lock"
# bytes read of the end of a log or an output
TAIL_BYTES = 1 << 20


class JobState(Enum):
    """State of a job. LOST: its process is gone and nobody saw how it ended, as after a power cut."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"
    LOST = "lost"

    @property
    def is_over(self) -> bool:
        """Whether the job has ended."""
        return self not in (JobState.WAITING, JobState.RUNNING)


@dataclass(frozen=True)
class Job:
    """What was asked of a job.

    verb: command, such as "tailor".
    program: what is executed before the arguments: this Python and `-m sartor`.
    arguments: of `sartor`, beginning with the verb.
    out: absolute path of the command's output; empty if it has none.
    adapter: absolute path at which it tunes an Adapter; empty if it does not.
    is_heavy: whether it waits until no other heavy job runs.
    by: name of the user who started it.
    created_at: Unix time, s.
    """

    id: str
    verb: str
    arguments: tuple[str, ...]
    cwd: str
    title: str
    by: str
    created_at: float
    program: tuple[str, ...] = ()
    out: str = ""
    adapter: str = ""
    is_heavy: bool = True


@dataclass(frozen=True)
class JobStatus:
    """A job as it stands.

    exit_code: of the command; None while it runs and if nobody saw it.
    signal: number of the signal that ended it; 0 for none.
    result: JSON that the command printed, an object with `error` for a failure; empty without one.
    ended_at: Unix time, s; 0 while it runs.
    is_stopping: whether a person asked it to stop.
    """

    job: Job
    state: JobState
    exit_code: int | None = None
    signal: int = 0
    result: Mapping[str, Any] = field(default_factory=dict)
    started_at: float = 0.0
    ended_at: float = 0.0
    is_stopping: bool = False


class JobFiles:
    """The folder `jobs/` of a studio."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_private_folder(folder)

    def create(self, job: Job) -> Path:
        """Write a new job's folder and return it."""
        folder = self.folder / job.id
        make_private_folder(folder)
        write_json(folder / JOB, asdict(job))
        return folder

    def ids(self) -> list[str]:
        """Return the ids of all jobs, newest first."""
        return sorted((path.parent.name for path in self.folder.glob(f"*/{JOB}")), reverse=True)

    def job(self, job_id: str) -> Job:
        """Return what was asked of a job. Raises ConfigError for an unknown id."""
        fields = read_json(self.path(job_id) / JOB)
        try:
            lists = {name: tuple(fields[name]) for name in ("arguments", "program")}
            return Job(**{**fields, **lists})
        except (KeyError, TypeError):
            raise ConfigError(f"job {job_id[:40]!a} cannot be read", "the other jobs are not affected") from None

    def path(self, job_id: str) -> Path:
        """Return the folder of a job. Raises ConfigError for an unknown id."""
        if not _is_id(job_id) or not (self.folder / job_id / JOB).is_file():
            raise ConfigError(f"there is no job {job_id[:40]!a}", "the page Jobs lists all of them")
        return self.folder / job_id

    def status(self, job_id: str) -> JobStatus:
        """Return a job as it stands."""
        job, folder = self.job(job_id), self.path(job_id)
        is_stopping = (folder / STOP).is_file()
        process = read_json(folder / PROCESS)
        is_alive = bool(process) and _is_running(process)
        runner = read_json(folder / RUNNER)
        is_awaited = _is_running(runner) if runner else time.time() - job.created_at < _START_S
        # read last: the runner writes it after the process has ended, and before it ends itself
        end = read_json(folder / END)
        started_at = float(process.get("at", 0.0))
        common: dict[str, Any] = {"job": job, "started_at": started_at, "is_stopping": is_stopping}
        if end:
            exit_code, number = end.get("exit_code"), int(end.get("signal", 0))
            state = _state_of_end(exit_code, number, is_stopping)
            result = self.result(job_id)
            return JobStatus(
                state=state, exit_code=exit_code, signal=number, result=result, ended_at=end["at"], **common
            )
        if is_alive or is_awaited:
            return JobStatus(state=JobState.RUNNING if process else JobState.WAITING, **common)
        # the runner was killed too: what the command printed last tells how it ended
        result = self.result(job_id)
        state = JobState.LOST
        if result:
            state = JobState.FAILED if "error" in result else JobState.DONE
        ended_at = modified_at(folder / LOG) or job.created_at
        return JobStatus(state=state, result=result, ended_at=ended_at, **common)

    def statuses(self, limit: int = 200) -> list[JobStatus]:
        """Return the newest jobs as they stand. A folder that cannot be read is left out."""
        result = []
        for job_id in self.ids()[:limit]:
            try:
                result.append(self.status(job_id))
            except ConfigError:
                continue
        return result

    def result(self, job_id: str, max_bytes: int = TAIL_BYTES) -> dict[str, Any]:
        """Return the JSON object on the last line of a job's output; empty without one, or if it is larger."""
        lines = tail(self.folder / job_id / OUTPUT, max_bytes).rstrip("\n").rsplit("\n", 1)
        try:
            value = json.loads(lines[-1])
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}


# a job whose runner has not written its file yet
_START_S = 10.0


# of a command that Ctrl-C or SIGTERM ended, at a terminal for instance
_STOPPED_CODES = (130, 143)


def new_id() -> str:
    """Return the id of a new job; ids sort by time."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(seconds))}-{nanoseconds:09d}-{secrets.token_hex(3)}"


def _is_id(text: str) -> bool:
    return len(text) <= 60 and text.replace("-", "").isalnum() and text.isascii()


def _state_of_end(exit_code: int | None, signal_number: int, is_stopping: bool) -> JobState:
    if exit_code == 0:
        return JobState.DONE
    if is_stopping or exit_code in _STOPPED_CODES:
        return JobState.STOPPED
    if exit_code is None and not signal_number:
        return JobState.STOPPED  # it was stopped while it waited
    return JobState.FAILED


def _is_running(fields: Mapping[str, Any]) -> bool:
    try:
        return ProcessId(int(fields["pid"]), str(fields["started"])).is_alive
    except (KeyError, ValueError, TypeError):
        return False


def write_json(file: Path, fields: Mapping[str, Any]) -> None:
    """Write a file of the journal."""
    write_file_atomic(file, json.dumps(dict(fields), ensure_ascii=False).encode("utf-8", "replace"), mode=PRIVATE)


def read_json(file: Path) -> dict[str, Any]:
    """Return a file of the journal; empty if it does not exist or is damaged."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def tail(file: Path, max_bytes: int = TAIL_BYTES) -> str:
    """Return the end of a text file, at most `max_bytes`; empty if it does not exist."""
    try:
        with file.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - max_bytes))
            return stream.read().decode("utf-8", "replace")
    except OSError:
        return ""


def modified_at(file: Path) -> float:
    """Return the Unix time of a file's last change; 0 if it does not exist."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def shown_command(arguments: Sequence[str]) -> str:
    """Return the command line of a job as a person would type it, without the `--json` for the studio."""
    return shlex.join(["sartor", *(argument for argument in arguments if argument != "--json")])
