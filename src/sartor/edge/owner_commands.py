"""Verbs of a device owner: add, tune, undo, forget.

DeviceOptions in `device_commands.py` define the delivery of releases. PersonOptions define the personal delta on top
of one, and its limits.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sartor.core import model_refs
from sartor.core.errors import BudgetError, BusyError, ConfigError, MissingError, ModelError, SourceError
from sartor.core.records import Example
from sartor.edge.owner.adaptation import AdaptationSettings, Adapted
from sartor.edge.owner.local_adapters import shipped
from sartor.edge.owner.personal_model import OwnerModel, signing_key
from sartor.edge.owner.row_keys import FileKey, Keyring, KeySource, Passphrase
from sartor.edge.tuning.budgeted_tuning import FILE, DeviceBudget, Receipt, tune_within_budget
from sartor.edge.tuning.energy_policy import EnergyPolicy
from sartor.edge.tuning.tuning_job import TuningJob
from sartor.personalization.user_rows import example_of, now

PASSPHRASE_VARIABLE = "SARTOR_PERSON_PASSPHRASE"
# Fields of a row's JSON that are not part of the row itself
_FEEDBACK_FIELDS = ("rating", "correction")


@dataclass(frozen=True)
class PersonOptions:
    """Rows of one person, the release below them, and the limits of a tuning.

    name: name of the release in `store`.
    folder: folder of the person.
    key: key of the rows: a file, `keyring`, or `passphrase` (in SARTOR_PERSON_PASSPHRASE). By default a file in the
    folder, which protects from other users alone.
    base: base in transformers' layout, in another location than the release names.
    probe: rows whose loss may not rise; by default the release's canaries.
    recipe: values that differ from `user_tokens.DEFAULTS`.
    policy: energy policy; its `root` is that of sysfs.
    """

    name: str
    store: Path
    folder: Path
    key: str = ""
    base: str = ""
    probe: Path | None = None
    most_probe_loss: float = 0.05
    recipe: Mapping[str, Any] = field(default_factory=dict)
    budget: DeviceBudget = field(default_factory=DeviceBudget)
    policy: EnergyPolicy = field(default_factory=EnergyPolicy)


def add(options: PersonOptions, rows: Path | str) -> dict[str, Any]:
    """Add rows of a JSONL file to the encrypted store.

    Rows have any form that `curate` reads, with `rating` (-1 bad .. 1 good) and `correction` if there are. All rows
    are added, or none. The file itself stays, unencrypted: remove it.

    Raises SourceError for a row that cannot be read, with its line, and BudgetError above the store's limit.
    """
    person = _person(options)
    parsed = _read_rows(Path(rows))
    ids = person.add_all([(row, fields.get("rating"), str(fields.get("correction", ""))) for row, fields in parsed])
    return {"name": options.name, "added": len(ids), "ids": ids, "rows": person.diary.count()}


def tune(options: PersonOptions, *, again: bool = False) -> dict[str, Any]:
    """Tune a delta on the person's rows within the budget.

    The delta becomes current if it is better on rows that it was not trained on.

    again: also tune on rows whose last tuning brought nothing.

    Raises BusyError if the policy refuses, now or meanwhile: the same call then continues. Raises BudgetError if no
    way fits the budget, or time is up.
    """
    person = _person(options)
    adapted = person.adapt(again=again)
    return {**_status_fields(options, person), **_adapted_fields(adapted)}


def undo(options: PersonOptions, *, reason: str = "") -> dict[str, Any]:
    """Go back to the previous delta, or to the shipped release."""
    person = _person(options)
    person.undo(reason or "the person undid it")
    return _status_fields(options, person)


def forget(
    options: PersonOptions,
    ids: tuple[str, ...] = (),
    *,
    since: str = "",
    before: str = "",
    containing: str = "",
    retune: bool = True,
) -> dict[str, Any]:
    """Erase rows, and every delta that was tuned on one; with `retune`, tune another on the rows left.

    All given conditions must hold: ids; ISO dates (since inclusive, before exclusive); a text, ignoring case. The
    signed receipt lists the erased rows, the erased deltas, and the new delta. Raises ConfigError if no condition is
    given.
    """
    person = _person(options)
    forgotten = person.forget(ids, since=since, before=before, containing=containing, retune=retune)
    fields = {
        "forgotten": list(forgotten.rows),
        "deltas_gone": list(forgotten.deltas),
        "delta_came": forgotten.new_delta,
        "why": forgotten.reason,
    }
    return {**_status_fields(options, person), **fields, "receipt": str(forgotten.file or "")}


def _status_fields(options: PersonOptions, person: OwnerModel) -> dict[str, Any]:
    """Return the current release and delta as JSON fields."""
    status = person.status()
    fields = {
        "name": options.name,
        "version": status.release,
        "release": str(shipped(options.store, options.name).path),
    }
    return {
        **fields,
        "adapter": str(status.adapter),
        "delta": status.delta,
        "rows": status.rows,
        "notes": list(status.notes),
    }


def _adapted_fields(adapted: Adapted) -> dict[str, Any]:
    """Return the outcome of a tuning as JSON fields."""
    verdict = asdict(adapted.verdict) if adapted.verdict else None
    counts = {"trained": adapted.trained, "held_out": adapted.held_out, "left_out": dict(adapted.left_out)}
    budget = {"peak_memory_bytes": 0, "limit_bytes": 0, "receipt": "", "rungs": []}
    return {
        "changed": bool(adapted.delta),
        "why": adapted.reason,
        **counts,
        "verdict": verdict,
        **budget,
        **adapted.facts,
    }


def _person(options: PersonOptions) -> OwnerModel:
    """Return the model of the person, with the tuner and the policy of the options."""
    release = shipped(options.store, options.name)
    settings = AdaptationSettings(
        options.name,
        _base(options, release.path),
        probe=[fields for _, fields in _read_rows(options.probe)] if options.probe else [],
        most_probe_loss=options.most_probe_loss,
        recipe=options.recipe,
    )
    return OwnerModel(
        options.folder,
        options.store,
        _key(options),
        settings,
        tune=lambda job: _tune_job(options, job),
        may_run=options.policy.refusal,
    )


def _tune_job(options: PersonOptions, job: TuningJob) -> dict[str, Any]:
    """Tune within the budget and keep the receipt.

    The rest of the work directory holds tokens and is left to the caller, who removes it. Raises BusyError if the
    tuning pauses, BudgetError if it is not done.
    """
    receipt = tune_within_budget(
        job, options.budget, key=signing_key(options.folder / "signer"), policy=options.policy.refusal
    )
    receipt_file = options.folder / "receipts" / f"tuning-{now().replace(':', '')}.json"
    receipt_file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(job.out) / FILE, receipt_file)
    if receipt.outcome == "paused":
        raise BusyError(
            f"the tuning pauses: {receipt.reason}; what it has is saved", "the same command goes on there", 600
        )
    if receipt.outcome != "done":
        raise BudgetError(
            f"the tuning is not done: {receipt.reason}; {receipt_file} says more", "the same command, a larger budget"
        )
    return _receipt_fields(receipt, receipt_file)


def _receipt_fields(receipt: Receipt, receipt_file: Path) -> dict[str, Any]:
    """Return the JSON fields of a receipt."""
    usages = [attempt.usage for attempt in receipt.attempts]
    return {
        "peak_memory_bytes": max(item.peak_bytes for item in usages),
        "predicted_peak_bytes": receipt.attempts[-1].predicted_peak_bytes,
        "limit_bytes": usages[-1].limit_bytes,
        "held_by": usages[-1].held_by,
        "rungs": [attempt.rung for attempt in receipt.attempts],
        "receipt": str(receipt_file),
    }


def _base(options: PersonOptions, release: Path) -> Path:
    """Return the release's base in transformers' layout.

    Raises ModelError for an export or for another base, MissingError if the base is not on this device.
    """
    if not (release / "release.json").is_file():
        raise ModelError(
            f"{options.name} is an export here, and a person teaches a Release alone",
            "sartor edge publish RELEASE REPOSITORY, with the Release and no export of it",
        )
    fields = json.loads((release / "release.json").read_bytes())["base"]
    base_ref = model_refs.locate_base(options.base or fields["name"], option="--base")
    if base_ref.digest != fields["digest"]:
        raise ModelError(
            f"{release} was tuned on the base {fields['digest'][:12]}, and {base_ref.name} is {base_ref.short_digest}",
            "--base DIR",
        )
    if not (base_ref.path / "config.json").is_file():
        raise MissingError(
            f"the base {base_ref.name} is not on this device in transformers' layout, at {base_ref.path}",
            "`sartor ask` with the release converts it once; or copy that folder here",
        )
    return base_ref.path


def _key(options: PersonOptions) -> KeySource:
    """Return the source of the key of the rows. Raises ConfigError if the passphrase is not set."""
    if options.key == "keyring":
        return Keyring()
    if options.key == "passphrase":
        if not (passphrase := os.environ.get(PASSPHRASE_VARIABLE, "")):
            raise ConfigError(
                f"{PASSPHRASE_VARIABLE} is not set",
                f"read -rs {PASSPHRASE_VARIABLE}; export {PASSPHRASE_VARIABLE}; or --row-key FILE",
            )
        return Passphrase(passphrase)
    return FileKey(Path(options.key) if options.key else options.folder / "device.key")


def _read_rows(file: Path) -> list[tuple[Example, dict[str, Any]]]:
    """Return the row and the JSON fields of each line of a JSONL file.

    All lines are read before any row is used. Raises SourceError for a file or a line that cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{file} cannot be read: {error}",
            f"ls -l {file}; of another encoding: iconv -f CP1252 -t UTF-8 {file} > rows.jsonl",
        ) from None
    return [_parse_row(f"{file}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def _parse_row(location: str, line: str) -> tuple[Example, dict[str, Any]]:
    """Return the row and the JSON fields of a line. Raises SourceError."""
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise SourceError(f"{location}: no JSON: {error}", "one JSON object a line; nothing was added") from None
    if not isinstance(fields, dict):
        raise SourceError(f"{location}: no JSON object", "one JSON object a line; nothing was added")
    rating = fields.get("rating")
    if rating is not None and not (isinstance(rating, int | float) and -1 <= rating <= 1):
        raise SourceError(
            f"{location}: the rating is {rating!r}", "a number from -1 (bad) to 1 (good); nothing was added"
        )
    try:
        return example_of({name: value for name, value in fields.items() if name not in _FEEDBACK_FIELDS}), fields
    except SourceError as error:
        raise SourceError(f"{location}: {error.problem}", f"{error.remedy}; nothing was added") from None
