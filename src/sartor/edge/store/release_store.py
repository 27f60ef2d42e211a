"""Crash-safe A/B store of Releases.

    append, finish   blobs are downloaded                      the device works with 1.0
    stage            a tree of 1.1 beside that of 1.0          ... with 1.0
    activate         health check of 1.1, then one rename      ... with 1.0 until the rename, with 1.1 from it on
    start, confirm   1.1 on trial confirms that it works       ... with 1.1, or with 1.0 once its starts are used up
    rollback         one rename back                           ... with 1.1 until the rename, with 1.0 from it on

Three rules ensure this. (1) Content is durable before it is named: bytes are fsynced before they get a name, a tree
and its folders before the pointer names it. (2) One rename commits, and it replaces a file that holds the whole
state. (3) Nothing is removed before the pointer that no longer names it is durable. So a kill or a power cut at any
operation leaves files that nothing names, which the next opening or collection removes. It never leaves a name
without its files.

The running program reads with `installed`, which takes no lock and never waits for an update. Files are touched
through `core.filesystem.FileSystem` alone: tests kill the process, fill the disk and cut the power at each of its
operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from sartor.core.config import is_valid_name
from sartor.core.errors import BudgetError, HealthError, MissingError, SartorError, StoreError
from sartor.core.filesystem import DISK_FULL, FileSystem
from sartor.edge.store import version_pointers
from sartor.edge.store.content_store import Blobs, VersionDirectories, check_files
from sartor.edge.store.store_maintenance import DiskQuota, IntegrityRepair
from sartor.edge.store.version_pointers import (
    Installed,
    Pointer,
    Pointers,
    StoredVersion,
    StoreState,
    installed,
    states,
)

__all__ = ["Installed", "StoreState", "ReleaseStore", "installed", "states"]


class ReleaseStore:
    """Store at a folder, created if absent; its only writer until `close` or the end of the process.

    Opening it removes the leftovers of a killed update and rewrites a damaged pointer; `mended` lists these repairs,
    in words.

    limit_bytes: maximum size of the store on the disk; 0 means no limit.

    Raises BusyError if another process writes to the store. Every method raises MissingError if the disk is full or
    cannot be written to. The current version is unchanged then, and the same call succeeds once there is space.
    """

    def __init__(self, folder: Path, *, limit_bytes: int = 0, disk: FileSystem | None = None) -> None:
        self.folder = folder.absolute()
        self.mended: list[str] = []
        self._disk = disk or FileSystem()
        self._pointers = Pointers(self._disk, self.folder)
        self._blobs = Blobs(self._disk, self.folder)
        self._trees = VersionDirectories(self._disk, self.folder, self._blobs)
        self._quota = DiskQuota(limit_bytes, self._disk, pointers=self._pointers, blobs=self._blobs, trees=self._trees)
        self._repair = IntegrityRepair(self._disk, self._pointers, self._blobs, self._trees)
        self._unlock: Callable[[], None] = lambda: None
        try:
            with self._writing("the store"):
                self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock, so that another process can write."""
        self._unlock()

    def _open(self) -> None:
        """Create the folders, take the lock and repair the leftovers of an interrupted process."""
        folders = self._folders()
        for path in (*reversed(self.folder.parents), self.folder):
            if self._disk.stat(path) is None:
                self._disk.mkdir(path)
                self._disk.sync_folder(path.parent)
        self._unlock = self._disk.lock(self.folder / "lock")
        for path in folders:
            if self._disk.stat(path) is None:
                self._disk.mkdir(path)
        # A rename by a killed process is visible but maybe not durable: sync it before anything relies on it.
        for path in (self.folder.parent, self.folder, *self._pointers.folders, self._blobs.folder, self._trees.folder):
            self._disk.sync_folder(path)
        self._sweep()
        self._blobs.recall()
        self.mended += self._pointers.restore()

    def _folders(self) -> tuple[Path, ...]:
        return (*self._pointers.folders, *self._blobs.folders, self._trees.folder)

    def _sweep(self) -> None:
        """Remove what an interrupted write left under a hidden name, which nothing refers to."""
        for folder in (self.folder, *self._folders()):
            for name in self._disk.names(folder):
                if name.startswith("."):
                    self._disk.remove(folder / name)
        for tree in self._trees.all():
            if tree.name.startswith("."):
                self._disk.remove(tree)

    @contextmanager
    def _writing(self, subject: str) -> Iterator[None]:
        """Translate an OSError inside into a MissingError about `subject`."""
        try:
            yield
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise MissingError(
                    f"{subject} could not be written to {self.folder}: {error.strerror or error}",
                    f"ls -ld {self.folder}; df -h {self.folder}; then the same command again",
                ) from error
            with suppress(OSError):  # the next opening sweeps again
                self._sweep()
            # as text, since a commit whose fsync failed may be visible already
            currents = [f"{item.name} {item.current.version}" for item in self._pointers.all() if item.current]
            raise MissingError(
                f"the disk is full: {subject} could not be written; current: {', '.join(currents) or 'nothing yet'}",
                f"free some space on the disk that holds {self.folder}; the same call then goes on where this one "
                "stopped",
            ) from error

    # blobs

    def has(self, digest: str) -> bool:
        """Return whether the blob with this sha256 (hex) is there, whole and checked."""
        return self._blobs.has(digest)

    def partial(self, digest: str) -> int:
        """Return the size of an interrupted download in bytes, from which `append` continues."""
        return self._blobs.partial(digest)

    def append(self, digest: str, offset: int, content: bytes) -> None:
        """Append to a download.

        Raises StoreError if `offset` is not `partial(digest)`, BudgetError above the store's limit.
        """
        with self._writing(f"the blob {digest[:16]}"):
            self._make_room(f"the blob {digest[:16]}", len(content))
            self._blobs.append(digest, offset, content)

    def finish(self, digest: str) -> None:
        """Check a download and make it a whole blob, durably.

        A quarantined blob is restored by this, and so are the files of the versions that contain it. Raises
        StoreError if its bytes have another digest; it is removed then.
        """
        with self._writing(f"the blob {digest[:16]}"):
            is_new = not self._blobs.has(digest)
            self._blobs.finish(digest)
            if is_new:
                self._repair.mend_trees(digest)

    def discard(self, digest: str) -> None:
        """Remove a partial download, so that it can begin again."""
        with self._writing(f"the blob {digest[:16]}"):
            self._blobs.discard(digest)

    def open(self, digest: str) -> BinaryIO:
        """Open a whole blob for reading. Raises StoreError if there is none."""
        return self._blobs.open(digest)

    # versions

    def make_room(self, name: str, sizes: Mapping[str, int]) -> None:
        """Make room for an update; call it before the update is fetched.

        sizes: bytes of each blob of the new version, by digest.

        Garbage is collected if need be. Then the previous version is given up (the new one takes the slot of the old,
        as in every A/B update) unless the current one is damaged or on trial. From here on no collection removes
        these blobs. Raises BudgetError or MissingError, before anything is removed or fetched, if the update cannot
        fit beside the current version.
        """
        pointer = self._read(name)
        subject = f"the update of {name}"
        with self._writing(subject):
            self._blobs.wanted = set(sizes)
            needed_bytes = self._quota.needed_bytes(pointer, sizes)
            if not self._quota.fits(needed_bytes):
                self._clear_space(pointer, subject, needed_bytes)
            self._blobs.want(sizes)

    def _clear_space(self, pointer: Pointer, subject: str, needed_bytes: int) -> None:
        """Collect garbage, and give up the previous version if that is not enough.

        Raises before anything is removed if both are not enough.
        """
        others = [item for item in self._pointers.all() if item.name != pointer.name]
        current_only = replace(pointer, previous=None, staged=None)
        used = self._quota.used_bytes()
        freed_bytes = used - self._quota.retained_bytes([pointer, *others])
        if not self._quota.fits(needed_bytes, freed_bytes):
            # if the current version is damaged or on trial, the previous may be the only one that works
            if self._repair.is_whole(pointer) and not pointer.trial:
                freed_bytes = used - self._quota.retained_bytes([current_only, *others])
            if not self._quota.fits(needed_bytes, freed_bytes):
                raise self._quota.refusal(subject, needed_bytes, freed_bytes)
            self._collect()  # on a completely full disk, writing the pointer needs some of this space
            self._pointers.write(current_only)
        self._collect()

    def stage(self, name: str, version: str, files: Mapping[str, str]) -> Path:
        """Build a directory of blobs that can be opened as a Release.

        files: path inside it -> digest.

        A version that is there already is repaired where it is damaged. One version is staged at a time: another
        staged one is given up. Raises StoreError for a missing blob, a path that leads outside, or a version that is
        installed with other files; HealthError for a version that was refused here.
        """
        pointer = self._read(name)
        new_version = self._checked(pointer, version, files)
        with self._writing(f"{name} {version}"):
            stored = pointer.find(version)
            if stored and stored.files == new_version.files:
                self._trees.mend(name, stored, pointer.counterpart(stored))
            else:
                if stored:  # staged with other files: no pointer may name a tree that is not whole
                    pointer = replace(pointer, staged=None)
                    self._pointers.write(pointer)
                copied = sum(self._trees.copied_bytes(name, file, pointer.current) for file in files.values())
                self._make_room(f"{name} {version}", copied)
                self._pointers.settle()  # a tree of this name may be replaced
                self._trees.build(name, new_version, pointer.current)
                self._pointers.write(replace(pointer, staged=new_version))
            self._blobs.staged(files.values())
        return self._trees.path(name, version)

    def _checked(self, pointer: Pointer, version: str, files: Mapping[str, str]) -> StoredVersion:
        """Return the version to stage. Raises StoreError or HealthError if it cannot be staged."""
        if not is_valid_name(version):
            raise StoreError(f"{version!r:.80} is no version", "lower-case letters, digits, '.', '_' and '-'")
        version_pointers.check(pointer, version)
        check_files(dict(files))
        if missing := sorted({digest for digest in files.values() if not self._blobs.has(digest)}):
            raise StoreError(
                f"{pointer.name} {version} lacks {len(missing)} of its blobs, as {missing[0][:16]}",
                "fetch what `has` denies",
            )
        stored = pointer.find(version)
        if stored and stored is not pointer.staged and stored.files != dict(files):
            raise StoreError(
                f"{pointer.name} {version} is installed with other files",
                f"sartor release ADAPTER --name {pointer.name} --version NEW --key KEYS, and publish that",
            )
        return StoredVersion(version, dict(files))

    def activate(self, name: str, version: str, healthy: Callable[[Path], None], *, starts: int = 0) -> None:
        """Make a staged version the current one, durably, if it is whole and `healthy` returns.

        healthy: gets the version's directory and raises an error if it fails. The old version is current until it has
        returned. So a version that hangs, or kills the process, changes nothing.
        starts: number of starts of the trial, as `start` counts them; 0 means no trial.

        Raises HealthError with the reason, and StoreError for a version that is not staged or is damaged. A version
        that fails is refused from then on (`refused`). MissingError and BudgetError are exceptions: something outside
        or memory was missing for the check, which is no fault of the version.
        """
        pointer = self._read(name)
        version_pointers.check(pointer, version)
        stored = pointer.find(version)
        if stored is None:
            raise StoreError(
                f"{name} {version} is not in the store",
                f"sartor edge sync URL {name} --device ID --root 1.root.json --store {self.folder}",
            )
        if broken := self._trees.broken(name, stored):
            raise StoreError(
                f"{name} {version} is damaged: {broken[0][0]}",
                f"sartor edge verify --store {self.folder}, then sartor edge sync URL {name} --device ID --root "
                "1.root.json",
            )
        try:
            healthy(self._trees.path(name, version))
        except Exception as error:
            reason = error.problem if isinstance(error, SartorError) else f"{type(error).__name__}: {error}"
            if stored is not pointer.current and not isinstance(error, (MissingError, BudgetError)):
                with self._writing(f"{name} {version}"):
                    self._pointers.write(version_pointers.refused(pointer, version, reason))
            stays = f"{pointer.current.version} stays current" if pointer.current else "nothing is current"
            raise HealthError(
                f"{name} {version} is not healthy: {reason}; {stays}",
                f"publish a version that passes; sartor edge sync URL {name} --device ID --root 1.root.json "
                "--again tries this one once more",
            ) from error
        if stored is pointer.current:
            return
        with self._writing(f"{name} {version}"):
            self._pointers.write(version_pointers.activated(pointer, stored, starts))

    def start(self, name: str) -> Installed | None:
        """Return the version to run; call it before the device's program runs.

        On trial, this start is counted first, durably. If no start is left, the unconfirmed version is rolled back
        and the one before it is returned. If that is damaged too, the version stays, since there is none better.
        """
        pointer = self._read(name)
        if pointer.trial and pointer.trial.left > 0:
            with self._writing(f"a start of {name}"):
                self._pointers.write(version_pointers.count_start(pointer))
        elif pointer.trial:
            with suppress(StoreError):
                return self.rollback(name, version_pointers.unconfirmed(pointer))
        return self.current(name)

    def confirm(self, name: str) -> None:
        """End the trial of the current version, if any: it works."""
        pointer = self._read(name)
        if pointer.trial:
            with self._writing(f"the end of the trial of {name}"):
                self._pointers.write(replace(pointer, trial=None))

    def forgive(self, name: str, version: str) -> None:
        """Allow a refused version to be tried again."""
        pointer = self._read(name)
        if version in pointer.refused:
            with self._writing(f"{name} {version}"):
                self._pointers.write(version_pointers.allow_again(pointer, version))

    def rollback(self, name: str, reason: str = "no reason was given") -> Installed:
        """Make the previous version current again, durably.

        The abandoned version is recorded as refused, with the reason. Raises StoreError if there is no previous
        version, or it is damaged.
        """
        pointer = self._read(name)
        if pointer.current is None or pointer.previous is None:
            raise StoreError(
                f"{name} has no previous version to go back to",
                "sartor edge sync URL NAME --device ID --root 1.root.json, once a version that works is published",
            )
        failed, previous = pointer.current, pointer.previous
        with self._writing(f"{name} {previous.version}"):
            self._trees.mend(name, previous, failed)
            if broken := self._trees.broken(name, previous):
                raise StoreError(
                    f"{name} {previous.version}, the previous version, is damaged: {broken[0][0]}",
                    f"sartor edge verify --store {self.folder}, then sartor edge sync URL {name} --device ID "
                    "--root 1.root.json",
                )
            self._pointers.write(version_pointers.rolled_back(pointer, reason))
        current = self.current(name)
        assert current is not None
        return current

    def current(self, name: str) -> Installed | None:
        """Return the version that the device works with."""
        pointer = self._read(name)
        return version_pointers.installed_version(self.folder, name, pointer.current, pointer.trial)

    def previous(self, name: str) -> Installed | None:
        """Return the version that `rollback` goes back to."""
        return version_pointers.installed_version(self.folder, name, self._read(name).previous)

    def staged(self, name: str) -> Installed | None:
        """Return the version that waits to be activated."""
        return version_pointers.installed_version(self.folder, name, self._read(name).staged)

    def refused(self, name: str) -> Mapping[str, str]:
        """Return version -> reason of those that were rolled back here or failed their check.

        They are not worth fetching.
        """
        return self._read(name).refused

    def _read(self, name: str) -> Pointer:
        """Return the pointer of a name. Raises StoreError for an invalid name."""
        if not is_valid_name(name):
            raise StoreError(f"{name!r:.80} is no name of a release", "lower-case letters, digits, '.', '_' and '-'")
        return self._pointers.read(name)

    # space and integrity

    def used_bytes(self) -> int:
        """Return the bytes of every file in the store; a file with several names counts once."""
        return self._quota.used_bytes()

    def collect(self) -> int:
        """Remove what no version needs, and return the bytes freed.

        It never removes the current, the previous or the staged version, nor the downloads of an update in progress.
        """
        with self._writing("the store"):
            return self._collect()

    def _collect(self) -> int:
        """Remove what no version needs, and return the bytes freed."""
        used_before = self._quota.used_bytes()
        self._pointers.settle()
        trees: set[Path] = set()
        digests: set[str] = set()
        for pointer in self._pointers.all():
            for version in pointer.versions:
                trees.add(self._trees.path(pointer.name, version.version))
                digests.update(version.files.values())
        blobs, wanted = self._blobs, self._blobs.wanted
        garbage = [tree for tree in self._trees.all() if tree not in trees]
        garbage += [blobs.folder / name for name in blobs.digests() if name not in digests | wanted]
        garbage += [blobs.partials / name for name in self._disk.names(blobs.partials) if name not in wanted]
        garbage += [blobs.quarantined / name for name in self._disk.names(blobs.quarantined)]
        for path in garbage:
            self._disk.remove(path)
        return used_before - self._quota.used_bytes()

    def _make_room(self, subject: str, needed_bytes: int) -> None:
        """Collect garbage if need be. Raises BudgetError or MissingError if that is not enough."""
        if self._quota.fits(needed_bytes):
            return
        self._collect()
        if not self._quota.fits(needed_bytes):
            raise self._quota.refusal(subject, needed_bytes)

    def verify(self) -> list[str]:
        """Read every byte, repair what is stored twice, and return the digests of damaged blobs.

        Those are blobs whose bytes differ or are missing, as a blob or in the tree of a version. `mended` records the
        repairs. A blob without a whole copy is quarantined, so that a sync fetches it again. If the current version
        is damaged by that and the previous is whole, the previous becomes current, and the damaged one waits as
        staged.
        """
        with self._writing("what was mended"):
            self.mended += self._pointers.restore()
            result = self._repair.damaged_digests()
            for digest in result:
                self._repair.mend_blob(digest)
            for digest in result:
                self._repair.mend_trees(digest)
            self.mended += [
                message for pointer in list(self._pointers.all()) if (message := self._repair.fall_back(pointer))
            ]
        return result
