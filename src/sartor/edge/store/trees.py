"""A version's files as a directory that can be opened as a Release: releases/NAME/VERSION/.

A file of a tree is a hard link to its blob, which takes no room. Symbolic links would not do: a Release is refused whose
files lie outside it. But a file that is in the current version and in the previous one must not be the same file on the
disk, or one bad block takes both of them: there the tree gets a copy of its own, as the two slots of an A/B device do. So
every such file is there twice, and `verify` writes either from the other.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

from sartor.core.errors import StoreError
from sartor.core.filesystem import LEFTOVER, FileSystem
from sartor.edge.store.blobs import Blobs
from sartor.edge.store.pointers import Version, tree_of

# FAT has no hard links, some network file systems neither; and one file has only so many names.
_CANNOT_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class Trees:
    """The trees of a store."""

    def __init__(self, disk: FileSystem, folder: Path, blobs: Blobs) -> None:
        self._disk, self._blobs = disk, blobs
        self._store, self.folder = folder, folder / "releases"
        self.links = True

    def path(self, name: str, version: str) -> Path:
        """Where the tree of a version is."""
        return self._store / tree_of(name, version)

    def all(self) -> Iterator[Path]:
        """Every tree, and what killed processes left of one."""
        for name in self._disk.names(self.folder):
            yield from (self.folder / name / version for version in self._disk.names(self.folder / name))

    def build(self, name: str, version: Version, beside: Version | None) -> Path:
        """Make the tree of a version that has none, durably; `beside`: the version that it may share no file with."""
        target = self.path(name, version.version)
        part = target.with_name(f".{target.name}{LEFTOVER}")
        folders = {part, *(parent for file in version.files for parent in (part / file).parents if part in parent.parents)}
        if self._disk.stat(target.parent) is None:
            self._disk.mkdir(target.parent)
        self._disk.sync_folder(self.folder)
        for leftover in (part, target):
            self._disk.remove(leftover)
        for folder in sorted(folders):  # a parent is before what it holds
            self._disk.mkdir(folder)
        for file, digest in version.files.items():
            self._put(digest, part / file, self._inodes(name, beside, digest))
        for folder in folders:
            self._disk.sync_folder(folder)
        self._disk.rename(part, target)
        self._disk.sync_folder(target.parent)
        return target

    def mend(self, name: str, version: Version, beside: Version | None) -> None:
        """Write anew each file of a tree that is damaged and whose blob is whole, one rename each."""
        part = self.folder / name / f".mending{LEFTOVER}"
        for file, digest in self.broken(name, version):
            if not self._blobs.has(digest):
                continue
            self._disk.remove(part)
            self._put(digest, part, self._inodes(name, beside, digest))
            target = self.path(name, version.version) / file
            self._disk.rename(part, target)
            self._disk.sync_folder(target.parent)

    def broken(self, name: str, version: Version) -> list[tuple[str, str]]:
        """Files of a tree that are missing or have other bytes, with their digests. Reads all of it."""
        tree = self.path(name, version.version)
        return [(file, digest) for file, digest in version.files.items() if not self._disk.is_whole(tree / file, digest)]

    def copied_bytes(self, name: str, digest: str, beside: Version | None) -> int:
        """What putting a blob into a tree takes of the disk: nothing for a link."""
        blob = self._disk.stat(self._blobs.path(digest))
        if blob is None:
            return 0
        return 0 if self.links and blob.inode not in self._inodes(name, beside, digest) else blob.size

    def _inodes(self, name: str, version: Version | None, digest: str) -> set[int]:
        """Which files on the disk hold a digest for a version."""
        if version is None:
            return set()
        tree = self.path(name, version.version)
        found = [self._disk.stat(tree / file) for file, held in version.files.items() if held == digest]
        return {stat.inode for stat in found if stat}

    def _put(self, digest: str, target: Path, taken: set[int]) -> None:
        source = self._blobs.path(digest)
        blob = self._disk.stat(source)
        if self.links and blob and blob.inode not in taken:
            try:
                self._disk.link(source, target)
                return
            except OSError as error:
                if error.errno not in _CANNOT_LINK:
                    raise
                self.links = error.errno == errno.EMLINK
        self._disk.copy(source, target)
        if not self._disk.is_whole(target, digest):
            # A blob that rotted since it was checked must not get a second, newer copy.
            raise StoreError(f"the blob {digest[:16]} is damaged", "verify the store, then fetch the blob again")


def check_files(files: object) -> None:
    """Raise StoreError unless every path of a version stays inside its tree: it comes from outside, signed or not."""
    if not isinstance(files, dict) or not files:
        raise StoreError("a version without files cannot be staged", "give path -> digest of each file of the release")
    for path in files:
        parts = path.split("/")
        plain = all(part and part not in (".", "..") and len(part.encode()) < 256 for part in parts)
        if not plain or "\\" in path or not path.isprintable():
            raise StoreError(f"{path!r:.80} is no path inside a release", "give relative paths, with / between their parts")
        if any("/".join(parts[:count]) in files for count in range(1, len(parts))):
            raise StoreError(f"{path!r:.80} lies below a file of the same release", "give each file a path of its own")
