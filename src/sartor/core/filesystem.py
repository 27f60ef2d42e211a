"""Atomic file and directory writes, locks, crash-testable file operations.

    write_file_atomic         the content of one file, as bytes or written to a stream
    create_file_atomic        the same for a library or a program that needs a path
    create_directory_atomic   a directory that is filled under another name
    FileSystem                every operation, one method each
    touch_private, make_private_folder    what only its owner can read, from its creation on

A temporary file is a hidden sibling, `.NAME.part-PID-THREAD-TIME`. Two writers of one target never share one, and a
failing writer removes its own. Leftovers of a kill are recognised by their name (`FileSystem.leftovers`). A durable
write takes this order: write, fsync of the file, rename, fsync of the folder.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shlex
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from filelock import FileLock, Timeout

from sartor.core.errors import BusyError, ConfigError

Content = bytes | Callable[[BinaryIO], object]
PIECE_BYTES = 1 << 20
LEFTOVER = ".part"
REPLACED = ".replaced"  # a directory that stands aside while its successor takes its name; never cleaned by name alone
# mode of files that their owner alone can read
PRIVATE = 0o600
_ANOTHER_PATH = "choose another path: another --out, or what else named this one (an argument, SARTOR_HOME)"
# a name has at most 255 bytes on Linux, macOS and Windows; process, thread and time take up to 50
_MAX_STEM_BYTES = 200
_fcntl: Any
try:
    from fcntl import fcntl as _fcntl
except ImportError:  # Windows
    _fcntl = None
_FULL_FSYNC: int | None = getattr(sys.modules.get("fcntl"), "F_FULLFSYNC", None)  # macOS
# without it, os.open translates line ends on Windows
_BINARY = getattr(os, "O_BINARY", 0)


def write_file_atomic(path: Path, content: Content, *, mode: int = 0o644, durable: bool = True) -> None:
    """Write a file atomically: its name shows either the old or the whole new content.

    Missing folders are created, with mode 0700 if the file's is 0600.
    content: the bytes, or a function that writes them to the stream it receives.
    mode: permissions of the new file, less the umask.
    durable: whether the new content survives a power cut once this returns. False saves two fsyncs; a power cut may
        then leave a file with no or wrong bytes. Use it only for content that its reader checks and can rebuild.
    Raises OSError as the system calls do; the old file then stays, and no temporary file is left.
    """
    filesystem = PrivateFileSystem() if mode == PRIVATE else FileSystem(mode)
    filesystem.make_folders(path.parent, durable=durable)
    filesystem.replace(path, content, durable=durable)


def make_private_folder(path: Path) -> None:
    """Create a folder and its missing parents such that their owner alone can enter them."""
    PrivateFileSystem().make_folders(path, durable=False)


def touch_private(path: Path) -> None:
    """Create an empty file that its owner alone can read, unless there is one.

    SQLite creates its file as the umask allows, and its journals as the file.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE))


@contextmanager
def create_file_atomic(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield the path of a temporary file to write to; it replaces the file if the block ends without an error.

    durable: as in `write_file_atomic`.
    """
    filesystem, part = FileSystem(), temporary_path(path)
    filesystem.make_folders(path.parent, durable=durable)
    with filesystem.removed_on_error(part):
        yield part
        filesystem.take_name(part, path, durable=durable)


@contextmanager
def create_directory_atomic(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a hidden sibling to fill; without an error it is fsynced and renamed to `path`.

    An error in the block removes what was written. With `replace`, an old directory is removed only after the new one
    has its name. Raises OSError: ENOTEMPTY for an existing directory, NotADirectoryError for a file or a link.
    """
    part = temporary_path(path)
    part.mkdir(parents=True)
    try:
        yield part
        rename_directory_durably(part, path, replace=replace)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def rename_directory_durably(part: Path, path: Path, *, replace: bool = False) -> None:
    """Make everything below `part` durable, then rename it durably to its sibling `path`.

    With `replace`, an existing directory is exchanged in one system call where the kernel supports it. Its content may
    then stand under the name `part`, for the caller to remove.
    """
    fsync_tree(part)
    if path.is_symlink() or path.is_file():
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
    replaced: list[Path] = []
    try:
        while not _take_directory_name(part, path, replace=replace):
            if _exchange(part, path):
                break
            # macOS, NFS and old kernels: two renames. A kill between them leaves the only whole directory under the
            # name of `old`, from which `restore_replaced` brings it back; it is removed after the new one is durable.
            old = path.with_name(f"{_stem(path, REPLACED)}-{time.time_ns():020d}-{os.getpid()}")
            with suppress(FileNotFoundError):  # another writer moved it
                os.replace(path, old)
                replaced.append(old)
    except BaseException:
        restore_replaced(path)
        raise
    fsync_directory(path.parent)
    for old in replaced:
        shutil.rmtree(old, ignore_errors=True)


def replaced_versions(path: Path) -> list[Path]:
    """Return the directories that a replacement of `path` moved aside and a kill left there, oldest first."""
    stems = f"{_stem(path, REPLACED)}-", f"{_stem(path)}-"  # the second, with `-old`, is of older versions of Sartor
    filesystem = FileSystem()
    current = [name for name in filesystem.names(path.parent) if name.startswith(stems[0])]
    older = [name for name in filesystem.names(path.parent) if name.startswith(stems[1]) and name.endswith("-old")]
    return [path.with_name(name) for name in (*older, *current)]


def restore_replaced(path: Path) -> Path | None:
    """Give a directory that a cut-short replacement moved aside its name back, if the name is free.

    Returns what was restored, or None. The caller holds the writer's lock, or is the writer.
    """
    versions = replaced_versions(path)
    if not versions or os.path.lexists(path):
        return None
    os.replace(versions[-1], path)
    fsync_directory(path.parent)
    return versions[-1]


def _take_directory_name(part: Path, path: Path, *, replace: bool) -> bool:
    """Rename a directory to a name that is free or belongs to an empty directory.

    Returns false if the name belongs to a directory with content and `replace` is set; without `replace` that raises
    OSError. The rename is attempted without a check before it, since another writer may take the name in between.
    """
    try:
        os.replace(part, path)
    except OSError as error:
        is_taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
        # Windows reports EACCES for an existing directory, and for other causes too
        if replace and (is_taken or (os.name == "nt" and path.is_dir())):
            return False
        raise
    return True


def temporary_path(path: Path) -> Path:
    """Return the hidden sibling of `path` under which this thread writes its temporary file."""
    return path.with_name(f"{_stem(path)}-{os.getpid()}-{threading.get_ident():x}-{time.monotonic_ns():x}")


def fsync_descriptor(descriptor: int) -> None:
    """Make the content of an open file or directory survive a power cut.

    On macOS, fsync leaves the content in the drive's cache; F_FULLFSYNC empties it. File systems that do not have it
    (some network mounts) get fsync.
    """
    if _FULL_FSYNC is not None:
        with suppress(OSError):
            _fcntl(descriptor, _FULL_FSYNC)
            return
    os.fsync(descriptor)


def fsync_tree(root: Path) -> None:
    """Make every file and every name below a directory survive a power cut."""
    for folder, _, files in os.walk(root):
        for name in files:
            with open(os.path.join(folder, name), "rb+") as stream:
                fsync_descriptor(stream.fileno())
        fsync_directory(Path(folder))


def fsync_directory(path: Path) -> None:
    """Make renames below `path` survive a power cut; on Windows a directory cannot be opened for fsync."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fsync_descriptor(descriptor)
        finally:
            os.close(descriptor)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tree_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder. Links are not followed; what vanishes meanwhile counts nothing."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            status = path.stat(follow_symlinks=False)
            size += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return size


def make_parent(path: Path, *, is_private: bool = False) -> None:
    """Create the folder of an output. Raises ConfigError if it cannot be created or written to.

    is_private: whether only its owner may enter what is created.
    """
    try:
        if is_private:
            make_private_folder(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be made: {error.strerror}", _ANOTHER_PATH) from None
    try:
        # os.access says yes to root, also below /proc and /sys
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f"{path.parent} cannot be written to: {error.strerror}", _ANOTHER_PATH) from None


def check_output_file(file: Path, flag: str, *, replace: bool) -> None:
    """Create the folder of an output file. Raises ConfigError for a directory, or for a file without `replace`.

    flag: option that names the file, for the remedy.
    """
    if file.is_dir():
        raise ConfigError(f"the output {file} is a directory", f"{flag} {shlex.quote(str(file / 'output'))}, a file")
    if file.exists() and not replace:
        raise ConfigError(f"the output {file} exists", f"choose another {flag}, or add --replace")
    make_parent(file)


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold the lock of an output path; raise ConfigError at once if another process holds it.

    The lock ends with the process that holds it.
    """
    lock = _acquire_named(path.parent / f".{path.name}.lock")
    if lock is None:
        raise ConfigError(f"another process is writing {path}", f"wait for it; or {_ANOTHER_PATH}")
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while held: nobody else can hold a lock by this name
        lock.release()


def _acquire_named(file: Path) -> FileLock | None:
    """Return the lock of a lock file, held, or None if another process holds it.

    Its holder removes the file when it is done. A process that opened the file before that would then lock a file
    without a name, beside another process that made the name anew. So a lock counts only if its file still has the
    name after it was taken; otherwise it is tried again.
    """
    while True:
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        descriptor = lock._context.lock_file_fd  # filelock tells the descriptor in no other way
        try:
            if os.name == "nt" or descriptor is None or os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return lock
        except FileNotFoundError:
            pass
        lock.release()


class Stat(NamedTuple):
    """Status of a file or folder.

    inode: equal for two names of one file on the same disk.
    size: bytes.
    """

    inode: int
    size: int
    is_folder: bool


class FileSystem:
    """The file system of this machine. Every method raises OSError as the system call does.

    A test uses a subclass to count the operations, kill the process, fill the disk or cut the power at each of them.
    Nine methods change something (`write` to `rmdir`); only these can fail half-way. The reading methods cannot damage
    anything.
    mode: permissions of the files that it creates, less the umask.
    """

    def __init__(self, mode: int = 0o644) -> None:
        self._mode = mode

    def write(self, path: Path, content: Content) -> None:
        """Create or truncate a file and write to it."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, self._mode)
        if callable(content):
            with os.fdopen(descriptor, "wb") as stream:
                content(stream)
        else:
            _write(descriptor, content)

    def append(self, path: Path, content: bytes) -> None:
        """Append to a file, creating it if necessary."""
        _write(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _BINARY, self._mode), content)

    def sync(self, path: Path) -> None:
        """Make the content of a file survive a power cut; its name needs `sync_folder` as well."""
        descriptor = os.open(path, os.O_RDWR)
        try:
            fsync_descriptor(descriptor)
        finally:
            os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder survive a power cut."""
        fsync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        """Rename a file or folder; an existing file with the new name is replaced atomically."""
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name (hard link)."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file's name."""
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Create a folder; its parent must exist."""
        os.mkdir(path)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def open(self, path: Path) -> BinaryIO:
        """Open a file for reading."""
        return path.open("rb")

    def digest(self, path: Path) -> str:
        """Return the sha256 of a file, hex."""
        return file_digest(path)

    def names(self, path: Path) -> list[str]:
        """Return the sorted names in a folder; empty if there is no such folder."""
        try:
            return sorted(os.listdir(path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def stat(self, path: Path) -> Stat | None:
        """Return the status of a file or folder, or None if there is none. Symbolic links are not followed."""
        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Stat(status.st_ino, status.st_size, os.path.isdir(path) and not os.path.islink(path))

    def free_bytes(self, path: Path) -> int:
        """Return the free bytes on the disk of a folder."""
        return shutil.disk_usage(path).free

    def lock(self, path: Path) -> Callable[[], None]:
        """Take a lock file and return the function that releases it; the process's end releases it too.

        Raises BusyError if another process holds it.
        """
        lock = FileLock(path, thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(
                f"another process writes to the store at {path.parent}",
                f"fuser {path} names it; the same command again once it has ended",
            ) from None
        return lock.release

    # composed of the operations above

    def replace(self, path: Path, content: Content, *, durable: bool = True) -> None:
        """Write a file atomically: its name shows either the old or the whole new content."""
        part = temporary_path(path)
        with self.removed_on_error(part):
            self.write(part, content)
            self.take_name(part, path, durable=durable)

    def take_name(self, part: Path, path: Path, *, durable: bool = True) -> None:
        """Rename a finished temporary file to its target; if durable, sync its content first and the folder last."""
        if durable:
            self.sync(part)
        self.rename(part, path)
        if durable:
            self.sync_folder(path.parent)

    @contextmanager
    def removed_on_error(self, part: Path) -> Iterator[None]:
        """Remove a temporary file or folder if the block raises."""
        try:
            yield
        except BaseException:
            with suppress(OSError):  # the original error matters more
                self.remove(part)
            raise

    def leftovers(self, path: Path) -> list[Path]:
        """Return the temporary files beside `path`, of killed and of active writers."""
        stem = _stem(path)  # the bare stem is the name that older versions used
        names = self.names(path.parent)
        return [path.with_name(name) for name in names if name == stem or name.startswith(f"{stem}-")]

    def remove_leftovers(self, path: Path) -> None:
        """Remove the leftovers of killed writers of `path`; hold the writers' lock, so that none is active."""
        for leftover in self.leftovers(path):
            self.remove(leftover)

    def make_folders(self, path: Path, *, durable: bool = True) -> None:
        """Create a folder and its missing parents."""
        if self.stat(path) is not None:
            return
        self.make_folders(path.parent, durable=durable)
        with suppress(FileExistsError):  # another process created it meanwhile
            self.mkdir(path)
        if durable:
            self.sync_folder(path.parent)

    def copy(self, source: Path, target: Path) -> None:
        """Copy a file and make its content durable.

        It copies piece by piece: a reflink would share the disk blocks, and so their corruption.
        """
        self.write(target, b"")
        with self.open(source) as stream:
            while piece := stream.read(PIECE_BYTES):
                self.append(target, piece)
        self.sync(target)

    def is_whole(self, path: Path, digest: str) -> bool:
        """Return whether a file exists and has this sha256. A block that cannot be read counts as a difference."""
        try:
            return self.digest(path) == digest
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return False
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False

    def remove(self, path: Path) -> None:
        """Remove a file, or a folder with its content.

        It is neither durable nor atomic: use it only for paths that nothing refers to.
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
    """File system that creates files and folders which only their owner can read.

    The permissions hold from the moment of creation.
    """

    def __init__(self) -> None:
        super().__init__(PRIVATE)

    def mkdir(self, path: Path) -> None:
        """Create a folder that only its owner can enter; its parent must exist."""
        os.mkdir(path, 0o700)


def _write(descriptor: int, content: bytes) -> None:
    # unbuffered: closing a buffered file would write a failed buffer again
    try:
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
    finally:
        os.close(descriptor)


def _stem(path: Path, suffix: str = LEFTOVER) -> str:
    """Return the common prefix of the names of all temporary files of one target."""
    name = path.name
    if len(os.fsencode(name)) > _MAX_STEM_BYTES:
        name = os.fsencode(name)[:_MAX_STEM_BYTES].decode(errors="ignore")
    return f".{name}{suffix}"


def _exchange(first: Path, second: Path) -> bool:
    """Swap two directories atomically (Linux's renameat2 with RENAME_EXCHANGE); false if unsupported."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_cwd, exchange = -100, 2
    return bool(renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0)


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def _remove_leftovers(path: Path) -> None:
    """Remove leftovers of killed runs beside `path`.

    The caller holds the writer's lock, so no run is still writing them. What a replacement moved aside takes its name
    back if nothing else has it; only then, or if the successor is there, are such directories leftovers.
    """
    if restored := restore_replaced(path):
        print(f"restoring what a killed run moved aside: {restored} is {path} again", file=sys.stderr)
    for leftover in {*FileSystem().leftovers(path), *replaced_versions(path)}:
        print(f"removing what a killed run left: {leftover}", file=sys.stderr)
        shutil.rmtree(leftover, ignore_errors=True)
