"""Intent and signed receipt of an erasure.

    FOLDER/forgetting.json   the ids to erase; it exists until the receipt does
    FOLDER/receipts/         one signed document an erasure

Neither contains a word of a row: ids are random. A team's key signs receipts of replies too, and a device's key other
documents: a reader therefore tests the kind and the fields of what was signed, not the signature alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sartor.core import records, signing, strict_json
from sartor.core.errors import SignatureError, StoreError
from sartor.core.filesystem import FileSystem
from sartor.core.installation import upgrade_command
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
            raise StoreError(f"{file} is not whole", f"sartor edge forget NAME ID... again, then rm {file}") from None


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
    signature = signing.signature_of(records.canonical(document), key, "proof")
    if disk.stat(folder) is None:
        disk.mkdir(folder)
        disk.sync_folder(folder.parent)
    file = folder / f"forgotten-{document['date'].replace(':', '')}-{records.digest(document)[:8]}.json"
    disk.replace(file, json.dumps({**document, "signature": signature}, indent=1).encode() + b"\n")
    return file


def check_receipt(
    file: Path, trusted: Iterable[AnyPublicKey] | None = None, *, required: Sequence[str] = DEVICE_FIELDS
) -> dict[str, Any]:
    """Return the fields of a receipt of an erasure that a trusted key signed (`core.signing.check_signature`).

    required: fields that the document must have. Raises SignatureError, also for another kind of signed document, a
    key that occurs twice and a schema that this version does not know.
    """
    try:
        fields = strict_json.loads(file.read_bytes())
        signature = fields.pop("signature")
        document = records.canonical(fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SignatureError(f"{file} is no receipt of a forgetting", "get it again from the device") from None
    signing.check_signature(document, signature, file, subject="the receipt", trusted=trusted, purpose="proof")
    kind, schema = fields.get("kind"), fields.get("schema")
    if kind != KIND or (missing := [name for name in required if name not in fields]):
        described = f"a signed document of the kind {kind!r:.40}" if kind != KIND else f"without {missing[0]!r}"
        raise SignatureError(
            f"{file} is no receipt of this forgetting: it is {described}",
            "give the file that sartor personal forget, or the device, named",
        )
    if type(schema) is not int or schema != SCHEMA:
        raise SignatureError(f"{file} has the schema {schema!r:.20}; this reads {SCHEMA}", upgrade_command())
    return dict(fields)
