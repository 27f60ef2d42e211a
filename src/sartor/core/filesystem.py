"""Atomic file and directory writes, locks, crash-testable file operations.

    write_file_atomic         the content of one file, as bytes or written to a stream
    create_file_atomic        the same for a library or a program that wants a path
    create_directory_atomic   a directory that is filled under another name
    FileSystem                every operation, one method each

A temporary is a hidden sibling, `.NAME.part-PID-THREAD-TIME`: two writers of one target never share one, a failing
writer removes its own, and what a kill leaves is known by its name (`FileSystem.leftovers`). Durable is what was
written
in this order: write, fsync of the file, rename, fsync of the folder.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from sartor.core.errors import BusyError, ConfigError

Content = bytes | Callable[[BinaryIO], object]
PIECE_BYTES = 1 << 20
LEFTOVER = ".part"
# 255 bytes are the most of a name on Linux, macOS and Windows; process, thread and time take up to 50
_MAX_STEM_BYTES = 200
# os.open translates line ends on Windows without it
_BINARY = getattr(os, "O_BINARY", 0)


def write_file_atomic(path: Path, content: Content, *, mode: int = 0o644, durable: bool = True) -> None:
    """Write a file so that its name shows the old content or the new, whole. Missing folders are made.

    content: the bytes, or a function that writes them to the stream it gets.
    mode: the file's rights from its first moment on, less the umask.
    durable: whether the new content survives a power cut once this returns. False saves two fsyncs; a power cut may
    then
        leave a file of no or of wrong bytes: only for what its reader checks and can make again.
    Raises OSError as the system calls do; the old file then stands, and no temporary is left.
    """
    filesystem = FileSystem(mode)
    filesystem.make_folders(path.parent, durable=durable)
    filesystem.replace(path, content, durable=durable)


@contextmanager
def create_file_atomic(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield the path of a temporary to write to; it replaces the file, without an error. As `write_file_atomic`."""
    filesystem, part = FileSystem(), temporary_path(path)
    filesystem.make_folders(path.parent, durable=durable)
    with filesystem.removed_on_error(part):
        yield part
        filesystem.take_name(part, path, durable=durable)


@contextmanager
def create_directory_atomic(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden sibling to fill; without an error it is fsynced whole and takes the name in one rename.

    An error inside removes what was written. With `replace`, an old directory goes only when the new one has its name.
    Raises OSError: ENOTEMPTY for a directory that is there, NotADirectoryError for a file or a link.
    """
    part = temporary_path(path)
    part.mkdir(parents=True)
    try:
        yield part
        rename_directory_durably(part, path, replace=replace)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def rename_directory_durably(part: Path, path: Path, *, replace: bool = False) -> None:
    """Make all that is below `part` durable, then give it the name `path` beside it, durably.

    With `replace`, a directory that has the name is swapped out in one system call where the kernel can; what was in
    it may then stand under the name of `part`, for the caller to remove.
    """
    fsync_tree(part)
    if path.is_symlink() or path.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
    while not _take_directory_name(part, path, replace=replace):
        if _exchange(part, path):
            break
        # Two renames; a kill between them leaves the old directory under its `.part-` name. macOS, old kernels.
        old = part.with_name(part.name + "-old")
        with suppress(FileNotFoundError):  # another writer has moved it
            os.replace(path, old)
        shutil.rmtree(old, ignore_errors=True)
    fsync_directory(path.parent)


def _take_directory_name(part: Path, path: Path, *, replace: bool) -> bool:
    """Rename to a name that is free or that an empty directory has; false where a directory with something in it has
    it.

    It is tried instead of looked up, since another writer may take the name in between. Raises OSError, without
    `replace` for such a directory too.
    """
    try:
        os.replace(part, path)
    except OSError as error:
        is_taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
        # Windows says EACCES of a directory that is there, and of other things as well
        if replace and (is_taken or (os.name == "nt" and path.is_dir())):
            return False
        raise
    return True


def temporary_path(path: Path) -> Path:
    """Return the hidden sibling under which this thread of this process writes what is to become `path`."""
    return path.with_name(f"{_stem(path)}-{os.getpid()}-{threading.get_ident():x}-{time.monotonic_ns():x}")


def fsync_tree(root: Path) -> None:
    """Make every file and every name below a directory survive a power cut."""
    for folder, _, files in os.walk(root):
        for name in files:
            with open(os.path.join(folder, name), "rb+") as stream:
                os.fsync(stream.fileno())
        fsync_directory(Path(folder))


def fsync_directory(path: Path) -> None:
    """Make renames below `path` survive a power cut (a directory cannot be opened for that on Windows)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_parent(path: Path) -> None:
    """Make the folder that an output is to stand in. Raises ConfigError where it cannot be made or written to."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be made: {error.strerror}", "choose another --out") from None
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path.parent} cannot be written to", "choose another --out")


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Two writers of one name: the second is refused at once. The lock file goes with the process that holds it."""
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"another process is writing {path}", "wait for it, or choose another --out") from None
    try:
        yield
    finally:
        # unlink while held: a waiter that already opened the file then holds a lock on nothing and is refused by
        # rename
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


class Stat(NamedTuple):
    """What of a file's or folder's status the store uses. `inode` says whether two names are one file on the disk."""

    inode: int
    size: int
    is_folder: bool


class FileSystem:
    """The file system of this machine. Every method raises OSError as the system call does.

    A test takes a subclass and counts the operations, kills the process, fills the disk or cuts the power at each of
    them. The nine that change something (write to rmdir) are the whole list of what can go wrong; what reads cannot
    make anything worse.
    """

    def __init__(self, mode: int = 0o644) -> None:
        self._mode = mode

    def write(self, path: Path, content: Content) -> None:
        """Create a file, or empty it, and write to it."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, self._mode)
        if callable(content):
            with os.fdopen(descriptor, "wb") as stream:
                content(stream)
        else:
            _write(descriptor, content)

    def append(self, path: Path, content: bytes) -> None:
        """Write at the end of a file, which is created if there is none."""
        _write(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _BINARY, self._mode), content)

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
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Stat(status.st_ino, status.st_size, os.path.isdir(path) and not os.path.islink(path))

    def free_bytes(self, path: Path) -> int:
        """What the disk that holds a folder has left for this user."""
        return shutil.disk_usage(path).free

    def lock(self, path: Path) -> Callable[[], None]:
        """Hold a lock file until the function that is returned is called, or the process ends. Raises BusyError."""
        lock = FileLock(path, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(
                f"another process writes to the store at {path.parent}",
                f"fuser {path} names it; the same command again once it has ended",
            ) from None
        return lock.release

    # of the above

    def replace(self, path: Path, content: Content, *, durable: bool = True) -> None:
        """Write a file whole or not at all: the name shows the old content until it shows the new."""
        part = temporary_path(path)
        with self.removed_on_error(part):
            self.write(part, content)
            self.take_name(part, path, durable=durable)

    def take_name(self, part: Path, path: Path, *, durable: bool = True) -> None:
        """Give a temporary that is written its name; durably, its bytes before its name."""
        if durable:
            self.sync(part)
        self.rename(part, path)
        if durable:
            self.sync_folder(path.parent)

    @contextmanager
    def removed_on_error(self, part: Path) -> Iterator[None]:
        """Remove a temporary where what is inside fails."""
        try:
            yield
        except BaseException:
            with suppress(OSError):  # the error that is on its way says more
                self.remove(part)
            raise

    def leftovers(self, path: Path) -> list[Path]:
        """Return the temporaries beside `path`: those of killed writers, and of writers at work."""
        stem = _stem(path)  # alone, it is the name that older versions gave
        names = self.names(path.parent)
        return [path.with_name(name) for name in names if name == stem or name.startswith(f"{stem}-")]

    def remove_leftovers(self, path: Path) -> None:
        """Remove what killed writers of `path` left. The lock of its writers must be held: nobody is at work then."""
        for leftover in self.leftovers(path):
            self.remove(leftover)

    def make_folders(self, path: Path, *, durable: bool = True) -> None:
        """Make a folder and those above it that are not there."""
        if self.stat(path) is not None:
            return
        self.make_folders(path.parent, durable=durable)
        with suppress(FileExistsError):  # another process made it meanwhile
            self.mkdir(path)
        if durable:
            self.sync_folder(path.parent)

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file and make its bytes durable. By pieces: a reflink would share the blocks, and so their rot."""
        self.write(target, b"")
        with self.open(source) as stream:
            while piece := stream.read(PIECE_BYTES):
                self.append(target, piece)
        self.sync(target)

    def is_whole(self, path: Path, digest: str) -> bool:
        """Whether a file is there and has this sha256. A block that cannot be read is as one that differs."""
        try:
            return self.digest(path) == digest
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with all that it holds. Not durable, nor in one step: only for what nothing
        names.
        """
        status = self.stat(path)
        if status is None:
            return
        if not status.is_folder:
            self.unlink(path)
            return
        for name in self.names(path):
            self.remove(path / name)
        self.rmdir(path)


class PrivateFileSystem(FileSystem):
    """What it makes its owner alone may read: it is so from the first moment on."""

    def __init__(self) -> None:
        super().__init__(0o600)

    def mkdir(self, path: Path) -> None:
        """Make a folder that its owner alone may enter; its parent is there."""
        os.mkdir(path, 0o700)


def _write(descriptor: int, content: bytes) -> None:
    # unbuffered: a buffer that could not be written would be written again on closing
    try:
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
    finally:
        os.close(descriptor)


def _stem(path: Path) -> str:
    """Return what the names of all temporaries of one target begin with."""
    name = path.name
    if len(os.fsencode(name)) > _MAX_STEM_BYTES:
        name = os.fsencode(name)[:_MAX_STEM_BYTES].decode(errors="ignore")
    return f".{name}{LEFTOVER}"


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories atomically (Linux's renameat2 with RENAME_EXCHANGE); false where that is not to be had."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_cwd, exchange = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0)


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def _remove_leftovers(path: Path) -> None:
    """What killed runs left beside `path`; the writer's lock is held, so nobody is still writing them."""
    for leftover in FileSystem().leftovers(path):
        print(f"removing what a killed run left: {leftover}", file=sys.stderr)
        shutil.rmtree(leftover, ignore_errors=True)
