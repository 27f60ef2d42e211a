"""Finding and opening of files without leaving the folder of the source.

Files that are found and not read (a link out of the folder, a pipe, a device, an artefact of Sartor) are listed with a
reason. Hidden files and folders (a leading dot) and work folders of `curate` are skipped, as the documentation says.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sartor.core.artifacts import MANIFESTS, kind_of, read_manifest
from sartor.core.errors import ArtifactError, ConfigError
from sartor.core.records import MalformedRow

WORK_SUFFIX = ".curating"  # of the folder beside an output in which `curate` works
_BLOCK_BYTES = 1 << 20
_MOST_MANIFEST_BYTES = 64 << 20
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_KIND_NAMES = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISDIR, "a folder"),
)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """File of a source.

    name: name for locators.
    refusal: (reason, detail) if the file may not be read.
    """

    path: str
    name: str
    refusal: tuple[str, str] = ("", "")


def find_files(declared: str) -> list[SourceFile]:
    """Return the files of a file, folder or glob pattern, sorted by name.

    Raises ConfigError if there is none.
    """
    root = os.path.expanduser(declared)
    if "\0" in root:
        raise ConfigError(
            f"the source {declared!r} holds a NUL character", f"path: {declared.replace(chr(0), '')[:200]!r}"
        )
    try:
        mode = os.stat(root).st_mode
    except OSError as error:
        mode = 0
        if not glob.has_magic(root) and error.errno != errno.ENOENT:
            raise ConfigError(
                f"the source {declared[:200]!r}: {error.strerror}", f"ls -ld {root[:200]!r} says who may read it"
            ) from None
    if stat.S_ISDIR(mode):
        files = list(_walk(root))
        files.sort(key=lambda file: file.name.split("/"))
    elif mode and not stat.S_ISREG(mode):
        raise ConfigError(
            f"the source {declared!r} is {_kind_name(mode)}, not a file or folder",
            f"cat {declared[:200]} > rows.jsonl, and path: rows.jsonl",
        )
    elif mode:
        return [SourceFile(root, safe_name(os.path.basename(root)))]
    else:
        paths = sorted(glob.glob(root, recursive=True)) if glob.has_magic(root) else []
        files = [_listed(path) for path in paths if not os.path.isdir(path)]
    if not files:
        problem = "is an empty folder" if mode else "names no file"
        raise ConfigError(
            f"the source {declared!r} {problem}",
            f"ls {os.path.dirname(root) or '.'}; the path is taken from the current directory",
        )
    return files


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading, without ever waiting for a pipe or device.

    Raises OSError, or MalformedRow for anything but a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise MalformedRow("not_a_file", f"this is {_kind_name(mode)}, not a regular file")
    return os.fdopen(descriptor, "rb", buffering=1 << 18)


def read_at_most(stream: BinaryIO, max_bytes: int) -> bytes:
    """Return what a stream holds, or its first `max_bytes` + 1 bytes if it holds more.

    `read(n)` allocates n bytes before it reads, so a small file would take as much memory as the largest one.
    """
    content = bytearray()
    while len(content) <= max_bytes and (block := stream.read(min(_BLOCK_BYTES, max_bytes + 1 - len(content)))):
        content += block
    return bytes(content)


def safe_name(name: str) -> str:
    """Return a name that any file can hold and any line can show, with special characters escaped.

    Control characters and undecodable bytes are escaped.
    """
    if name.isascii() and name.isprintable():
        return name
    shown = _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), name)
    return shown.encode("utf-8", "backslashreplace").decode()


def _walk(root: str) -> Iterator[SourceFile]:
    """Yield every file below a folder that is not hidden; links to folders are listed and not followed."""
    real_root = os.path.realpath(root)
    waiting = [(root, "")]
    while waiting:
        folder, prefix = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            yield SourceFile(
                folder, safe_name(prefix.rstrip("/")) or ".", ("unreadable_file", f"the folder: {error.strerror}")
            )
            continue
        for entry in entries:
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name.startswith(".") or (is_folder and entry.name.endswith(WORK_SUFFIX)):
                continue
            name = prefix + entry.name
            if entry.is_symlink():
                yield SourceFile(entry.path, safe_name(name), _refuse_link(entry.path, real_root))
            elif is_folder:
                if (refusal := _refuse_own_output(entry.path))[0]:
                    yield SourceFile(entry.path, safe_name(name), refusal)
                else:
                    waiting.append((entry.path, f"{name}/"))
            elif entry.is_file(follow_symlinks=False):
                yield SourceFile(entry.path, safe_name(name))
            else:
                yield SourceFile(entry.path, safe_name(name), _refuse_mode(entry.stat(follow_symlinks=False).st_mode))


def _refuse_own_output(folder: str) -> tuple[str, str]:
    """Return (reason, detail) for a folder that is an artefact of Sartor; empty for any other.

    A second run would otherwise learn the card and the rows that the first one wrote below the same source.
    """
    path = Path(folder)
    try:
        kind = kind_of(path)
        if kind is None or (path / MANIFESTS[kind]).stat().st_size > _MOST_MANIFEST_BYTES:
            return "", ""
        read_manifest(path, [kind])
    except (OSError, ArtifactError):  # a folder that cannot be read, or another program's file of the same name
        return "", ""
    detail = (
        f"Sartor has written this folder ({kind}), so nothing in it is read; name its files as a source of their own"
    )
    return "own_output", f"{detail} if they are meant"


def _refuse_link(path: str, real_root: str) -> tuple[str, str]:
    """Return (reason, detail) for a symbolic link in a folder; empty if its target is a file of the same folder."""
    target = os.path.realpath(path)
    shown = safe_name(os.readlink(path))[:200]
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return "broken_link", f"a link to {shown!r}: {error.strerror}"
    if os.path.commonpath([real_root, target]) != real_root:
        return "link_outside", f"a link to {shown!r}, outside the folder of the source; name that place as a source"
    if stat.S_ISDIR(mode):
        return (
            "folder_link",
            f"a link to the folder {shown!r} of the same source; it is read where it stands, not twice",
        )
    return _refuse_mode(mode)


def _listed(path: str) -> SourceFile:
    """Return a file that a pattern matches."""
    name = safe_name(path)
    try:
        return SourceFile(path, name, _refuse_mode(os.stat(path).st_mode))
    except OSError as error:
        return SourceFile(path, name, ("unreadable_file", f"{error.strerror}"))


def _refuse_mode(mode: int) -> tuple[str, str]:
    return ("", "") if stat.S_ISREG(mode) else ("not_a_file", f"this is {_kind_name(mode)}, not a regular file")


def _kind_name(mode: int) -> str:
    return next((name for test, name in _KIND_NAMES if test(mode)), "no file")
