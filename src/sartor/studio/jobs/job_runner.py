"""Process of one job: waits for its turn, runs the command, and writes how it ended.

    python -m sartor.studio.jobs.job_runner FOLDER

It is started in a session of its own, so neither the end nor a kill of the studio ends it. The command is started by a
fork that first writes the process's number and start time into the journal, then executes; so there is no moment at
which a command runs that no journal names. The lock of heavy jobs is inherited by the command: it is held as long as
the command or one of its descendants runs, also if this process is killed.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

from sartor.core.filesystem import PRIVATE
from sartor.core.processes import ProcessId
from sartor.core.progress import PROGRESS_FILE
from sartor.studio.jobs.job_files import (
    END,
    HEAVY_LOCK,
    LOG,
    OUTPUT,
    PROCESS,
    PROGRESS,
    RUNNER,
    STOP,
    Job,
    JobFiles,
    JobState,
    write_json,
)

WAIT_S = 0.2
# exit code of a command that could not be executed, as in a shell
NOT_EXECUTED = 127


def run(folder: Path) -> None:
    """Run the job in a folder of `jobs/` to its end. An unexpected error ends up in the job's log."""
    files = JobFiles(folder.parent)
    job = files.job(folder.name)
    own = ProcessId.of(os.getpid())
    write_json(folder / RUNNER, {"pid": own.pid, "started": own.started, "at": time.time()})
    lock = _wait_for_turn(files, job) if job.is_heavy else None
    if (folder / STOP).is_file():
        write_json(folder / END, {"exit_code": None, "signal": 0, "at": time.time()})
        return
    pid = os.fork()
    if not pid:
        _execute(folder, job, lock)
    if lock is not None:
        os.close(lock)  # the command holds it now
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    ended = {"exit_code": code, "signal": 0} if code >= 0 else {"exit_code": None, "signal": -code}
    write_json(folder / END, {**ended, "at": time.time()})


def _wait_for_turn(files: JobFiles, job: Job) -> int | None:
    """Return the descriptor of the lock of heavy jobs, held; None if the job is to stop.

    Heavy jobs run in the order of their ids.
    """
    descriptor = os.open(files.folder / HEAVY_LOCK, os.O_RDWR | os.O_CREAT, PRIVATE)
    os.set_inheritable(descriptor, True)
    while not (files.folder / job.id / STOP).is_file():
        if _is_next(files, job):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                return descriptor
        time.sleep(WAIT_S)
    os.close(descriptor)
    return None


def _is_next(files: JobFiles, job: Job) -> bool:
    """Return whether no older heavy job waits."""
    for status in files.statuses():
        if status.job.id < job.id and status.job.is_heavy and status.state is JobState.WAITING:
            return False
    return True


def _execute(folder: Path, job: Job, lock: int | None) -> None:
    """Become the command. Called in the child of the fork; does not return."""
    try:
        os.setsid()  # a group of its own, for a stop that reaches its workers too
        own = ProcessId.of(os.getpid())
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.close(os.open(folder / PROGRESS, flags, PRIVATE))
        for target, name in ((1, OUTPUT), (2, LOG)):
            descriptor = os.open(folder / name, flags, PRIVATE)
            os.dup2(descriptor, target)
            os.close(descriptor)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        write_json(folder / PROCESS, {"pid": own.pid, "started": own.started, "at": time.time()})
        os.chdir(job.cwd)
        environment = {**os.environ, PROGRESS_FILE: str(folder / PROGRESS), "PYTHONUNBUFFERED": "1"}
        os.execve(job.program[0], [*job.program, *job.arguments], environment)
    except BaseException as error:  # whatever it is, the parent must not run twice
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(NOT_EXECUTED)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
