"""Current, previous and trial version pointers.

    current/NAME.json   {"current": {"version": "1.1", "path": "releases/NAME/1.1", ...}, "previous": ..., "refused":
                        ...}
    backup/NAME.json    the same bytes

One file holds the whole state, so that one rename changes all of it: at no moment is a version current without its
state. It is a file and not a symbolic link because FAT, the file system of SD cards, has none, and a link cannot
record which version was refused. `path` is relative to the store, which may be mounted elsewhere later.

The backup is written first. The rename of current/NAME.json is the commit, and every step that can fail on a full
disk comes before it. Each copy ends with the digest of its content. So a copy that decayed, or that a power cut left
empty, is recognised, and opening the store rewrites it from the other.

The trial counts starts, as U-Boot counts boots (`bootcount`, `bootlimit`), RAUC marks slots good and Android retries
an A/B slot. The number is in the pointer, so the rename that makes a version current begins its trial too. A start is
counted durably before the program runs: one that crashes, hangs or cuts the power has been counted. The functions
here are pure: pointer -> pointer.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sartor.core import records
from sartor.core.artifacts import manifest_id
from sartor.core.errors import HealthError, StoreError
from sartor.core.filesystem import FileSystem
from sartor.core.installation import upgrade_command
from sartor.edge.health_reason import HealthReason

SCHEMA = 2  # 1 had no trial
DIGEST = re.compile(r"[0-9a-f]{64}")


def tree_of(name: str, version: str) -> str:
    """Return the path of a version's files relative to the store's folder."""
    return f"releases/{name}/{version}"


@dataclass(frozen=True)
class StoredVersion:
    """One version of a release.

    files: path inside it -> digest of the blob.
    since: time at which it took its present role, UTC.
    """

    version: str
    files: Mapping[str, str]
    since: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def now(self) -> StoredVersion:
        """Return the same version with the present time."""
        return StoredVersion(self.version, self.files)


@dataclass(frozen=True)
class Trial:
    """Trial of the current version: `left` of its `of` starts are left."""

    left: int
    of: int


@dataclass(frozen=True)
class Pointer:
    """State of one name.

    refused: version -> reason why it was rolled back or not activated; it is not activated again.
    trial: of the current version; None if it was confirmed or never on trial.
    """

    name: str
    current: StoredVersion | None = None
    previous: StoredVersion | None = None
    staged: StoredVersion | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    trial: Trial | None = None

    @property
    def versions(self) -> tuple[StoredVersion, ...]:
        """Every version whose files the store keeps, the current one first."""
        return tuple(item for item in (self.current, self.previous, self.staged) if item)

    def counterpart(self, version: StoredVersion) -> StoredVersion | None:
        """Return the version that takes over if this one is damaged: both share no file on the disk."""
        return self.previous if self.current and version.version == self.current.version else self.current

    def find(self, version: str) -> StoredVersion | None:
        """Return the version with that version text, or None if the store does not keep it."""
        return next((stored for stored in self.versions if stored.version == version), None)


class Pointers:
    """Pointers of a store, by name."""

    def __init__(self, disk: FileSystem, folder: Path) -> None:
        self._disk = disk
        self.folders = (folder / "current", folder / "backup")

    def names(self) -> list[str]:
        """Return every name that has at least one copy of a pointer."""
        files = {file for folder in self.folders for file in self._disk.names(folder)}
        return sorted(
            file.removesuffix(".json") for file in files if file.endswith(".json") and not file.startswith(".")
        )

    def read(self, name: str) -> Pointer:
        """Return the state of a name; an empty one if it has none.

        Raises StoreError if a later Sartor wrote it.
        """
        return next((pointer for content in self._copies(name) if (pointer := parse(content, name))), Pointer(name))

    def all(self) -> Iterator[Pointer]:
        """Return the state of every name."""
        return map(self.read, self.names())

    def write(self, pointer: Pointer) -> None:
        """Write the state of a name, durably: the commit of every change."""
        content = write(pointer)
        for folder in reversed(self.folders):
            self._disk.replace(folder / f"{pointer.name}.json", content)

    def settle(self) -> None:
        """Make what `read` returns durable.

        A rename is visible already if its fsync failed, or if the process was killed before it.
        """
        for folder in self.folders:
            self._disk.sync_folder(folder)

    def restore(self) -> list[str]:
        """Rewrite each copy that is damaged or outdated from the other; return messages about it."""
        return [message for name in self.names() for message in self._restore(name)]

    def _restore(self, name: str) -> Iterator[str]:
        """Rewrite the copies of one name, and yield messages about it."""
        copies = list(self._copies(name))
        whole_copy = next((content for content in copies if parse(content, name)), None)
        if whole_copy is None:
            yield f"neither copy of the pointer of {name} is whole: it has no current version until the next update"
            return
        for folder, content in zip(self.folders, copies, strict=True):
            if content == whole_copy:
                continue
            try:
                self._disk.replace(folder / f"{name}.json", whole_copy)
            except OSError as error:
                # A full disk must not prevent opening: the other copy is whole.
                yield f"{folder.name}/{name}.json could not be written anew: {error.strerror}"
            else:
                yield f"{folder.name}/{name}.json was written anew from the other copy"

    def _copies(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of each copy; empty for one that cannot be read."""
        for folder in self.folders:
            try:
                with self._disk.open(folder / f"{name}.json") as stream:
                    yield stream.read()
            except OSError:  # absent, or a block that cannot be read: use the other copy
                yield b""


def write(pointer: Pointer) -> bytes:
    """Return the bytes of a pointer."""
    fields: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "pointer",
        "name": pointer.name,
        "current": _version_fields(pointer.name, pointer.current),
        "previous": _version_fields(pointer.name, pointer.previous),
        "staged": _version_fields(pointer.name, pointer.staged),
        "refused": dict(pointer.refused),
        "trial": {"left": pointer.trial.left, "of": pointer.trial.of} if pointer.trial else None,
    }
    fields["id"] = manifest_id(fields)
    return records.canonical(fields) + b"\n"


def _version_fields(name: str, version: StoredVersion | None) -> dict[str, Any] | None:
    """Return the JSON fields of a version, or None."""
    if version is None:
        return None
    path = tree_of(name, version.version)
    return {"version": version.version, "path": path, "since": version.since, "files": dict(version.files)}


def parse(content: bytes, name: str) -> Pointer | None:
    """Return the pointer in a copy; None if the copy is not whole.

    Raises StoreError if a later Sartor wrote it.
    """
    try:
        fields = json.loads(content)
        if not isinstance(fields, dict) or manifest_id(fields) != fields.get("id") or fields.get("name") != name:
            return None
    except (ValueError, RecursionError):
        return None
    if fields.get("schema") not in (SCHEMA - 1, SCHEMA):
        raise StoreError(
            f"the pointer of {name} has schema {fields.get('schema')}; this version of Sartor reads {SCHEMA - 1} and "
            f"{SCHEMA}",
            upgrade_command(),
        )
    versions: dict[str, StoredVersion | None] = {}
    try:
        for role in ("current", "previous", "staged"):
            stored = fields[role]
            versions[role] = StoredVersion(stored["version"], stored["files"], stored["since"]) if stored else None
        trial = fields.get("trial")
        return Pointer(
            name,
            current=versions["current"],
            previous=versions["previous"],
            staged=versions["staged"],
            refused=dict(fields["refused"]),
            trial=Trial(trial["left"], trial["of"]) if trial else None,
        )
    except (KeyError, TypeError, ValueError):  # its id fits, so it was not torn: another program wrote it
        return None


def activated(pointer: Pointer, new: StoredVersion, starts: int) -> Pointer:
    """Return the pointer with `new` as the current version.

    It is on trial for `starts` starts if there is a previous version, unless it was that version itself. A version
    still on trial does not become the previous version if a confirmed one is there.
    """
    proven = pointer.previous if pointer.trial else pointer.current
    previous = next((item for item in (proven, pointer.current) if item and item is not new), None)
    is_back = new is pointer.previous  # confirmed before
    trial = Trial(starts, starts) if starts and previous and not is_back else None
    staged = None if new is pointer.staged else pointer.staged
    return replace(pointer, current=new.now(), previous=previous, staged=staged, trial=trial)


def rolled_back(pointer: Pointer, reason: str) -> Pointer:
    """Return the pointer with the previous version current, and the former one refused."""
    assert pointer.current and pointer.previous
    refused = {**pointer.refused, pointer.current.version: reason}
    return replace(pointer, current=pointer.previous.now(), previous=None, refused=refused, trial=None)


def count_start(pointer: Pointer) -> Pointer:
    """Return the pointer with one start fewer left."""
    assert pointer.trial
    return replace(pointer, trial=replace(pointer.trial, left=pointer.trial.left - 1))


def unconfirmed(pointer: Pointer) -> str:
    """Return the reason for going back from a version whose starts are used up."""
    assert pointer.trial
    return HealthReason.STARTS.text(f"it did not confirm within {pointer.trial.of}")


def check(pointer: Pointer, version: str) -> None:
    """Raise HealthError for a version that is refused."""
    if version in pointer.refused:
        raise HealthError(
            f"{pointer.name} {version} was refused on this device: {pointer.refused[version]}",
            "publish another version, or sync --again",
        )


def refused(pointer: Pointer, version: str, reason: str) -> Pointer:
    """Return the pointer with a version that failed its check refused and no longer staged."""
    staged = None if pointer.staged and pointer.staged.version == version else pointer.staged
    return replace(pointer, staged=staged, refused={**pointer.refused, version: reason})


def allow_again(pointer: Pointer, version: str) -> Pointer:
    """Return the pointer with a version no longer refused."""
    return replace(
        pointer,
        refused={
            refused_version: reason
            for refused_version, reason in pointer.refused.items()
            if refused_version != version
        },
    )


@dataclass(frozen=True)
class Installed:
    """Version that is on the device.

    path: directory that opens as a Release.
    since: UTC.
    files: path inside it -> digest of the blob.
    trial: starts that it has left; None if it was confirmed or never on trial.
    """

    name: str
    version: str
    path: Path
    since: str
    files: Mapping[str, str]
    trial: Trial | None = None


def installed(folder: Path, name: str) -> Installed | None:
    """Return the current version of `name` in the store at `folder`."""
    pointer = Pointers(FileSystem(), folder.absolute()).read(name)
    return installed_version(folder.absolute(), name, pointer.current, pointer.trial)


@dataclass(frozen=True)
class StoreState:
    """State of one name in a store.

    refused: version -> reason.
    """

    name: str
    current: Installed | None
    previous: Installed | None
    staged: Installed | None
    refused: Mapping[str, str]


def states(folder: Path) -> list[StoreState]:
    """Return the state of every name in the store at `folder`; an empty list without a store."""
    folder = folder.absolute()
    return [
        StoreState(
            item.name,
            current=installed_version(folder, item.name, item.current, item.trial),
            previous=installed_version(folder, item.name, item.previous),
            staged=installed_version(folder, item.name, item.staged),
            refused=item.refused,
        )
        for item in Pointers(FileSystem(), folder).all()
    ]


def installed_version(
    folder: Path, name: str, version: StoredVersion | None, trial: Trial | None = None
) -> Installed | None:
    """Return a version of a pointer as a program sees it."""
    if version is None:
        return None
    path = folder / tree_of(name, version.version)
    return Installed(name, version.version, path, since=version.since, files=version.files, trial=trial)
