"""Content-addressed blobs and version directories.

partial/SHA256      bytes downloaded so far
blobs/SHA256        the whole blob, checked: its bytes were durable before it got this name
quarantine/SHA256   a blob whose bytes differ now; moved away, so that it is fetched again
wanted.json         the digests of the update in progress, so that no collection removes its downloads

A file of a tree is a hard link to its blob, which takes no space. Symbolic links are impossible: a Release whose
files lie outside it is refused. But a file of the current and the previous version must not be the same file on the
disk, or one bad block damages both. There the tree gets a copy of its own, as the two slots of an A/B device do. So
every such file exists twice, and `verify` rewrites either from the other.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from sartor.core import records
from sartor.core.errors import StoreError
from sartor.core.filesystem import LEFTOVER, FileSystem
from sartor.edge.store.version_pointers import DIGEST, StoredVersion, tree_of

# An fsync takes tens of milliseconds on an SD card, so not every piece has its own. ext4, F2FS and btrfs extend a file
# only after its bytes are on the disk, so a power cut shortens a partial download. `finish` would detect garbage.
_SYNC_EACH_BYTES = 4 << 20


class Blobs:
    """Blobs of a store, whole and partial."""

    def __init__(self, disk: FileSystem, folder: Path) -> None:
        self._disk = disk
        self.folders = tuple(folder / name for name in ("blobs", "partial", "quarantine"))
        self.folder, self.partials, self.quarantined = self.folders
        self._wanted_file = folder / "wanted.json"
        self.wanted: set[str] = set()
        self._unsynced: dict[str, int] = {}

    def path(self, digest: str) -> Path:
        """Return the path of a whole blob.

        Raises StoreError for a text that is no sha256, since it could lead to another path.
        """
        if not DIGEST.fullmatch(digest):
            raise StoreError(f"{digest!r:.80} is no sha256 in 64 hexadecimal digits", "give the digest of the blob")
        return self.folder / digest

    def has(self, digest: str) -> bool:
        """Return whether a blob is there; it was checked before it got its name."""
        return self._disk.stat(self.path(digest)) is not None

    def digests(self) -> list[str]:
        """Return the digests of all whole blobs."""
        return self._disk.names(self.folder)

    def partial(self, digest: str) -> int:
        """Return the size of an interrupted download in bytes; 0 if there is none."""
        status = self._disk.stat(self.partials / self.path(digest).name)
        return status.size if status else 0

    def append(self, digest: str, offset: int, content: bytes) -> None:
        """Append to a partial blob. Raises StoreError if `offset` is not its end."""
        partial_bytes = self.partial(digest)
        if offset != partial_bytes:
            raise StoreError(
                f"the partial blob {digest[:16]} has {partial_bytes:,} bytes; content for byte {offset:,} does "
                "not go on from there",
                f"fetch from byte {partial_bytes:,}, or discard the partial blob and begin anew",
            )
        self.wanted.add(digest)
        self._disk.append(self.partials / digest, content)
        self._unsynced[digest] = self._unsynced.get(digest, 0) + len(content)
        if self._unsynced[digest] >= _SYNC_EACH_BYTES:
            self._sync(digest)

    def _sync(self, digest: str) -> None:
        """Make a partial blob durable; discard it if that fails."""
        try:
            self._disk.sync(self.partials / digest)
        except OSError:
            # After a failed fsync the kernel marks the pages clean, and the next fsync succeeds without writing them.
            # Bytes read from the cache may then differ from those on the disk, so the download is discarded.
            self.discard(digest)
            raise
        self._unsynced.pop(digest, None)

    def finish(self, digest: str) -> None:
        """Check a partial blob and make it a whole one.

        Raises StoreError, and removes it, if its bytes have another digest.
        """
        if self.has(digest):
            self.discard(digest)
            return
        self.wanted.add(digest)
        partial_file = self.partials / digest
        if self._disk.stat(partial_file) is None:
            self._disk.write(partial_file, b"")  # an empty blob has nothing to fetch
        self._sync(digest)
        if not self._disk.is_whole(partial_file, digest):
            actual_digest = self._disk.digest(partial_file)
            self.discard(digest)
            raise StoreError(
                f"what was fetched as {digest[:16]} has the sha256 {actual_digest[:16]}; it was removed",
                "sartor edge sync URL NAME --device ID --root 1.root.json, again; then with another mirror's URL",
            )
        self._disk.rename(partial_file, self.path(digest))
        self._disk.sync_folder(self.folder)

    def discard(self, digest: str) -> None:
        """Remove a partial blob, if there is one."""
        self._unsynced.pop(digest, None)
        self._disk.remove(self.partials / self.path(digest).name)

    def open(self, digest: str) -> BinaryIO:
        """Open a whole blob for reading. Raises StoreError if there is none."""
        if not self.has(digest):
            raise StoreError(
                f"the store holds no blob {digest[:16]}", "sartor edge sync URL NAME --device ID --root 1.root.json"
            )
        return self._disk.open(self.path(digest))

    def mend(self, digest: str, source: Path) -> None:
        """Rewrite a blob from a whole file."""
        temp_file = self.partials / f".{digest}{LEFTOVER}"
        self._disk.copy(source, temp_file)
        self._disk.rename(temp_file, self.path(digest))
        self._disk.sync_folder(self.folder)

    def quarantine(self, digest: str) -> None:
        """Move a blob to the quarantine."""
        self._disk.rename(self.path(digest), self.quarantined / digest)
        self._disk.sync_folder(self.folder)

    def want(self, digests: Iterable[str]) -> None:
        """Protect these blobs from collection, durably, until they are part of a staged version."""
        self.wanted = set(digests)
        self._disk.replace(self._wanted_file, records.canonical(sorted(self.wanted)))

    def staged(self, digests: Iterable[str]) -> None:
        """Remove these blobs from the wanted ones: a version protects them now."""
        self.wanted -= set(digests)
        if not self.wanted:
            self._disk.remove(self._wanted_file)

    def recall(self) -> None:
        """Restore the set of wanted blobs after a restart, with the partial downloads.

        A damaged list costs a download at most, so it is no error.
        """
        self.wanted = set(self._disk.names(self.partials))
        try:
            with self._disk.open(self._wanted_file) as stream:
                fields = json.loads(stream.read())
        except (OSError, ValueError, RecursionError):
            return
        if isinstance(fields, list):
            self.wanted |= {item for item in fields if isinstance(item, str) and DIGEST.fullmatch(item)}


# FAT and some network file systems have no hard links, and a file has a maximum number of links (EMLINK).
_CANNOT_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)


class VersionDirectories:
    """Version directories (trees) of a store."""

    def __init__(self, disk: FileSystem, folder: Path, blobs: Blobs) -> None:
        self._disk, self._blobs = disk, blobs
        self._store, self.folder = folder, folder / "releases"
        self.links = True

    def path(self, name: str, version: str) -> Path:
        """Return the path of a version's tree."""
        return self._store / tree_of(name, version)

    def all(self) -> Iterator[Path]:
        """Yield every tree, with the leftovers of killed processes."""
        for name in self._disk.names(self.folder):
            yield from (self.folder / name / version for version in self._disk.names(self.folder / name))

    def build(self, name: str, version: StoredVersion, counterpart: StoredVersion | None) -> Path:
        """Build the tree of a version that has none, durably.

        counterpart: version with which it must not share a file on the disk.
        """
        target = self.path(name, version.version)
        temp_tree = target.with_name(f".{target.name}{LEFTOVER}")
        folders = {
            temp_tree,
            *(
                parent
                for file in version.files
                for parent in (temp_tree / file).parents
                if temp_tree in parent.parents
            ),
        }
        if self._disk.stat(target.parent) is None:
            self._disk.mkdir(target.parent)
        self._disk.sync_folder(self.folder)
        for leftover in (temp_tree, target):
            self._disk.remove(leftover)
        for folder in sorted(folders):  # a parent sorts before its children
            self._disk.mkdir(folder)
        for file, digest in version.files.items():
            self._put(digest, temp_tree / file, self._inodes(name, counterpart, digest))
        for folder in folders:
            self._disk.sync_folder(folder)
        self._disk.rename(temp_tree, target)
        self._disk.sync_folder(target.parent)
        return target

    def mend(self, name: str, version: StoredVersion, counterpart: StoredVersion | None) -> None:
        """Rewrite each damaged file of a tree whose blob is whole, with one rename each."""
        temp_file = self.folder / name / f".mending{LEFTOVER}"
        for file, digest in self.broken(name, version):
            if not self._blobs.has(digest):
                continue
            self._disk.remove(temp_file)
            self._put(digest, temp_file, self._inodes(name, counterpart, digest))
            target = self.path(name, version.version) / file
            self._disk.rename(temp_file, target)
            self._disk.sync_folder(target.parent)

    def broken(self, name: str, version: StoredVersion) -> list[tuple[str, str]]:
        """Return the files of a tree that are missing or have other bytes, with their digests.

        It reads every byte of the tree.
        """
        tree = self.path(name, version.version)
        return [
            (file, digest) for file, digest in version.files.items() if not self._disk.is_whole(tree / file, digest)
        ]

    def copied_bytes(self, name: str, digest: str, counterpart: StoredVersion | None) -> int:
        """Return the bytes that putting a blob into a tree takes on the disk; 0 for a link."""
        blob = self._disk.stat(self._blobs.path(digest))
        if blob is None:
            return 0
        return 0 if self.links and blob.inode not in self._inodes(name, counterpart, digest) else blob.size

    def _inodes(self, name: str, version: StoredVersion | None, digest: str) -> set[int]:
        """Return the inodes of a version's files with this digest."""
        if version is None:
            return set()
        tree = self.path(name, version.version)
        statuses = [
            self._disk.stat(tree / file) for file, blob_digest in version.files.items() if blob_digest == digest
        ]
        return {stat.inode for stat in statuses if stat}

    def _put(self, digest: str, target: Path, avoided_inodes: set[int]) -> None:
        """Link a blob to `target`, or copy it where it may not or cannot be linked.

        Raises StoreError if the copy has another digest.
        """
        source = self._blobs.path(digest)
        blob = self._disk.stat(source)
        if self.links and blob and blob.inode not in avoided_inodes:
            try:
                self._disk.link(source, target)
                return
            except OSError as error:
                if error.errno not in _CANNOT_LINK:
                    raise
                self.links = error.errno == errno.EMLINK
        self._disk.copy(source, target)
        if not self._disk.is_whole(target, digest):
            # A blob that decayed since it was checked must not get a second copy.
            raise StoreError(
                f"the blob {digest[:16]} is damaged",
                "sartor edge verify --store STORE, then sartor edge sync URL NAME --device ID --root 1.root.json",
            )


def check_files(files: object) -> None:
    """Raise StoreError unless every path of a version stays inside its tree.

    The paths come from outside, signed or not.
    """
    if not isinstance(files, dict) or not files:
        raise StoreError("a version without files cannot be staged", "give path -> digest of each file of the release")
    for path in files:
        parts = path.split("/")
        is_plain = all(part and part not in (".", "..") and len(part.encode()) < 256 for part in parts)
        if not is_plain or "\\" in path or not path.isprintable():
            raise StoreError(
                f"{path!r:.80} is no path inside a release", "give relative paths, with / between their parts"
            )
        if any("/".join(parts[:count]) in files for count in range(1, len(parts))):
            raise StoreError(f"{path!r:.80} lies below a file of the same release", "give each file a path of its own")
