"""Local adapters as versions in the store.

A version is PEFT's two files and `local.json`. That file states the shipped release (by the digest of its files), the
rows it was tuned on (keyed names, `encrypted_rows.py`), and its judgement. It is applied to that release alone. A
blank version has `local.json` alone, and means that the shipped release works as it is. The store keeps two versions
of a name, so one or two blank versions follow what must be erased.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core import records
from sartor.core.artifacts import MANIFEST
from sartor.core.errors import HealthError, StoreError
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.store.version_pointers import Installed, installed

SCHEMA = 1
# File below the person's folder while an erasure is in progress
FORGETTING = "forgetting.json"


@dataclass(frozen=True)
class LocalAdapter:
    """Version of NAME.local.

    path: PEFT's directory.
    manifest: its `local.json`.
    """

    version: str
    path: Path
    manifest: Mapping[str, Any]

    @property
    def is_blank(self) -> bool:
        """Whether the version has no adapter: the shipped release works alone."""
        return not self.manifest["delta"]

    @property
    def digest(self) -> str:
        """SHA-256 of its weights; empty for a blank one."""
        return str(self.manifest["delta"])

    def used(self, names: Collection[str]) -> bool:
        """Return whether one of these rows was trained on."""
        return not set(names).isdisjoint(self.manifest["rows"])


def shipped(store: Path, name: str) -> Installed:
    """Return the release that the device was given. Raises StoreError if there is none."""
    result = installed(store, name)
    if result is None:
        raise StoreError(
            f"the store {store} holds no release {name}",
            f"sartor edge sync URL {name} --device ID --root 1.root.json --store {store}",
        )
    return result


def digest_of(release: Installed) -> str:
    """Return the digest of every file of a release, to which a delta is bound."""
    return records.digest(dict(release.files))


def active_adapter(folder: Path, store: Path, name: str) -> tuple[LocalAdapter | None, str]:
    """Return the delta that applies to the current release, or None, and the reason.

    For a running program: it needs no lock, no key of the rows and no torch. With None, the shipped release works as
    it is.

    folder: the person's.
    """
    delta, release = _adapter_of(installed(store, f"{name}.local")), shipped(store, name)
    if delta is None or delta.is_blank:
        return None, str(delta.manifest["why"]) if delta else "nothing was tuned yet"
    if (folder / FORGETTING).exists():
        return None, "rows are being forgotten"
    if delta.manifest["of"]["digest"] != digest_of(release):
        return (
            None,
            f"the delta is of {name} {delta.manifest['of']['version']}; {release.version} is shipped now: adapt again",
        )
    return delta, str(delta.manifest["why"])


class LocalAdapterStore:
    """Local deltas of a release in a store.

    limit_bytes: as in `ReleaseStore`.
    """

    def __init__(self, store: Path, name: str, limit_bytes: int = 0) -> None:
        self.store, self.name, self._limit_bytes = store, f"{name}.local", limit_bytes

    def current(self) -> LocalAdapter | None:
        """Return the current version, without the store's lock; None if there never was one."""
        return _adapter_of(installed(self.store, self.name))

    def put(
        self, files: Mapping[str, bytes], fields: Mapping[str, Any], check: Callable[[Path], None]
    ) -> LocalAdapter:
        """Make a delta the current one if `check` of its directory returns.

        `check` is called last, with the store locked. Raises HealthError if it raises, and nothing of the delta
        stays.
        """
        with self._open() as store:
            try:
                self._put(store, files, fields, check)
            except HealthError:
                self._put_blank(store, "it was not taken", activate=False)
                store.collect()
                raise
        result = self.current()
        assert result is not None
        return result

    def undo(self, reason: str) -> LocalAdapter:
        """Go back to the previous delta, or to none. Returns the delta that was undone.

        Raises StoreError if there is none.
        """
        with self._open() as store:
            undone, previous = _adapter_of(store.current(self.name)), _adapter_of(store.previous(self.name))
            if undone is None or undone.is_blank:
                raise StoreError(
                    f"there is no delta of {self.name} to undo",
                    f"sartor edge ask {self.name.removesuffix('.local')} PROMPT --store {self.store}, without "
                    "--person",
                )
            if previous:
                store.rollback(self.name, reason)
            else:
                self._put_blank(store, reason)
        return undone

    def using(self, names: Collection[str]) -> list[LocalAdapter]:
        """Return every delta in the store that used one of these rows."""
        with self._open() as store:
            return [item for item in self._adapters(store) if item.used(names)]

    def purge(self, names: Collection[str]) -> None:
        """Remove every delta that used one of these rows, with its files.

        A delta that used none stays, and stays current if it was.
        """
        with self._open() as store:
            current, previous = (
                _adapter_of(release) for release in (store.current(self.name), store.previous(self.name))
            )
            if current and current.used(names):
                if previous and not previous.used(names):
                    store.rollback(self.name, "rows that it used were forgotten")
                else:
                    for _ in range(2):  # the first makes the current version the previous one, the second drops it
                        self._put_blank(store, "rows were forgotten")
            elif current and previous and previous.used(names):
                self._put_blank(store, "rows were forgotten")
                store.activate(self.name, current.version, lambda path: None)
            if (staged := _adapter_of(store.staged(self.name))) and staged.used(names):
                self._put_blank(store, "rows were forgotten", activate=False)
            store.collect()

    def _open(self) -> ReleaseStore:
        return ReleaseStore(self.store, limit_bytes=self._limit_bytes)

    def _adapters(self, store: ReleaseStore) -> list[LocalAdapter]:
        releases = (store.current(self.name), store.previous(self.name), store.staged(self.name))
        return [item for item in map(_adapter_of, releases) if item]

    def _put_blank(self, store: ReleaseStore, reason: str, *, activate: bool = True) -> None:
        """Stage a blank version, and activate it by default."""
        fields = {"delta": "", "rows": [], "held_out": [], "why": reason}
        self._put(store, {}, fields, (lambda path: None) if activate else None)

    def _put(
        self,
        store: ReleaseStore,
        files: Mapping[str, bytes],
        fields: Mapping[str, Any],
        check: Callable[[Path], None] | None,
    ) -> None:
        """Stage a version of these files, and activate it with `check` if given."""
        known_versions = [item.version for item in self._adapters(store)] + list(store.refused(self.name))
        version = str(1 + max((int(number) for number in known_versions if number.isdigit()), default=0))
        manifest = records.canonical({"schema": SCHEMA, "kind": "local", "version": version, **fields})
        contents = {**files, MANIFEST: manifest}
        digests = {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()}
        store.make_room(self.name, {digests[path]: len(content) for path, content in contents.items()})
        for path, content in contents.items():
            if not store.has(digests[path]):
                store.discard(digests[path])
                store.append(digests[path], 0, content)
                store.finish(digests[path])
        store.stage(self.name, version, digests)
        if check:
            store.activate(self.name, version, check)


def _adapter_of(release: Installed | None) -> LocalAdapter | None:
    """Return a version as a local adapter. Raises StoreError if its manifest is not whole."""
    if release is None:
        return None
    try:
        fields = json.loads((release.path / MANIFEST).read_bytes())
        if fields["schema"] != SCHEMA or fields["kind"] != "local":
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise StoreError(
            f"{release.path / MANIFEST} is not whole, or of another schema",
            "sartor edge verify --store STORE, then sartor edge tune NAME --again",
        ) from None
    return LocalAdapter(release.version, release.path, fields)
