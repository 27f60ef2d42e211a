"""Every operation on files that the store makes: one method each, and nothing of the store touches a file otherwise.

A test takes a subclass and counts the operations, kills the process, fills the disk or cuts the power at each of them. The
eight that change something are the whole list of what can go wrong; what reads cannot make anything worse.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from sartor.core.artifacts import file_digest, fsync_directory
from sartor.core.errors import BusyError

PIECE_BYTES = 1 << 20
LEFTOVER = ".part"


class Stat(NamedTuple):
    """What of a file's or folder's status the store uses. `inode` says whether two names are one file on the disk."""

    inode: int
    size: int
    is_folder: bool


class FileSystem:
    """The file system of this machine. Every method raises OSError as the system call does."""

    _rights = 0o644

    def write(self, path: Path, content: bytes) -> None:
        """Create a file, or empty it, and write to it."""
        _write(path, os.O_TRUNC, content, self._rights)

    def append(self, path: Path, content: bytes) -> None:
        """Write at the end of a file, which is created if there is none."""
        _write(path, os.O_APPEND, content, self._rights)

    def sync(self, path: Path) -> None:
        """The bytes of a file survive a power cut from here on; its name does not by this alone."""
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """The names in a folder survive a power cut from here on."""
        fsync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name; a file that has it is replaced, in one step."""
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file's name."""
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Make a folder; its parent is there."""
        os.mkdir(path)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def open(self, path: Path) -> BinaryIO:
        """A file to read from."""
        return path.open("rb")

    def digest(self, path: Path) -> str:
        """sha256 of a file, hex."""
        return file_digest(path)

    def names(self, path: Path) -> list[str]:
        """What a folder holds, sorted; nothing where there is no folder."""
        try:
            return sorted(os.listdir(path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def stat(self, path: Path) -> Stat | None:
        """A file's or folder's status; None where there is none. A symbolic link is not followed."""
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Stat(found.st_ino, found.st_size, os.path.isdir(path) and not os.path.islink(path))

    def free_bytes(self, path: Path) -> int:
        """What the disk that holds a folder has left for this user."""
        return shutil.disk_usage(path).free

    def lock(self, path: Path) -> Callable[[], None]:
        """Hold a lock file until the function that is returned is called, or the process ends. Raises BusyError."""
        lock = FileLock(path, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(f"another process writes to the store at {path.parent}", "wait until it is done") from None
        return lock.release

    # of the above

    def replace(self, path: Path, content: bytes) -> None:
        """Write a file whole or not at all, durably: the name shows the old content until it shows the new."""
        part = path.with_name(f".{path.name}{LEFTOVER}")
        self.write(part, content)
        self.sync(part)
        self.rename(part, path)
        self.sync_folder(path.parent)

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file and make its bytes durable. Piece by piece: a reflink would share the blocks, and so their rot."""
        self.write(target, b"")
        with self.open(source) as stream:
            while piece := stream.read(PIECE_BYTES):
                self.append(target, piece)
        self.sync(target)

    def is_whole(self, path: Path, digest: str) -> bool:
        """Whether a file is there and has this sha256. A block that cannot be read is no different from one that differs."""
        try:
            return self.digest(path) == digest
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with all that it holds. Not durable, and not in one step: only for what nothing names."""
        found = self.stat(path)
        if found is None:
            return
        if not found.is_folder:
            self.unlink(path)
            return
        for name in self.names(path):
            self.remove(path / name)
        self.rmdir(path)


class PrivateFileSystem(FileSystem):
    """What it makes its owner alone may read: it is so from the first moment on."""

    _rights = 0o600

    def mkdir(self, path: Path) -> None:
        """Make a folder that its owner alone may enter; its parent is there."""
        os.mkdir(path, 0o700)


def _write(path: Path, how: int, content: bytes, rights: int) -> None:
    # unbuffered: a buffer that could not be written would be written again on closing
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how, rights)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)
