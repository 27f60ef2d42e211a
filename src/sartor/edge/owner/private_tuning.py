"""Tuning job in memory, run as a child process.

Tokens are as sensitive as the text. They are written into a folder that only this user may read (0700), on a file
system in memory. The tuner's process reads it, and it is removed at the end. Leftovers of a killed process are
removed by the next tuning, or by a restart of the device. Without such a file system the tuning is refused. Memory
can be swapped out: disable swap, or encrypt it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sartor.core.errors import (
    BudgetError,
    BusyError,
    ConfigError,
    MissingError,
    ModelError,
)
from sartor.core.resource_limits import ResourceLimits, run
from sartor.edge.tuning.tuner_process import write_tokens
from sartor.edge.tuning.tuning_job import TuningJob, tuner_command, tuner_environment
from sartor.models.packing import TokenizedExample
from sartor.tune.tokenized_dataset import TokenizedDataset

IN_MEMORY = ("tmpfs", "ramfs")
Tune = Callable[[TuningJob], Mapping[str, Any]]


@contextmanager
def memory_folder(owner: Path, roots: Sequence[Path] | None = None) -> Iterator[Path]:
    """Hold a folder in memory for this user alone, one per `owner`.

    Its leftovers are removed first, and its content at the end. Raises MissingError if there is no folder in memory,
    ConfigError if another user owns it.
    """
    if roots is None:
        runtime_dir = os.environ.get("XDG_RUNTIME_DIR")
        roots = [Path("/dev/shm"), Path(runtime_dir)] if runtime_dir else [Path("/dev/shm")]
    root_folder = next(filter(_is_in_memory, roots), None)
    if root_folder is None:
        raise MissingError(
            "there is no folder in memory for what may not lie on the disk", "sudo mount -t tmpfs tmpfs /dev/shm"
        )
    folder = root_folder / f"sartor-{os.getuid()}-{hashlib.sha256(str(owner).encode()).hexdigest()[:16]}"
    try:
        if folder.is_symlink() or folder.exists():
            status = os.lstat(folder)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
                raise ConfigError(
                    f"{folder} belongs to somebody else", "have it removed: its name was taken on purpose"
                )
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise MissingError(
            f"{folder} could not be made: {error.strerror}", f"ls -ld {root_folder}; df -h {root_folder}"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_in_memory(root: Path) -> bool:
    """Return whether a folder is on a file system in memory, by its mount (proc(5), mounts), and writable."""
    try:
        lines = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    real = root.resolve()
    mounts = [(Path(line[1]), line[2]) for line in lines if real.is_relative_to(line[1])]
    kind = max(mounts, key=lambda mount: len(mount[0].parts), default=(root, ""))[1]
    return kind in IN_MEMORY and root.is_dir() and os.access(root, os.W_OK)


def write_job(job: TuningJob, rows: Sequence[TokenizedExample]) -> None:
    """Write the tokens where the job expects them. No held-out row goes to the tuner."""
    write_tokens(TokenizedDataset(list(rows), [], lengths=[len(row.ids) for row in rows]), Path(job.tokens))


def tune_in_process(limits: ResourceLimits, stop: Callable[[], bool] = lambda: False) -> Tune:
    """Return the tuner as a process under limits.

    `stop` ends it, and the same job later resumes.
    """

    def tune(job: TuningJob) -> Mapping[str, Any]:
        """Run the tuner on a job and return its facts.

        Raises BusyError if it was stopped, BudgetError above a limit, ModelError for another failure.
        """
        file = Path(job.tokens).with_name("job.json")
        job.write(file)
        usage = run(tuner_command(file), limits, environment=tuner_environment(), stop=stop)
        if usage.killed == "stopped":
            raise BusyError(
                "the tuning was stopped; what it has is saved",
                "sartor edge tune NAME goes on where it was",
                retry_after_s=600,
            )
        if usage.killed:
            raise BudgetError(
                f"the tuning met its limit of {usage.killed}: {usage}",
                "a larger --memory-bytes, --wall-s or --cpu-s, or fewer --epochs",
            )
        if usage.exit_code:
            raise ModelError(
                f"the tuning ended with exit code {usage.exit_code}",
                "read the tuner's last line above; then sartor edge tune NAME goes on where it was",
            )
        return {"used": asdict(usage), **json.loads((Path(job.out) / "run.json").read_text(encoding="utf-8"))}

    return tune
