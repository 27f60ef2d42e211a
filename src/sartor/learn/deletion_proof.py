"""Signed proof of a user's erasure: its verdict, and what it must not leave out.

    STATE/deletions/forgotten-<time>-<digest>.json    the proof: `sartor personal proof` checks it

A proof of an earlier erasure counts in a later one: what was tuned on the user's rows stands although those rows are
gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any

from sartor.core import catalogue, signing
from sartor.core.artifacts import read_manifest
from sartor.core.errors import ArtifactError, SignatureError
from sartor.learn.deletion_intent import FOLDER, DeletionIntent, Descended
from sartor.learn.user_data import is_made_of
from sartor.personalization.erasure_receipt import TEAM_FIELDS, check_receipt
from sartor.serving.registry.user_versions import is_personal

STANDS = "stands"
COPIES = "adapters"  # folder of a team's own copies of Releases
_UNSEEN = "its Dataset is not there, so nobody can tell whether it held the user's rows"


class Verdict(StrEnum):
    """Verdict of a proof.

    REMOVED: removed everywhere; nothing that was made of the data stands.
    WEIGHTS_STAND: removed from every store; what was tuned on it stands, and is listed.
    FAILED: words or rows of the user are left, or could not be looked for, or a server has not confirmed.
    """

    REMOVED = "removed everywhere"
    WEIGHTS_STAND = "removed from stores; tuned weights stand"
    FAILED = "failed"


def verdict_of(*, is_left: bool, tuned_on_it: Sequence[Descended]) -> Verdict:
    """Return the verdict.

    is_left: whether anything of the user is left in a store, or could not be looked for.
    """
    if is_left:
        return Verdict.FAILED
    return Verdict.WEIGHTS_STAND if any(item["state"] == STANDS for item in tuned_on_it) else Verdict.REMOVED


def check_proof(file: Path | str, key: Path | str | None = None) -> dict[str, Any]:
    """Return the content of a proof that `key` signed, by default a key in SARTOR_HOME/trusted.

    A proof from before verdicts has the verdict "not stated": its `complete` did not count tuned weights.
    Raises SignatureError, also for another kind of document signed by that key.
    """
    trusted: Sequence[signing.PublicKey] | None = [signing.open_public(Path(key))] if key else None
    fields = check_receipt(Path(file), trusted, required=TEAM_FIELDS)
    return {"verdict": "not stated", **fields}


def descended_from(dataset_id: str) -> list[Descended]:
    """Return what was made of a Dataset, directly or not, also what is not where it was."""
    return [asdict(item) for item in catalogue.descendants(dataset_id)]


def tuned_on_user(state: Path, person: str, intent: DeletionIntent) -> list[Descended]:
    """Return what was tuned on the user's rows, by this erasure and by every earlier one, with its state now.

    What was tuned on the inbox after the user's first line, and on a Dataset that is no longer there, counts too.
    The team's own copy of a Release is an entry of its own.
    """
    entries = [*intent.tuned_on_it, *_of_earlier_proofs(state, person)]
    if intent.since:
        entries += _on_unseen_datasets(state, intent.since)
    result: dict[tuple[str, str], Descended] = {}
    for item in entries:
        place = catalogue.locate(item["id"], item["path"])
        path = str(place) if place else item["path"]
        result.setdefault((item["id"], path), {**item, "path": path, "state": STANDS if place else "not there"})
        copy = state / COPIES / item["id"]
        if item["kind"] == "release" and copy.is_dir():
            result.setdefault((item["id"], str(copy)), {**item, "path": str(copy), "state": STANDS})
    return list(result.values())


def _of_earlier_proofs(state: Path, person: str) -> Iterator[Descended]:
    for file in sorted((state / FOLDER).glob("forgotten-*.json")):
        try:
            fields = check_proof(file, state / "keys")
        except SignatureError:
            continue  # damaged, or of an earlier key
        if fields["person"] == person:
            yield from fields.get("tuned_on_it", [])
            for dataset in fields["removed"].get("datasets", []):
                yield from dataset.get("tuned_on_it", [])


def _on_unseen_datasets(state: Path, since: str) -> Iterator[Descended]:
    for path in catalogue.existing("adapter"):
        try:
            manifest = read_manifest(path, ("adapter",))
        except ArtifactError:
            continue
        if is_personal(path, state) or str(manifest.get("created", "")) < since:
            continue
        if any(is_made_of(source, state) for source in _mappings(manifest.get("sources"))) and any(
            parent.get("kind") == "dataset"
            and catalogue.locate(str(parent["id"]), str(parent.get("path", ""))) is None
            for parent in _mappings(manifest.get("parents"))
        ):
            own = {"kind": "adapter", "id": manifest["id"], "path": str(path), "state": STANDS}
            yield from ({**item, "why": _UNSEEN} for item in [own, *descended_from(manifest["id"])])


def _mappings(value: Any) -> Iterable[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
