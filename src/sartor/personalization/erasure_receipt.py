"""Intent and signed receipt of an erasure.

    FOLDER/forgetting.json   the ids to erase; it exists until the receipt does
    FOLDER/receipts/         one signed document an erasure

Neither contains a word of a row: ids are random.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sartor.core import records, signing, strict_json
from sartor.core.errors import SignatureError, StoreError
from sartor.core.filesystem import FileSystem
from sartor.core.signing import AnyPublicKey
from sartor.personalization.user_rows import now

SCHEMA = 1


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
    document = {"schema": SCHEMA, "kind": "forgotten", "date": now(), **fields}
    signature = signing.signature_of(records.canonical(document), key, "proof")
    if disk.stat(folder) is None:
        disk.mkdir(folder)
        disk.sync_folder(folder.parent)
    file = folder / f"forgotten-{document['date'].replace(':', '')}-{records.digest(document)[:8]}.json"
    disk.replace(file, json.dumps({**document, "signature": signature}, indent=1).encode() + b"\n")
    return file


def check_receipt(file: Path, trusted: Iterable[AnyPublicKey] | None = None) -> dict[str, Any]:
    """Return the fields of a receipt that a trusted key signed (`core.signing.check_signature`).

    Raises SignatureError.
    """
    try:
        fields = strict_json.loads(file.read_bytes())
        signature = fields.pop("signature")
        document = records.canonical(fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SignatureError(f"{file} is no receipt of a forgetting", "get it again from the device") from None
    signing.check_signature(document, signature, file, subject="the receipt", trusted=trusted, purpose="proof")
    return dict(fields)
