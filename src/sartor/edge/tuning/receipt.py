"""What a tuning within a budget says of itself, signed: which base and recipe, what was planned, what each attempt used.

    receipt.json    {"said": what `Receipt` holds, "signature": Ed25519 over the canonical JSON of it}

It is written whole beside the adapter. A receipt is the device's own word: it proves who says so, and that nobody changed it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sartor.core.artifacts import ADAPTER, digests  # noqa: F401
from sartor.core.errors import ArtifactError, SignatureError
from sartor.core.filesystem import file_digest, write_file_atomic
from sartor.core.numerics import FIRST
from sartor.core.resource_limits import Usage
from sartor.core.signing import check_said, signature_of

SCHEMA, FILE = 1, "receipt.json"
# done; paused by the policy or a signal, and can go on; spent: time or disk ran out, what was learnt is saved
Outcome = Literal["done", "paused", "spent", "refused", "failed"]


@dataclass(frozen=True)
class Attempt:
    """One process. rung: as `plan.Rung.id`; updates: done when it ended, of the whole run; reason: why it ended."""

    rung: str
    micro_batch_tokens: int
    is_narrow: bool
    predicted_peak_bytes: int
    usage: Usage
    updates: int
    reason: str


@dataclass(frozen=True)
class Receipt:
    """See the module's text. plan: the predicted peak of the last attempt, by what is held. adapter: {file: sha256}.

    numerics: of the arithmetic of the last attempt (core/numerics.py).
    """

    schema: int
    base: dict[str, str]
    recipe: dict[str, Any]
    limits: dict[str, float]
    plan: dict[str, int]
    attempts: list[Attempt]
    resumed_at: list[int]
    adapter: dict[str, str]
    outcome: Outcome
    reason: str
    numerics: int = FIRST

    @property
    def document(self) -> bytes:
        """What is signed: JSON with sorted keys and no spaces."""
        return _canonical(asdict(self))

    def write(self, folder: Path, key: Ed25519PrivateKey) -> Path:
        """Sign it and write it whole into `folder`. Returns the file."""
        said = {"said": json.loads(self.document), "signature": signature_of(self.document, key)}
        write_file_atomic(folder / FILE, json.dumps(said, indent=1).encode() + b"\n")
        return folder / FILE


def verify_receipt(folder: Path, trusted: Iterable[Ed25519PublicKey] | None = None) -> Receipt:
    """The receipt in an adapter's folder, checked against trusted keys (see `core.signing`) and the adapter's files.

    Raises ArtifactError where it is absent or not whole, SignatureError for a signer who is not trusted, or what was changed.
    """
    file = folder / FILE
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        receipt, signature = _receipt(said["said"]), said["signature"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is no receipt: {error!r}", "tune_within writes one beside what it tunes") from None
    check_said(_canonical(said["said"]), signature, file, "the receipt", trusted)
    for name, digest in receipt.adapter.items():
        if Path(name).name != name or not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise SignatureError(f"{folder / name} is not the file that {file} speaks of", "get both again from the device")
    return receipt


def _canonical(said: Any) -> bytes:
    return json.dumps(said, sort_keys=True, separators=(",", ":")).encode()


def _receipt(said: dict[str, Any]) -> Receipt:
    if said["schema"] != SCHEMA:
        raise ValueError(f"its schema is {said['schema']}; this Sartor reads {SCHEMA}")
    attempts = [Attempt(**{**one, "usage": Usage(**one["usage"])}) for one in said["attempts"]]
    return Receipt(**{**said, "attempts": attempts})
