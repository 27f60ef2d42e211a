"""Tunings that are in work on disk, whoever started them: a terminal, a script, a job of the studio.

A run of `tune` fills `.NAME.part-PID-THREAD-TIME` beside its output NAME and holds the lock `.NAME.lock`
(core/filesystem.py). So the folder names the process, and the process is the run's if it has that lock file open:
numbers of processes are used again, open files are not inherited by strangers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sartor.studio.jobs.training_logs import TRAINING_LOG

_PART = re.compile(r"\.(.+)\.part-(\d{1,10})-[0-9a-f]+-[0-9a-f]+")


@dataclass(frozen=True)
class UnfinishedRun:
    """A folder that a tuning fills, or left behind.

    adapter: path of its output. folder: with the log.
    pid: of the process that made it. is_running: whether that process still writes it.
    started_at: Unix time, s.
    """

    adapter: Path
    folder: Path
    pid: int
    is_running: bool
    started_at: float


def unfinished_runs(folders: Iterable[Path]) -> dict[Path, UnfinishedRun]:
    """Return the newest unfinished run of each Adapter that is to stand in one of the folders."""
    found: dict[Path, UnfinishedRun] = {}
    for folder in folders:
        for run in _runs_in(folder):
            known = found.get(run.adapter)
            if known is None or (run.is_running, run.started_at) > (known.is_running, known.started_at):
                found[run.adapter] = run
    return found


def _runs_in(folder: Path) -> Iterable[UnfinishedRun]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(".") and ".part-" in entry.name]
    except OSError:
        return
    for name in names:
        match, path = _PART.fullmatch(name), folder / name
        if not match or path.is_symlink() or not (path / TRAINING_LOG).is_file():
            continue
        adapter, pid = folder / match[1], int(match[2])
        try:
            # a folder changes when a file is made in it: the log is the first
            started_at = path.stat().st_mtime
        except OSError:
            continue
        lock = folder / f".{adapter.name}.lock"
        yield UnfinishedRun(adapter, path, pid, _has_open(pid, lock), started_at)


def _has_open(pid: int, file: Path) -> bool:
    """Return whether a process runs and has a file open. Without /proc, or for another user's, whether it runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return file.exists()
    descriptors = _PROC / str(pid) / "fd"
    try:
        names = os.listdir(descriptors)
    except FileNotFoundError:
        return not _PROC.is_dir() and file.exists()
    except OSError:
        return file.exists()
    for name in names:
        try:
            if os.readlink(descriptors / name) == str(file):
                return True
        except OSError:
            continue
    return False


_PROC = Path("/proc")
