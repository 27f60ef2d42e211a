"""Disk quota and integrity repair.

A file that belongs to the current and the previous version is on the disk twice (`content_store.py`), and is repaired
from its other copy. Any other damaged blob is quarantined, so that a sync fetches it again. A version that lacks it
is not current as long as the one before it is whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from sartor.core.errors import BudgetError, MissingError, SartorError
from sartor.core.filesystem import FileSystem
from sartor.edge.store.content_store import Blobs, VersionDirectories
from sartor.edge.store.version_pointers import Pointer, Pointers

# Bytes that an update writes beside its content: pointers in two copies, wanted.json, blocks of folders.
_SPARE_BYTES = 1 << 16


class DiskQuota:
    """Disk usage of a store. A file with several names counts once.

    limit_bytes: maximum size of the store; 0 means that only the disk limits it.
    """

    def __init__(
        self, limit_bytes: int, disk: FileSystem, pointers: Pointers, blobs: Blobs, trees: VersionDirectories
    ) -> None:
        self.limit_bytes = limit_bytes
        self._disk, self._pointers, self._blobs, self._trees = disk, pointers, blobs, trees
        self._folder = blobs.folder.parent

    def used_bytes(self) -> int:
        """Return the bytes of every file in the store."""
        return sum(dict(self._files(self._folder)).values())

    def retained_bytes(self, pointers: Iterable[Pointer]) -> int:
        """Return the bytes that remain after a collection that keeps these pointers' versions."""
        files = {inode: size for folder in self._pointers.folders for inode, size in self._files(folder)}
        digests = set(self._blobs.wanted)
        for pointer in pointers:
            for version in pointer.versions:
                digests |= set(version.files.values())
                files.update(self._files(self._trees.path(pointer.name, version.version)))
        for digest in digests:
            files.update(self._files(self._blobs.path(digest)))
        for digest in self._blobs.wanted:
            files.update(self._files(self._blobs.partials / digest))
        return sum(files.values())

    def needed_bytes(self, pointer: Pointer, sizes: Mapping[str, int]) -> int:
        """Return the bytes that blobs of these sizes take beside the current version.

        They are the bytes to fetch, and to copy into the new tree.
        """
        fetched = sum(
            max(0, size - self._blobs.partial(digest)) for digest, size in sizes.items() if not self._blobs.has(digest)
        )
        # Without hard links the fetched bytes are written a second time, into the tree.
        copied = fetched if not self._trees.links else 0
        copied += sum(self._trees.copied_bytes(pointer.name, digest, pointer.current) for digest in sizes)
        return fetched + copied + _SPARE_BYTES

    def fits(self, needed_bytes: int, freed_bytes: int = 0) -> bool:
        """Return whether `needed_bytes` more fit once `freed_bytes` of the used bytes are collected."""
        return self._above_limit(needed_bytes, freed_bytes) <= 0 and self._above_free(needed_bytes, freed_bytes) <= 0

    def refusal(self, subject: str, needed_bytes: int, freed_bytes: int = 0) -> SartorError:
        """Return the error for what does not fit: BudgetError for the store's limit, MissingError for the disk."""
        if (excess := self._above_limit(needed_bytes, freed_bytes)) > 0:
            remaining_bytes = self.used_bytes() - freed_bytes
            return BudgetError(
                f"{subject} needs {needed_bytes:,} bytes beside the {remaining_bytes:,} that stay; the store "
                f"may take {self.limit_bytes:,}",
                f"--limit-bytes {self.limit_bytes + excess}, {excess:,} more; or publish a smaller release",
            )
        free = self._disk.free_bytes(self._folder) + freed_bytes
        return MissingError(
            f"the disk is full: {subject} needs {needed_bytes:,} bytes, {free:,} are free or can be freed",
            f"free {self._above_free(needed_bytes, freed_bytes):,} bytes on the disk that holds {self._folder}",
        )

    def _above_limit(self, needed_bytes: int, freed_bytes: int) -> int:
        """Return the bytes above the store's limit; 0 without a limit."""
        # Walking the store takes a while, so skip it for the many stores without a limit.
        return self.used_bytes() - freed_bytes + needed_bytes - self.limit_bytes if self.limit_bytes else 0

    def _above_free(self, needed_bytes: int, freed_bytes: int) -> int:
        """Return the bytes above the free bytes of the disk; negative if it fits."""
        return needed_bytes - self._disk.free_bytes(self._folder) - freed_bytes

    def _files(self, path: Path) -> Iterator[tuple[int, int]]:
        """Yield (inode, size) of every file below a path."""
        status = self._disk.stat(path)
        if status and status.is_folder:
            for name in self._disk.names(path):
                yield from self._files(path / name)
        elif status:
            yield status.inode, status.size


class IntegrityRepair:
    """Detection and repair of damage in a store. Every step is one rename, and may be repeated."""

    def __init__(self, disk: FileSystem, pointers: Pointers, blobs: Blobs, trees: VersionDirectories) -> None:
        self._disk, self._pointers, self._blobs, self._trees = disk, pointers, blobs, trees

    def damaged_digests(self) -> list[str]:
        """Return the digests of blobs and of versions' files whose bytes differ or are missing."""
        blobs = self._blobs
        damaged = {digest for digest in blobs.digests() if not self._disk.is_whole(blobs.path(digest), digest)}
        for pointer in self._pointers.all():
            for version in pointer.versions:
                damaged |= {digest for _, digest in self._trees.broken(pointer.name, version)}
                damaged |= {digest for digest in version.files.values() if not blobs.has(digest)}
        return sorted(damaged)

    def mend_blob(self, digest: str) -> None:
        """Rewrite a blob from a version's whole file; without one, quarantine it."""
        if self._blobs.has(digest) and self._disk.is_whole(self._blobs.path(digest), digest):
            return
        for pointer in self._pointers.all():
            for version in pointer.versions:
                tree = self._trees.path(pointer.name, version.version)
                files = (tree / file for file, blob_digest in version.files.items() if blob_digest == digest)
                if source := next((file for file in files if self._disk.is_whole(file, digest)), None):
                    self._blobs.mend(digest, source)
                    return
        if self._blobs.has(digest):
            self._blobs.quarantine(digest)

    def mend_trees(self, digest: str) -> None:
        """Rewrite the damaged files of every version that this whole blob belongs to."""
        for pointer in self._pointers.all():
            for version in pointer.versions:
                if digest in version.files.values():
                    self._trees.mend(pointer.name, version, pointer.counterpart(version))

    def fall_back(self, pointer: Pointer) -> str:
        """Make the previous version current if that is whole and the current one is not.

        Returns a message about it, or an empty text. The damaged version waits as staged, so that its blobs are kept
        and it can be activated when it is whole again.
        """
        damaged, previous = pointer.current, pointer.previous
        if damaged is None or previous is None or self.is_whole(pointer) or self._trees.broken(pointer.name, previous):
            return ""
        restored = replace(
            pointer, current=previous.now(), previous=None, staged=pointer.staged or damaged, trial=None
        )
        self._pointers.write(restored)
        return f"{pointer.name} {damaged.version} is damaged: {previous.version} is current again"

    def is_whole(self, pointer: Pointer) -> bool:
        """Return whether there is a current version and every byte of it is as it was written."""
        return pointer.current is not None and not self._trees.broken(pointer.name, pointer.current)
