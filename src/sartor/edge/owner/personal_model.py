"""Owner's rows, adapters, erasure as one object.

    FOLDER/rows/       the diary
    FOLDER/signer/     the key that signs receipts
    FOLDER/receipts/   what was forgotten, signed
    and the files that `adaptation.py` and `personalization/erasure_receipt.py` describe

Nobody decides what is held out, and nothing is made current that is not better on rows it never saw.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core import signing
from sartor.core.errors import BusyError, ConfigError, MissingError, SartorError
from sartor.core.filesystem import DISK_FULL, PrivateFileSystem
from sartor.core.records import Example
from sartor.edge.owner import private_tuning
from sartor.edge.owner.adaptation import AdaptationSettings, Adapted, AdapterTuner
from sartor.edge.owner.encrypted_rows import EncryptedRowStore
from sartor.edge.owner.local_adapters import FORGETTING, active_adapter, digest_of, shipped
from sartor.edge.owner.private_tuning import Tune
from sartor.edge.owner.row_keys import KeySource
from sartor.personalization.acceptance import AcceptanceResult
from sartor.personalization.erasure_receipt import Forgotten, Intent, write_receipt
from sartor.personalization.user_rows import UserRow


@dataclass(frozen=True)
class Status:
    """What works now. adapter: PEFT's directory to load. delta: '' where that is the shipped release's own, and
    why.
    """

    adapter: Path
    delta: str
    reason: str
    release: str
    rows: int
    notes: tuple[str, ...]


class OwnerModel:
    """A person's rows below `folder`, and the delta on a release in the device's store.

    key: of the rows (`row_keys.py`). tune: Job -> facts; by default the tuner's own process under settings.limits.
    may_run: why not now, or '' (`energy_policy.EnergyPolicy.refusal`). signer: folder of the key that signs receipts,
    made if absent. A forgetting that a power cut interrupted is ended here.
    """

    def __init__(
        self,
        folder: Path,
        store: Path,
        key: KeySource,
        settings: AdaptationSettings,
        *,
        tune: Tune | None = None,
        may_run: Callable[[], str] = lambda: "",
        signer: Path | None = None,
    ) -> None:
        self.folder, self.store, self.settings = folder.absolute(), store.absolute(), settings
        self._disk = PrivateFileSystem()
        self.diary = EncryptedRowStore(self.folder / "rows", key, limit_bytes=settings.limit_bytes)
        tune = tune or private_tuning.tune_in_process(settings.limits, settings.stop)
        self._adapting = AdapterTuner(self.folder, self.store, settings, self.diary, tune, self._disk)
        self._locals = self._adapting.locals
        self._may_run = may_run
        self._signer = signer or self.folder / "signer"
        self._intent, self._stale = self.folder / FORGETTING, self.folder / "work.stale"
        self._resume()

    # rows

    def add(self, row: Mapping[str, Any] | Example, rating: float | None = None, correction: str = "") -> str:
        """See Diary.add."""
        return self.diary.add(row, rating, correction)

    def rows(self) -> list[UserRow]:
        """Every row, in memory alone."""
        return self.diary.rows()

    # what works

    def adapter(self) -> Path:
        """PEFT's directory for the running program: the delta's, or the shipped release's. No lock is taken, no key
        needed.
        """
        active, _ = active_adapter(self.folder, self.store, self.settings.name)
        return active.path if active else shipped(self.store, self.settings.name).path

    def status(self) -> Status:
        """What works, and why."""
        active, reason = active_adapter(self.folder, self.store, self.settings.name)
        release = shipped(self.store, self.settings.name)
        rows = self.diary.count()
        digest = active.digest if active else ""
        return Status(self.adapter(), digest, reason, release.version, rows, tuple(self.diary.notes))

    # tuning

    def adapt(self, *, again: bool = False) -> Adapted:
        """Tune a delta on every row that is not held out, from the shipped release on, and make it current if it is
        better.

        Killed or stopped, the same call goes on where it was. Rows that were tuned to no avail, or undone, are not
        tuned again unless `again`, or until there are others. Raises BusyError where the device may not tune now, or
        does so already.
        """
        if reason := self._may_run():
            raise BusyError(
                f"the device may not tune now: {reason}", "sartor edge tune NAME, later", retry_after_s=600
            )
        with self._exclusive("adapting"), private_tuning.memory_folder(self.folder) as memory_folder:
            return self._adapting.adapt(memory_folder, again)

    def evaluate(self) -> AcceptanceResult:
        """What works, against the shipped release, on the rows that are held out and on the probe. Nothing is
        decided.
        """
        return self._adapting.evaluate()

    def undo(self, reason: str = "the person undid it") -> Path:
        """Go back to the delta before, or to the shipped release. Returns what works now. Raises StoreError if none
        works.
        """
        with self._writing():  # neither the key nor the end of a tuning is waited for
            undone = self._locals.undo(reason)
            self._adapting.settle(str(undone.manifest["key"]), f"it was undone: {reason}")
        return self.adapter()

    # forgetting

    def forget(
        self,
        ids: Iterable[str] = (),
        *,
        since: str = "",
        before: str = "",
        containing: str = "",
        retune: bool = True,
    ) -> Forgotten:
        """Remove rows for good, and every delta that was tuned on one; with `retune`, tune another on the rows that
        stay.

        All that is given must hold: ids; ISO dates (since inclusive, before exclusive); a text, whatever its case. The
        receipt is signed; it holds no text. Raises ConfigError where nothing is given.
        """
        wanted_ids = set(ids)
        if not (wanted_ids or since or before or containing):
            raise ConfigError(
                "nothing says which rows are to be forgotten",
                "sartor edge forget NAME ID..., or with --since DATE, --before DATE or --containing TEXT",
            )
        with self._exclusive("forgetting"):
            matched_ids = tuple(
                row.id
                for row in self.diary.rows()
                if (not wanted_ids or row.id in wanted_ids)
                and (not since or row.date >= since)
                and (not before or row.date < before)
                and containing.casefold() in row.text.casefold()
            )
            if not matched_ids:
                return Forgotten((), (), "", "no row is meant", None)
            Intent(matched_ids).write(self._disk, self._intent)
            intent = self._purge(Intent(matched_ids))
            return self._end(intent, *self._retune(intent, retune))

    def _purge(self, intent: Intent) -> Intent:
        """Rows first, then what was tuned on them: a delta that is made meanwhile finds its rows gone."""
        ids = set(intent.ids)
        self.diary.forget(lambda row: row.id in ids)
        names = set(self.diary.names(intent.ids).values())
        digests = [item.digest for item in self._locals.using(names)]
        intent = Intent(intent.ids, tuple(dict.fromkeys([*intent.deltas, *digests])), intent.began)
        intent.write(self._disk, self._intent)
        self._locals.purge(names)
        self._disk.replace(self._stale, b"")
        self._clean()
        return intent

    def _clean(self) -> None:
        """Remove what a tuning on rows that were forgotten has written. One that runs now removes it, as it finds them
        gone.
        """
        if self._disk.stat(self._stale):
            with suppress(BusyError), self._exclusive("adapting"):
                shutil.rmtree(self.folder / "work", ignore_errors=True)
                self._disk.remove(self._stale)

    def _retune(self, intent: Intent, retune: bool) -> tuple[str, str]:
        """(digest of the delta that came, why)."""
        if not intent.deltas:
            return "", "no delta was tuned on these rows"
        if not retune:
            return "", "no other was asked for"
        try:
            adapted = self.adapt(again=True)
        except SartorError as error:
            return "", f"it was not tuned again: {error.problem}"
        return adapted.delta, adapted.reason

    def _end(self, intent: Intent, new_delta: str, reason: str) -> Forgotten:
        release = shipped(self.store, self.settings.name)
        current = self._locals.current()
        fields = {
            "rows": intent.ids,
            "deltas_gone": intent.deltas,
            "delta_came": new_delta,
            "delta_now": current.digest if current else "",
            "why": reason,
            "began": intent.began,
            "release": {"name": release.name, "version": release.version, "digest": digest_of(release)},
        }
        file = write_receipt(
            self._disk, self.folder / "receipts", fields, signing.open_private(signing_key(self._signer))
        )
        self._disk.remove(self._intent)
        self._disk.sync_folder(self.folder)
        return Forgotten(intent.ids, intent.deltas, new_delta, reason, file)

    def _resume(self) -> None:
        self._clean()
        if self._disk.stat(self._intent) is None:
            return
        with suppress(BusyError), self._exclusive("forgetting"):
            if intent := Intent.read(self._disk, self._intent):
                self._end(self._purge(intent), "", "it was interrupted before another was tuned: adapt does that")

    @contextmanager
    def _exclusive(self, name: str) -> Iterator[None]:
        """One at a time of each kind, of all processes. Raises BusyError."""
        self.diary.count()  # makes the folder, and says at once whether the key fits
        unlock = self._disk.lock(self.folder / f"{name}.lock")
        try:
            with self._writing():
                yield
        finally:
            unlock()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = "the disk is full" if error.errno in DISK_FULL else error.strerror or str(error)
            raise MissingError(
                f"{self.folder} could not be written: {reason}",
                f"ls -ld {self.folder}; df -h {self.folder}; then the same command again",
            ) from error


def signing_key(folder: Path) -> Path:
    """The folder of the key that signs a device's receipts, made if absent."""
    if not (folder / "sartor.key").exists():
        signing.keygen(folder)
    return folder
