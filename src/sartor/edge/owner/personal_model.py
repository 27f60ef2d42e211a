"""Owner's rows, adapters and erasure as one object.

    FOLDER/rows/       the diary
    FOLDER/signer/     the key that signs receipts
    FOLDER/receipts/   signed records of erasures
    and the files that `adaptation.py` and `personalization/erasure_receipt.py` describe

Digests decide which rows are held out. A delta becomes current only if it is better on rows that it was not trained
on.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core import signing, trace_store
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
    """Current state.

    adapter: PEFT's directory to load.
    delta: digest of the delta; "" if the shipped release's own adapter works.
    reason: why.
    """

    adapter: Path
    delta: str
    reason: str
    release: str
    rows: int
    notes: tuple[str, ...]


class OwnerModel:
    """Rows of a person below `folder`, and the delta on a release in the device's store.

    key: of the rows (`row_keys.py`).
    tune: TuningJob -> facts; by default the tuner's own process under settings.limits.
    may_run: returns why not now, or "" (`energy_policy.EnergyPolicy.refusal`).
    signer: folder of the key that signs receipts, created if absent.

    An erasure that a power cut interrupted is completed here.
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
        self._adapting = AdapterTuner(self.folder, self.store, settings, diary=self.diary, tune=tune, disk=self._disk)
        self._locals = self._adapting.locals
        self._may_run = may_run
        self._signer = signer or self.folder / "signer"
        self._intent, self._stale = self.folder / FORGETTING, self.folder / "work.stale"
        self._resume()

    # rows

    def add(self, row: Mapping[str, Any] | Example, rating: float | None = None, correction: str = "") -> str:
        """Store a row and return its id, as `EncryptedRowStore.add`."""
        return self.diary.add(row, rating, correction)

    def add_all(self, rows: Sequence[tuple[Mapping[str, Any] | Example, float | None, str]]) -> list[str]:
        """Store rows, all or none, each with its rating and correction, as `EncryptedRowStore.add_all`."""
        return self.diary.add_all(rows)

    def rows(self) -> list[UserRow]:
        """Return every row, in memory alone."""
        return self.diary.rows()

    # current adapter

    def adapter(self) -> Path:
        """Return PEFT's directory for the running program: the delta's, or the shipped release's.

        It takes no lock and needs no key.
        """
        active, _ = active_adapter(self.folder, self.store, self.settings.name)
        return active.path if active else shipped(self.store, self.settings.name).path

    def status(self) -> Status:
        """Return the current state, and the reason for it."""
        active, reason = active_adapter(self.folder, self.store, self.settings.name)
        rows = self.diary.count()  # before the notes: it reads the file, and notes damage
        return Status(
            adapter=self.adapter(),
            delta=active.digest if active else "",
            reason=reason,
            release=shipped(self.store, self.settings.name).version,
            rows=rows,
            notes=tuple(self.diary.notes),
        )

    # tuning

    def adapt(self, *, again: bool = False) -> Adapted:
        """Tune a delta on every row that is not held out, and make it current if it is better.

        Tuning starts from the shipped release. After a kill or a stop, the same call resumes. Rows whose tuning was
        rejected or undone are not tuned again unless `again` is set, or until there are other rows. Raises BusyError
        if the device may not tune now, or is already tuning.
        """
        if reason := self._may_run():
            raise BusyError(
                f"the device may not tune now: {reason}", "sartor edge tune NAME, later", retry_after_s=600
            )
        with self._exclusive("adapting"), private_tuning.memory_folder(self.folder) as memory_folder:
            return self._adapting.adapt(memory_folder, again)

    def evaluate(self) -> AcceptanceResult:
        """Return the judgement of the active delta against the shipped release, without a decision.

        It is made on the rows that are held out and on the probe.
        """
        return self._adapting.evaluate()

    def undo(self, reason: str = "the person undid it") -> Path:
        """Go back to the previous delta, or to the shipped release. Returns the adapter that works now.

        Raises StoreError if there is no delta.
        """
        with self._writing():  # without the key, and without waiting for a tuning
            undone = self._locals.undo(reason)
            self._adapting.settle(str(undone.manifest["key"]), f"it was undone: {reason}")
        return self.adapter()

    # erasure

    def forget(
        self,
        ids: Iterable[str] = (),
        *,
        since: str = "",
        before: str = "",
        containing: str = "",
        retune: bool = True,
    ) -> Forgotten:
        """Erase rows, and every delta that was tuned on one; with `retune`, tune another on the rows left.

        All given conditions must hold: ids; ISO dates (since inclusive, before exclusive); a text, ignoring case. The
        receipt is signed and contains no text. Raises ConfigError if no condition is given.
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
                return Forgotten(rows=(), deltas=(), new_delta="", reason="no row is meant", file=None)
            Intent(matched_ids).write(self._disk, self._intent)
            intent = self._purge(Intent(matched_ids))
            return self._end(intent, *self._retune(intent, retune))

    def _purge(self, intent: Intent) -> Intent:
        """Erase the rows, then the deltas tuned on them; return the intent with these deltas.

        In this order, a delta that is made in the meantime finds its rows missing.
        """
        ids = set(intent.ids)
        self.diary.forget(lambda row: row.id in ids)
        names = set(self.diary.names(intent.ids).values())
        digests = [item.digest for item in self._locals.using(names)]
        intent = Intent(intent.ids, tuple(dict.fromkeys([*intent.deltas, *digests])), intent.began)
        intent.write(self._disk, self._intent)
        self._locals.purge(names)
        trace_store.remove_traces(trace_store.find_traces(adapter_ids=intent.deltas))
        self._disk.replace(self._stale, b"")
        self._clean()
        return intent

    def _clean(self) -> None:
        """Remove the work of tunings on erased rows.

        A tuning that runs now removes its own work, as it finds the rows missing.
        """
        if self._disk.stat(self._stale):
            with suppress(BusyError), self._exclusive("adapting"):
                shutil.rmtree(self.folder / "work", ignore_errors=True)
                self._disk.remove(self._stale)

    def _retune(self, intent: Intent, retune: bool) -> tuple[str, str]:
        """Return the digest of the new delta, or "", and the reason."""
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
        """Write the receipt of an erasure, and remove its intent."""
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
            self._disk, self.folder / "receipts", fields, signing.open_private(signing_key(self._signer), "proof")
        )
        self._disk.remove(self._intent)
        self._disk.sync_folder(self.folder)
        return Forgotten(rows=intent.ids, deltas=intent.deltas, new_delta=new_delta, reason=reason, file=file)

    def _resume(self) -> None:
        """Complete an erasure that was interrupted."""
        self._clean()
        if self._disk.stat(self._intent) is None:
            return
        with suppress(BusyError), self._exclusive("forgetting"):
            if intent := Intent.read(self._disk, self._intent):
                self._end(self._purge(intent), "", "it was interrupted before another was tuned: adapt does that")

    @contextmanager
    def _exclusive(self, name: str) -> Iterator[None]:
        """Hold the lock of one kind of work, over all processes. Raises BusyError."""
        self.diary.count()  # creates the folder, and checks the key at once
        unlock = self._disk.lock(self.folder / f"{name}.lock")
        try:
            with self._writing():
                yield
        finally:
            unlock()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Translate an OSError inside into a MissingError."""
        try:
            yield
        except OSError as error:
            reason = "the disk is full" if error.errno in DISK_FULL else error.strerror or str(error)
            raise MissingError(
                f"{self.folder} could not be written: {reason}",
                f"ls -ld {self.folder}; df -h {self.folder}; then the same command again",
            ) from error


def signing_key(folder: Path) -> Path:
    """Return the folder of the key that signs a device's receipts, created if absent."""
    if not (folder / "sartor.key").exists():
        signing.keygen(folder, purposes=("receipt", "proof"))
    return folder
