"""Intent and signed receipt of an erasure.

    FOLDER/forgetting.json   which ids are to go; there until the receipt is
    FOLDER/receipts/         one signed document a forgetting

Neither holds a word of a row: ids are random.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sartor.core import records, signing
from sartor.core.errors import SignatureError, StoreError
from sartor.core.filesystem import FileSystem
from sartor.personalization.user_rows import now

SCHEMA = 1


@dataclass(frozen=True)
class Intent:
    """Rows that are to go. ids: of the rows; deltas: digests of the deltas that go with them."""

    ids: tuple[str, ...]
    deltas: tuple[str, ...] = ()
    began: str = field(default_factory=now)

    def write(self, disk: FileSystem, file: Path) -> None:
        """Make it durable."""
        fields = {"schema": SCHEMA, "kind": "forgetting", "ids": self.ids, "gone": self.deltas, "began": self.began}
        disk.replace(file, records.canonical(fields))

    @classmethod
    def read(cls, disk: FileSystem, file: Path) -> Intent | None:
        """What stands, if anything does. Raises StoreError where it was changed."""
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
    """What a forgetting did. rows: ids that went. deltas: digests of deltas that went. new_delta: of the one that
    works now, or ''.

    reason: how that came about. file: the signed receipt; None where nothing was to be forgotten.
    """

    rows: tuple[str, ...]
    deltas: tuple[str, ...]
    new_delta: str
    reason: str
    file: Path | None


def write_receipt(disk: FileSystem, folder: Path, fields: Mapping[str, Any], key: Ed25519PrivateKey) -> Path:
    """Sign and write what was done; returns its file."""
    document = {"schema": SCHEMA, "kind": "forgotten", "date": now(), **fields}
    signature = signing.signature_of(records.canonical(document), key)
    if disk.stat(folder) is None:
        disk.mkdir(folder)
        disk.sync_folder(folder.parent)
    file = folder / f"forgotten-{document['date'].replace(':', '')}-{records.digest(document)[:8]}.json"
    disk.replace(file, json.dumps({**document, "signature": signature}, indent=1).encode() + b"\n")
    return file


def check_receipt(file: Path, trusted: Iterable[Ed25519PublicKey] | None = None) -> dict[str, Any]:
    """What a receipt says, if a trusted key signed it (as `core.signing.check`). Raises SignatureError."""
    try:
        fields = json.loads(file.read_bytes())
        signature = fields.pop("signature")
        document = records.canonical(fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SignatureError(f"{file} is no receipt of a forgetting", "get it again from the device") from None
    signing.check_signature(document, signature, file, "the receipt", trusted)
    return dict(fields)
