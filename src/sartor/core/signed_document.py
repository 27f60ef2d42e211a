"""Documents that contain their own signature: a JSON object with `schema`, `kind` and `signature`.

One key may sign several kinds of document for one purpose. A reader therefore tests the kind and the fields of what
was signed, not the signature alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sartor.core import records, signing, strict_json
from sartor.core.errors import SignatureError
from sartor.core.installation import upgrade_command
from sartor.core.signing import AnyPublicKey, Purpose


@dataclass(frozen=True, kw_only=True)
class DocumentForm:
    """What a reader expects of a signed document.

    title: what it is called in errors, without an article.
    required: fields that no other kind of document has all of.
    source: where the reader gets a sound one, as an instruction.
    """

    kind: str
    schema: int
    purpose: Purpose
    title: str
    required: tuple[str, ...]
    source: str


def sign_document(fields: Mapping[str, Any], key: Ed25519PrivateKey, purpose: Purpose) -> bytes:
    """Return the file of a document: its fields and its signature, as indented JSON."""
    signature = signing.signature_of(records.canonical(fields), key, purpose)
    return json.dumps({**fields, "signature": signature}, indent=1).encode() + b"\n"


def read_document(file: Path, form: DocumentForm, trusted: Iterable[AnyPublicKey] | None = None) -> dict[str, Any]:
    """Return the fields of a document that a trusted key signed (`signing.check_signature`), without the signature.

    Raises SignatureError, also for another kind of signed document, a key that occurs twice and a schema that this
    version does not know.
    """
    try:
        fields = strict_json.loads(file.read_bytes())
        signature = fields.pop("signature")
        document = records.canonical(fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SignatureError(f"{file} is no {form.title}", form.source) from None
    signing.check_signature(
        document, signature, file, subject=f"the {form.title}", trusted=trusted, purpose=form.purpose
    )
    kind, schema = fields.get("kind"), fields.get("schema")
    if kind != form.kind or (missing := [name for name in form.required if name not in fields]):
        described = f"a signed document of the kind {kind!r:.40}" if kind != form.kind else f"without {missing[0]!r}"
        raise SignatureError(f"{file} is no {form.title}: it is {described}", form.source)
    if type(schema) is not int or schema != form.schema:
        raise SignatureError(f"{file} has the schema {schema!r:.20}; this reads {form.schema}", upgrade_command())
    return dict(fields)
