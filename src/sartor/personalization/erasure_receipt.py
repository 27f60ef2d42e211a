"""Intent and signed receipt of an erasure.

    FOLDER/forgetting.json   the ids to erase; it exists until the receipt does
    FOLDER/receipts/         one signed document an erasure

Neither contains a word of a row: ids are random. A team's key signs receipts of replies too, and a device's key other
documents: a reader therefore tests the kind and the fields of what was signed, not the signature alone.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sartor.core import records
from sartor.core.errors import StoreError
from sartor.core.filesystem import FileSystem
from sartor.core.signed_document import DocumentForm, read_document, sign_document
from sartor.core.signing import AnyPublicKey
from sartor.personalization.user_rows import now

SCHEMA = 1
KIND = "forgotten"
# fields that a device's receipt and a team's proof of deletion have; no other signed document has them
DEVICE_FIELDS = ("rows", "deltas_gone", "release")
TEAM_FIELDS = ("person", "team", "registry_change", "removed", "searched", "complete")


@dataclass(frozen=True)
class Intent:
    """Intent to erase rows.

    ids: of the rows.
    deltas: digests of the deltas that are erased with them.
    """

    ids: tuple[str, ...]
    deltas: tuple[str, ...] = ()
    began: str = field(default_factory=now)

    def write(self, disk: FileSystem, file: Path) -> None:
        """Write the intent, durably."""
        fields = {"schema": SCHEMA, "kind": "forgetting", "ids": self.ids, "gone": self.deltas, "began": self.began}
        disk.replace(file, records.canonical(fields))

    @classmethod
    def read(cls, disk: FileSystem, file: Path) -> Intent | None:
        """Return the intent in a file, or None without one. Raises StoreError if it is not whole."""
        if disk.stat(file) is None:
            return None
        try:
            with disk.open(file) as stream:
                fields = json.loads(stream.read())
            return cls(tuple(fields["ids"]), tuple(fields["gone"]), fields["began"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise StoreError(
                f"{file} is not whole", f"sartor edge forget NAME ID... again, then rm {shlex.quote(str(file))}"
            ) from None


@dataclass(frozen=True)
class Forgotten:
    """Result of an erasure.

    rows: ids of the erased rows.
    deltas: digests of the erased deltas.
    new_delta: digest of the delta that was tuned instead, or "".
    reason: why there is a new delta or none.
    file: the signed receipt; None if there was nothing to erase.
    """

    rows: tuple[str, ...]
    deltas: tuple[str, ...]
    new_delta: str
    reason: str
    file: Path | None


def write_receipt(disk: FileSystem, folder: Path, fields: Mapping[str, Any], key: Ed25519PrivateKey) -> Path:
    """Write the signed receipt of an erasure, and return its file."""
    document = {**fields, "schema": SCHEMA, "kind": KIND, "date": now()}
    if disk.stat(folder) is None:
        disk.mkdir(folder)
        disk.sync_folder(folder.parent)
    file = folder / f"forgotten-{document['date'].replace(':', '')}-{records.digest(document)[:8]}.json"
    disk.replace(file, sign_document(document, key, "proof"))
    return file


def check_receipt(
    file: Path, trusted: Iterable[AnyPublicKey] | None = None, *, required: Sequence[str] = DEVICE_FIELDS
) -> dict[str, Any]:
    """Return the fields of a receipt of an erasure that a trusted key signed (`core.signing.check_signature`).

    required: fields that the document must have. Raises SignatureError, also for another kind of signed document, a
    key that occurs twice and a schema that this version does not know.
    """
    form = DocumentForm(
        kind=KIND,
        schema=SCHEMA,
        purpose="proof",
        title="receipt of this forgetting",
        required=tuple(required),
        source="give the file that sartor personal forget, or the device, named",
    )
    return read_document(file, form, trusted)
