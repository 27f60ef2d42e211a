"""The folder of a studio: checked paths to artefacts below it, and the studio's own hidden folder.

    DIR/                 artefacts, as the commands write them
    DIR/uploads/         files that were given to the studio
    DIR/.studio/         mode 0700: accounts.sqlite (0600), jobs/, talks/

A path that a request names must lie below DIR, have no hidden part and lead through no link, so that a page shows
neither the studio's own files nor anything elsewhere.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import sqlite3
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sartor.core.artifacts import Artifact, kind_of, read_manifest
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.filesystem import create_file_atomic, make_private_folder, touch_private
from sartor.serving.http.http_errors import NotFoundError

HIDDEN = ".studio"
ACCOUNTS = "accounts.sqlite"
UPLOADS = "uploads"
# Artefacts and folders of a scan; a larger tree is shown in part, and the page says so
MAX_ARTIFACTS, MAX_FOLDERS, MAX_DEPTH = 500, 20_000, 6
_BACKUP_ENTRIES = {ACCOUNTS}
_MAX_BACKUP_BYTES = 1 << 30


class OutsideError(NotFoundError):
    """A path that a request names is not below the studio's folder."""


@dataclass(frozen=True)
class FoundArtifact:
    """An artefact below the studio's folder.

    name: its path relative to the folder, with slashes.
    problem: why its manifest cannot be read; empty if it can.
    """

    name: str
    kind: str
    artifact: Artifact | None
    problem: str = ""

    @property
    def id(self) -> str:
        """Id of the artefact; empty if it cannot be read."""
        return self.artifact.id if self.artifact else ""


class StudioFolder:
    """A studio's folder. Raises ConfigError if there is no such folder.

    root: absolute, without links.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise ConfigError(f"{root} is not a folder", f"mkdir {root}")
        self.root = root.resolve()
        self._manifests: dict[str, tuple[tuple[int, int], FoundArtifact]] = {}

    @property
    def hidden(self) -> Path:
        """The studio's own folder, which is created if it is absent."""
        folder = self.root / HIDDEN
        try:
            make_private_folder(folder)
        except OSError as error:
            problem = f"{folder} cannot be made: {error.strerror}"
            raise ConfigError(problem, "give a folder that you can write to") from None
        return folder

    @property
    def accounts_file(self) -> Path:
        """SQLite file of users and sessions."""
        return self.hidden / ACCOUNTS

    def resolve(self, name: str) -> Path:
        """Return the path that a request names, relative to the folder.

        Raises OutsideError for a path that is absolute, climbs, is hidden, or leads through a link or to nothing.
        """
        parts = PurePosixPath(name).parts
        is_plain = not name.startswith("/") and "\\" not in name and "\0" not in name
        if not is_plain or not parts or any(part == ".." or part.startswith(".") for part in parts):
            raise _outside(name)
        path = self.root
        for part in parts:
            path = path / part
            try:
                mode = os.lstat(path).st_mode
            except (OSError, ValueError):
                raise _outside(name) from None
            if stat.S_ISLNK(mode):
                raise _outside(name)
        return path

    def name_of(self, path: Path) -> str:
        """Return the name of a path below the folder, as `resolve` takes it; empty for a path elsewhere."""
        try:
            return path.resolve().relative_to(self.root).as_posix()
        except (ValueError, OSError):
            return ""

    def artifact(self, name: str, kinds: tuple[str, ...]) -> Artifact:
        """Return the artefact that a request names, its manifest checked. Raises OutsideError, ArtifactError."""
        path = self.resolve(name)
        return Artifact(path, read_manifest(path, kinds))

    def scan(self) -> tuple[list[FoundArtifact], bool]:
        """Return the artefacts below the folder by name, and whether all of them are there."""
        found: list[FoundArtifact] = []
        is_whole = True
        for count, folder in enumerate(self._folders()):
            kind = kind_of(folder)
            if kind is not None:
                found.append(self._found(folder, kind))
            if len(found) >= MAX_ARTIFACTS or count >= MAX_FOLDERS:
                is_whole = False
                break
        return sorted(found, key=lambda item: item.name), is_whole

    def walk(self) -> Iterator[Path]:
        """Yield the first MAX_FOLDERS folders below the root, it included, without those inside artefacts."""
        return itertools.islice(self._folders(), MAX_FOLDERS)

    def _folders(self) -> Iterator[Path]:
        """Yield the folders below the root, without links, hidden ones and those inside artefacts."""
        waiting = [(self.root, 0)]
        while waiting:
            folder, depth = waiting.pop()
            yield folder
            if depth >= MAX_DEPTH or kind_of(folder) is not None:
                continue
            try:
                with os.scandir(folder) as entries:
                    below = [
                        entry.path
                        for entry in entries
                        if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
                    ]
            except OSError:
                continue
            waiting += [(Path(path), depth + 1) for path in below]

    def _found(self, folder: Path, kind: str) -> FoundArtifact:
        name = folder.relative_to(self.root).as_posix()
        try:
            status = max(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns).stat()
            key = (status.st_mtime_ns, status.st_size)
        except (OSError, ValueError):
            key = (0, 0)
        known = self._manifests.get(name)
        if known and known[0] == key:
            return known[1]
        try:
            found = FoundArtifact(name, kind, Artifact(folder, read_manifest(folder, (kind,))))
        except ArtifactError as error:
            found = FoundArtifact(name, kind, None, error.problem)
        self._manifests[name] = (key, found)
        return found

    def data_files(self) -> list[str]:
        """Return the names of files below `uploads/` and directly in the folder that may hold rows, newest first."""
        files = []
        for folder in (self.root, self.root / UPLOADS):
            if folder.is_dir() and not folder.is_symlink():
                for path in folder.iterdir():
                    is_rows = path.suffix.lower() in DATA_SUFFIXES and not path.name.startswith(".")
                    if is_rows and path.is_file() and not path.is_symlink():
                        files.append(path)
        files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        return [path.relative_to(self.root).as_posix() for path in files]

    def free_bytes(self) -> int:
        """Return the free bytes on the folder's disk."""
        return shutil.disk_usage(self.root).free


DATA_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".xlsx", ".txt", ".md", ".docx", ".pdf", ".html")


def _outside(name: str) -> OutsideError:
    return OutsideError(f"there is nothing to show at {name[:200]!a}", "go back to Home, and follow a link there")


def back_up(folder: StudioFolder, file: Path) -> dict[str, object]:
    """Write users, roles and settings to a ZIP file that its owner alone can read; a running studio may go on.

    Returns the path and the number of bytes. Raises ConfigError if the file exists or there are no accounts yet.
    """
    if not folder.accounts_file.is_file():
        raise ConfigError(f"{folder.root} has no studio yet", f"sartor studio {shlex.quote(str(folder.root))}")
    if file.exists():
        raise ConfigError(f"{file} exists", "choose another name")
    with tempfile.TemporaryDirectory(dir=folder.hidden) as scratch:
        copy = Path(scratch) / ACCOUNTS
        touch_private(copy)
        with closing(sqlite3.connect(folder.accounts_file)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
            target.execute("delete from sessions")
            target.commit()
        with create_file_atomic(file.absolute()) as part:
            touch_private(part)
            with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(copy, ACCOUNTS)
    return {"backup": str(file.absolute()), "bytes": file.stat().st_size}


def restore(folder: StudioFolder, file: Path) -> dict[str, object]:
    """Replace the accounts by those of a backup; everybody must log in again. Stop the studio first.

    Raises ConfigError if the file is no backup.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = {item.filename: item for item in archive.infolist()}
            if set(entries) != _BACKUP_ENTRIES or entries[ACCOUNTS].file_size > _MAX_BACKUP_BYTES:
                raise ConfigError(f"{file} is no backup of a studio", "give a file that sartor studio backup wrote")
            content = archive.read(ACCOUNTS)
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{file} is no backup of a studio: {error}", "sartor studio backup FILE wrote one") from None
    with tempfile.TemporaryDirectory(dir=folder.hidden) as scratch:
        copy = Path(scratch) / ACCOUNTS
        touch_private(copy)
        copy.write_bytes(content)
        try:
            with closing(sqlite3.connect(copy)) as source:
                names = {row[0] for row in source.execute("select name from sqlite_master where type = 'table'")}
                if "users" not in names or source.execute("pragma quick_check").fetchone() != ("ok",):
                    raise ConfigError(f"{file} is damaged", "take another backup")
                count = source.execute("select count(*) from users").fetchone()[0]
                touch_private(folder.accounts_file)
                with closing(sqlite3.connect(folder.accounts_file)) as target:
                    source.backup(target)
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{file} is damaged: {error}", "take another backup") from None
    return {"restored": str(folder.root), "users": count}
