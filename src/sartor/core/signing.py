"""Ed25519 keys, the keys that this machine trusts, and signed documents.

A signature is a small JSON file beside the signed file: schema, algorithm, key id, signature. It never contains the
public key: `check` searches the keys in SARTOR_HOME/trusted or uses the given ones. RFC 8032, by the package
`cryptography`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sartor.core.errors import ConfigError, SignatureError
from sartor.core.home import folder

PASSPHRASE_VARIABLE = "SARTOR_KEY_PASSPHRASE"
SCHEMA = 1  # schema of a signature, which changes less often than a manifest's


def key_id(public: Ed25519PublicKey) -> str:
    """Return the first 16 hex digits of the sha256 of the raw public key."""
    raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


def keygen(path: Path, *, trust: bool = False) -> dict[str, str]:
    """Create a key pair in the directory `path` and return its key_id and both paths.

    The files are `sartor.key` (mode 0600) and `sartor.pub`. The private key is encrypted if SARTOR_KEY_PASSPHRASE is
    set.
    trust: also copy the public key to the folder that `verify` searches.
    Raises ConfigError if a key already exists there: a lost signing key cannot be made again.
    """
    private_file, public_file = path / "sartor.key", path / "sartor.pub"
    if private_file.exists() or public_file.exists():
        raise ConfigError(
            f"{path} holds a key already", "choose another directory; an overwritten key is lost for ever"
        )
    private = Ed25519PrivateKey.generate()
    passphrase = os.environ.get(PASSPHRASE_VARIABLE, "").encode()
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    secret = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path.mkdir(parents=True, exist_ok=True)
    # created with its final permissions, so that others can never read the secret
    with os.fdopen(os.open(private_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(secret)
    public_file.write_bytes(public)
    identity = key_id(private.public_key())
    if trust:
        (folder("trusted") / f"{identity}.pub").write_bytes(public)
    return {"key_id": identity, "private": str(private_file), "public": str(public_file)}


def open_private(path: Path) -> Ed25519PrivateKey:
    """Return the private key in a PEM file; `path` may be the directory that `keygen` created.

    Raises ConfigError if there is none, if others can read it, or if the passphrase is wrong.
    """
    file = path / "sartor.key" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"there is no private key at {file}", "sartor keygen DIR makes one")
    if os.name == "posix" and file.stat().st_mode & 0o077:
        raise ConfigError(f"{file} can be read by others (mode {file.stat().st_mode & 0o777:o})", f"chmod 600 {file}")
    passphrase = os.environ.get(PASSPHRASE_VARIABLE, "").encode() or None
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), passphrase)
    except TypeError:
        state = "is not encrypted, but a passphrase is set" if passphrase else "is encrypted"
        raise ConfigError(f"{file} {state}", f"{'un' if passphrase else ''}set {PASSPHRASE_VARIABLE}") from None
    except ValueError:
        raise ConfigError(
            f"{file} is no PEM private key, or the passphrase is wrong",
            f"--key DIR, as sartor keygen DIR made it; or export {PASSPHRASE_VARIABLE}=...",
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{file} is not an Ed25519 key", "sartor keygen DIR makes one")
    return key


def open_public(path: Path) -> Ed25519PublicKey:
    """Return the public key in a PEM file; `path` may be the directory that `keygen` created.

    Raises ConfigError if there is none.
    """
    file = path / "sartor.pub" if path.is_dir() else path
    try:
        key = serialization.load_pem_public_key(file.read_bytes())
    except (OSError, ValueError):
        raise ConfigError(
            f"{file} is no PEM public key", "--public-key DIR/sartor.pub, as sartor keygen DIR made it"
        ) from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{file} is not an Ed25519 key", "give the sartor.pub that keygen made")
    return key


def sign(document: bytes, key: Ed25519PrivateKey) -> str:
    """Return the text of a signature file for these bytes."""
    return json.dumps(signature_of(document, key), indent=1) + "\n"


def signature_of(document: bytes, key: Ed25519PrivateKey) -> dict[str, Any]:
    """Return the content of a signature file as a mapping, for documents that embed their signature."""
    signature = base64.b64encode(key.sign(document)).decode()
    return {"schema": SCHEMA, "algorithm": "ed25519", "key_id": key_id(key.public_key()), "signature": signature}


def check(document: bytes, signature_file: Path, trusted: Iterable[Ed25519PublicKey] | None = None) -> str:
    """Return the id of the trusted key that signed these bytes.

    trusted: the keys to accept; by default those in SARTOR_HOME/trusted.
    Raises SignatureError for a missing signature, a signer that is not trusted or is revoked, or bytes that were not
    signed.
    """
    if not signature_file.is_file():
        raise SignatureError(
            f"{signature_file.parent} has no signature",
            "sartor release signs an Adapter; sartor export --key KEYS signs an export",
        )
    try:
        signature = json.loads(signature_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        signature = None
    return check_signature(
        document, signature, file=signature_file, subject=signature_file.parent.name, trusted=trusted
    )


def check_signature(
    document: bytes, signature: Any, file: Path, subject: str, trusted: Iterable[Ed25519PublicKey] | None = None
) -> str:
    """Return the id of the trusted key of a signature that was already read, as `check` does.

    file: name of the signature's file, for errors.
    subject: name of the signed document, for errors.
    """
    if not _is_signature(signature):
        raise SignatureError(f"{file} is not a signature of Sartor", f"get {file} again from who signed it")
    keys = list(trusted_keys() if trusted is None else trusted)
    identity = signature["key_id"]
    if identity in revoked_ids():
        raise SignatureError(f"the signer {identity} of {file} is revoked", "ask its maker for a new one")
    by_id = {key_id(key): key for key in keys}
    if identity not in by_id:
        names = ", ".join(sorted(by_id)) or "nobody"
        raise SignatureError(
            f"{file} is signed by {identity}, whom this machine does not trust (it trusts {names})",
            f"if you know that key, put its .pub into {folder('trusted')} or give it with --public-key",
        )
    try:
        by_id[identity].verify(base64.b64decode(signature["signature"], validate=True), document)
    except (InvalidSignature, ValueError):
        raise SignatureError(
            f"{file} does not sign {subject} as it stands: it or its signature was changed",
            "get it again from its maker",
        ) from None
    return identity


def trusted_keys() -> list[Ed25519PublicKey]:
    """Return the keys in SARTOR_HOME/trusted."""
    return _keys_in("trusted")


def trusted_ids() -> set[str]:
    """Return the ids of the keys in SARTOR_HOME/trusted."""
    return {key_id(key) for key in trusted_keys()}


def revoked_ids() -> set[str]:
    """Return the ids of the keys in SARTOR_HOME/revoked."""
    return {key_id(key) for key in _keys_in("revoked")}


def _is_signature(signature: Any) -> bool:
    if not isinstance(signature, dict) or signature.get("schema") != SCHEMA or signature.get("algorithm") != "ed25519":
        return False
    return all(isinstance(signature.get(name), str) and signature[name] for name in ("key_id", "signature"))


def _keys_in(name: str) -> list[Ed25519PublicKey]:
    return [open_public(file) for file in sorted(folder(name).glob("*.pub"))]
