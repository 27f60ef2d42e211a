"""Bit rot: bytes that differ from what was written, found by reading all of them.

A file that is in the current and in the previous version is on the disk twice (`trees.py`), and is mended from its other
copy. Any other blob is quarantined, so that a sync fetches it again; a version that lacks it is not worked with as long as
the one before it is whole.
"""

from __future__ import annotations

from dataclasses import replace

from sartor.core.filesystem import FileSystem
from sartor.edge.store.blobs import Blobs
from sartor.edge.store.pointers import Pointer, Pointers
from sartor.edge.store.trees import Trees


class Rot:
    """What is damaged in a store, and what is done about it. Every step is one rename, and may be repeated."""

    def __init__(self, disk: FileSystem, pointers: Pointers, blobs: Blobs, trees: Trees) -> None:
        self._disk, self._pointers, self._blobs, self._trees = disk, pointers, blobs, trees

    def found(self) -> list[str]:
        """Digests of blobs and of files of versions whose bytes differ, or that are not there."""
        blobs = self._blobs
        bad = {digest for digest in blobs.digests() if not self._disk.is_whole(blobs.path(digest), digest)}
        for pointer in self._pointers.all():
            for version in pointer.versions:
                bad |= {digest for _, digest in self._trees.broken(pointer.name, version)}
                bad |= {digest for digest in version.files.values() if not blobs.has(digest)}
        return sorted(bad)

    def mend_blob(self, digest: str) -> None:
        """Write a blob anew from the file of a version that is whole; without one, quarantine it."""
        if self._blobs.has(digest) and self._disk.is_whole(self._blobs.path(digest), digest):
            return
        for pointer in self._pointers.all():
            for version in pointer.versions:
                tree = self._trees.path(pointer.name, version.version)
                files = (tree / file for file, held in version.files.items() if held == digest)
                if source := next((file for file in files if self._disk.is_whole(file, digest)), None):
                    self._blobs.mend(digest, source)
                    return
        if self._blobs.has(digest):
            self._blobs.quarantine(digest)

    def mend_trees(self, digest: str) -> None:
        """Write anew the damaged files of every version that this blob, which is whole, belongs to."""
        for pointer in self._pointers.all():
            for version in pointer.versions:
                if digest in version.files.values():
                    self._trees.mend(pointer.name, version, pointer.beside(version))

    def fall_back(self, pointer: Pointer) -> str:
        """Make the previous version current if that is whole and the current one is not. Returns what was done, in words.

        The damaged version waits as staged, so that its blobs are kept and it can be activated when it is whole again.
        """
        bad, old = pointer.current, pointer.previous
        if bad is None or old is None or self.is_whole(pointer) or self._trees.broken(pointer.name, old):
            return ""
        back = replace(pointer, current=old.now(), previous=None, staged=pointer.staged or bad, trial=None)
        self._pointers.write(back)
        return f"{pointer.name} {bad.version} is damaged: {old.version} is current again"

    def is_whole(self, pointer: Pointer) -> bool:
        """Whether there is a current version and every byte of it is as it was written."""
        return pointer.current is not None and not self._trees.broken(pointer.name, pointer.current)
