"""Starting and stopping of jobs, and what a running one reports: progress, time left, losses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sartor.core.errors import ConfigError
from sartor.core.filesystem import touch_private
from sartor.core.processes import ProcessId
from sartor.studio.jobs.job_files import (
    LOG,
    PROCESS,
    PROGRESS,
    STOP,
    Job,
    JobFiles,
    JobState,
    JobStatus,
    new_id,
    read_json,
    tail,
    write_json,
)
from sartor.studio.jobs.training_logs import Losses, json_lines, log_of, read_losses

# seconds after which a job that was asked to stop may be ended at once
GRACE_S = 30.0
# lines of a log that a page shows
LOG_LINES = 200
# what tells a pace: this fraction, or this many seconds
LEAST_GAIN, LEAST_S = 0.05, 10.0


@dataclass(frozen=True)
class JobProgress:
    """Progress of a running job.

    fraction: 0 to 1.
    left_s: seconds that it will still take; None while that is measured.
    """

    what: str
    fraction: float
    text: str
    left_s: float | None


# -P: nothing in the folder of the artefacts is imported
_SARTOR = (sys.executable, "-P", "-m", "sartor")


class JobControl:
    """Jobs of one studio. `files` is their journal.

    program: what each job executes before its arguments.
    """

    def __init__(self, folder: Path, program: Sequence[str] = _SARTOR) -> None:
        self.files = JobFiles(folder)
        self._program = tuple(program)

    def start(
        self,
        arguments: Sequence[str],
        *,
        title: str,
        by: str,
        cwd: Path,
        out: str = "",
        adapter: str = "",
        is_heavy: bool = True,
    ) -> Job:
        """Start a command of `sartor` as a job of its own and return it.

        arguments: begin with the verb; `--json` is added. The other arguments: as the fields of Job.
        """
        job = Job(
            id=new_id(),
            verb=arguments[0],
            arguments=(*arguments, "--json"),
            cwd=str(cwd),
            title=title,
            by=by,
            created_at=time.time(),
            program=self._program,
            out=out,
            adapter=adapter,
            is_heavy=is_heavy,
        )
        folder = self.files.create(job)
        touch_private(folder / LOG)
        with (folder / LOG).open("ab") as log:
            runner = subprocess.Popen(
                [sys.executable, "-P", "-m", "sartor.studio.jobs.job_runner", str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        # awaited, so that an ended runner does not stay as a zombie
        threading.Thread(target=runner.wait, daemon=True).start()
        return job

    def stop(self, job_id: str, *, by: str) -> None:
        """Ask a job to stop: it saves its state and ends. Once that takes longer than GRACE_S, end it at once.

        Raises ConfigError if it has ended already.
        """
        status, folder = self.files.status(job_id), self.files.path(job_id)
        if status.state.is_over:
            raise ConfigError(f"the job has ended: {status.state.value}", "reload the page")
        asked = read_json(folder / STOP)
        if not asked:
            write_json(folder / STOP, {"by": by, "at": time.time()})
        fields = read_json(folder / PROCESS)
        if not fields:
            return  # it waits, and its runner will see the file
        process = ProcessId(int(fields["pid"]), str(fields["started"]))
        is_late = bool(asked) and time.time() - float(asked.get("at", 0)) > GRACE_S
        with suppress(ProcessLookupError):
            if process.is_alive:
                # the command alone ends its workers; at the end of its patience the whole group
                kill = os.killpg if is_late else os.kill
                kill(process.pid, signal.SIGKILL if is_late else signal.SIGTERM)

    def again(self, job_id: str, *, by: str) -> Job:
        """Start the command of an ended job again; commands that can do so go on where it was stopped."""
        job = self.files.job(job_id)
        if not self.files.status(job_id).state.is_over:
            raise ConfigError("the job has not ended", "stop it first")
        arguments = [argument for argument in job.arguments if argument != "--json"]
        if job.verb in _RESUMES_BY_FLAG and "--resume" not in arguments:
            arguments.append("--resume")
        return self.start(
            arguments,
            title=job.title,
            by=by,
            cwd=Path(job.cwd),
            out=job.out,
            adapter=job.adapter,
            is_heavy=job.is_heavy,
        )

    def progress(self, status: JobStatus) -> JobProgress | None:
        """Return the progress of a running job; None if it has reported none."""
        if status.state is not JobState.RUNNING:
            return None
        lines = json_lines(tail(self.files.path(status.job.id) / PROGRESS))
        # of the piece of work that runs now
        lines = [line for line in lines if line.get("what") == lines[-1].get("what")]
        if not lines:
            return None
        try:
            points = [(float(line["at"]), float(line["fraction"])) for line in lines]
        except (KeyError, TypeError, ValueError):
            return None
        last, (last_at, fraction), now = lines[-1], points[-1], time.time()
        left_s = last.get("left_s")
        if isinstance(left_s, (int, float)):  # the work itself knows best: it counts what has not begun
            left_s = max(0.0, left_s - (now - last_at))
        elif "left_s" not in last:
            left_s = time_left(points, now)
        return JobProgress(str(last["what"]), fraction, str(last.get("text", "")), left_s)

    def log_lines(self, job_id: str) -> list[str]:
        """Return the last lines of a job's log."""
        lines = tail(self.files.path(job_id) / LOG).split("\n")
        return [line for line in map(_without_colours, lines) if line.strip()][-LOG_LINES:]

    def losses(self, job: Job) -> Losses | None:
        """Return the losses of the training run of a job, also of one that runs; None if there are none yet."""
        return self.losses_of(Path(job.adapter)) if job.adapter else None

    def losses_of(self, adapter: Path) -> Losses | None:
        """Return the losses of an Adapter, finished or in work; None if there are none yet."""
        file = log_of(adapter)
        return read_losses(file) if file else None


# commands that go on from their saved state only if told to
_RESUMES_BY_FLAG = ("tune", "curate")


def time_left(points: Sequence[tuple[float, float]], now: float) -> float | None:
    """Return the seconds that work will still take, by its pace since the first of its points; None before it has one.

    points: (Unix time in s, fraction done), in order. The first may be above 0: the work was resumed there.
    """
    (first_at, first), (last_at, last) = points[0], points[-1]
    if last <= first or last_at <= first_at or (last - first < LEAST_GAIN and last_at - first_at < LEAST_S):
        return None
    pace = (last - first) / (last_at - first_at)
    return max(0.0, (1 - last) / pace - (now - last_at))


def _without_colours(line: str) -> str:
    """Return a line without terminal control sequences; of one that was redrawn, the last state."""
    return _CONTROL_SEQUENCE.sub("", line).rsplit("\r", 1)[-1]


_CONTROL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
