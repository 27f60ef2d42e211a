"""Server's own verified copies of Releases.

    STATE/adapters/<release id>/              the Release as it was admitted; .admitted.json: the checks that it passed
    STATE/adapters/.part-<random>/            a copy being checked; one that a kill left is removed by `sweep`

Files are copied and never linked: a hard link is the same file, which its owner could still write to.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sartor.core import records
from sartor.core.artifacts import MANIFESTS, open_artifact
from sartor.core.errors import AdmissionError, ArtifactError, MissingError, SartorError, SignatureError
from sartor.core.filesystem import DISK_FULL, PRIVATE, rename_directory_durably, touch_private, write_file_atomic

MOST_BYTES = 4 << 30
MOST_FILES = 2_000
MOST_DEPTH = 8
PASSED = ".admitted.json"
_PART = ".part-"
_PIECE = 1 << 20


def folder(state: Path) -> Path:
    """Return the folder of a team's copies, created with mode 0700 if absent."""
    path = state / "adapters"
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def sweep(state: Path) -> None:
    """Remove what killed admissions left. Call it at the start of a server, when no admission runs."""
    for part in folder(state).glob(f"{_PART}*"):
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def staged(release: Path, state: Path) -> Iterator[Path]:
    """Yield a temporary copy of the directory `release`; it is removed afterwards unless `keep` renamed it.

    Raises AdmissionError (`files`) for a link, a device, or more than a Release may hold; SignatureError for a
    directory that is no signed Release; ArtifactError if it is absent; MissingError if the disk is full.
    """
    part = folder(state) / f"{_PART}{secrets.token_hex(8)}"
    try:
        with _disk(state):
            part.mkdir(mode=0o700)
            _ReleaseCopier(release, part).run()
        yield part
    except SartorError as error:
        # error texts name the original directory instead of the temporary copy
        error.problem, error.remedy = (
            text.replace(str(part), str(release)).replace(part.name, release.name)
            for text in (error.problem, error.remedy)
        )
        error.args = (f"{error.problem}\n  try: {error.remedy}",)
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def keep(part: Path, state: Path, release_id: str, record: dict[str, Any]) -> Path:
    """Rename a staged copy to its final name, with its record, and return the path.

    A valid copy that exists already is kept instead.
    """
    path = folder(state) / release_id
    with suppress(ArtifactError):  # the copy there is not whole
        if open_artifact(path, "release").id == path.name and read_passed_record(path):
            return path
    with _disk(state):
        touch_private(part / PASSED)
        (part / PASSED).write_bytes(records.canonical({"schema": 1, **record}))
        rename_directory_durably(part, path, replace=True)
    return path


def is_copy(path: Path, state: Path) -> bool:
    """Return whether a directory is one of the team's own copies."""
    return path.absolute().parent == folder(state).absolute() and not path.name.startswith(".")


def read_passed_record(path: Path) -> dict[str, Any]:
    """Return the record of a copy's checks; empty if it cannot be read, so that the checks run again."""
    try:
        fields = json.loads((path / PASSED).read_text(encoding="utf-8"))
        return fields if isinstance(fields, dict) and fields.get("schema") == 1 else {}
    except (OSError, ValueError):
        return {}


def renew(path: Path, record: dict[str, Any]) -> None:
    """Rewrite the record of a copy's checks, with the old file's permissions.

    If the disk fails, the same checks run again at the next start.
    """
    if path.is_dir():  # a copy that was removed meanwhile is not created again
        with suppress(OSError):
            rights = (path / PASSED).stat().st_mode & 0o777
            write_file_atomic(path / PASSED, records.canonical({"schema": 1, **record}), mode=rights)


class _ReleaseCopier:
    """Copy of one Release, with limits on all of its files together."""

    def __init__(self, release: Path, part: Path) -> None:
        self._release, self._part = release, part
        self._files = self._bytes = 0

    def run(self) -> None:
        if not self._release.is_dir():
            raise ArtifactError(f"there is no directory {self._release}", "give the directory of a Release")
        # a client that names a directory without a Release (/etc) must not make the server read all of it
        for name in (MANIFESTS["release"], "signature"):
            if not (self._release / name).is_file():
                error = SignatureError(
                    f"{self._release} is no signed Release: it has no {name}", "sartor release signs an adapter"
                )
                error.check = "signature"
                raise error
        self._folder(self._release, self._part, 0)

    def _folder(self, source: Path, target: Path, depth: int) -> None:
        if depth > MOST_DEPTH:
            raise _refused(f"{source} lies more than {MOST_DEPTH} folders deep")
        with os.scandir(source) as entries:
            # another server's record of its own copy is no part of the Release
            copied_entries = [entry for entry in entries if depth or entry.name != PASSED]
        for entry in copied_entries:
            if entry.name.startswith("."):
                raise _refused(f"{Path(entry.path)} is hidden, and no manifest lists it")
            if entry.is_dir(follow_symlinks=False):
                (target / entry.name).mkdir(mode=0o700)
                self._folder(Path(entry.path), target / entry.name, depth + 1)
            else:
                self._file(Path(entry.path), target / entry.name)

    def _file(self, source: Path, target: Path) -> None:
        self._files += 1
        if self._files > MOST_FILES:
            raise _refused(f"it holds more than {MOST_FILES:,} files")
        try:
            # without following a link, and without waiting for the other end of a pipe
            descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise _refused(f"{source} cannot be opened as a file: {error.strerror}") from None
        with os.fdopen(descriptor, "rb") as reading:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _refused(f"{source} is no regular file")
            copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE)
            with os.fdopen(copy, "wb") as writing:
                while piece := reading.read(_PIECE):
                    self._bytes += len(piece)
                    if self._bytes > MOST_BYTES:
                        raise _refused(f"it holds more than {MOST_BYTES:,} bytes")
                    writing.write(piece)


def _refused(problem: str) -> AdmissionError:
    return AdmissionError(
        f"the Release is refused: {problem}", "give a Release as `sartor release` writes it", "files"
    )


@contextmanager
def _disk(state: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise MissingError(
                f"the disk is full: the adapter could not be copied to {state}",
                f"df -h {state} shows the full disk; remove files from it, then the same command again",
            ) from None
        raise MissingError(
            f"the adapter could not be copied to {state}: {error}",
            f"ls -ld {state}; df -h {state}; then the same command again",
        ) from None
