"""Ed25519 keys and their purposes, the keys that this machine trusts, and signed documents.

A signature is a small JSON file beside the signed file: schema, algorithm, key id, purpose, signature. It never
contains the public key: `check` searches the keys in SARTOR_HOME/trusted or uses the given ones. RFC 8032, by the
package `cryptography`.

A key is for purposes, which are lines before its PEM block (RFC 7468, 2: explanatory text). Both files have them: the
private key's stop a mistake of its owner, the public key's limit what its reader believes. They need no signature of
their own: trust comes from the file that a reader put into SARTOR_HOME/trusted, and whoever can change that file can
trust any key. So the thief of a server's receipt key gets receipts, and no Release of such a reader's.

A signature of schema 2 covers its purpose and the document (domain separation), so that it holds for no document of
another purpose, even of a key that has both. A signature of schema 1 covers the document alone, and a key without
purposes is from before there were any: both hold for every purpose of the key, with one warning a process.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sartor.core import strict_json
from sartor.core.errors import ConfigError, SignatureError
from sartor.core.filesystem import fsync_descriptor, fsync_directory, write_file_atomic
from sartor.core.home import folder

PASSPHRASE_VARIABLE = "SARTOR_KEY_PASSPHRASE"
_READ_PASSPHRASE = f"read -rs {PASSPHRASE_VARIABLE}; export {PASSPHRASE_VARIABLE}"
SCHEMA = 2  # schema of a signature, which changes less often than a manifest's

# release: Releases, exports and lists of revoked Releases. receipt: receipts of replies and of tunings. proof: proofs
# of erasure, and by retraining. fleet: federated rounds, device reports, update metadata. review: a reviewer's
# decisions.
Purpose = Literal["release", "receipt", "proof", "fleet", "review"]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
_HEADER = re.compile(rb"^sartor-key-purposes:([a-z ]*)$", re.MULTILINE)
_BEGIN = b"-----BEGIN "


@dataclass(frozen=True)
class PublicKey:
    """Public key with its purposes.

    purposes: what it may sign; empty for a key from before keys had purposes, which may sign everything.
    """

    key: Ed25519PublicKey
    purposes: frozenset[Purpose] = frozenset()

    def allows(self, purpose: Purpose) -> bool:
        """Return whether a signature of this purpose may be believed from the key."""
        return not self.purposes or purpose in self.purposes


# A bare key has every purpose: it was derived from the caller's own private key, not read from a file.
AnyPublicKey = PublicKey | Ed25519PublicKey


def bare_key(public: AnyPublicKey) -> Ed25519PublicKey:
    """Return a public key without its purposes."""
    return public.key if isinstance(public, PublicKey) else public


def key_id(public: AnyPublicKey) -> str:
    """Return the first 16 hex digits of the sha256 of the raw public key."""
    raw = bare_key(public).public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


def keygen(
    path: Path, *, trust: bool = False, purposes: Sequence[Purpose] = ("release",), upgrade: bool = False
) -> dict[str, Any]:
    """Create a key pair in the directory `path` and return its key_id, its purposes and both paths.

    The files are `sartor.key` (mode 0600) and `sartor.pub`. The private key is encrypted if SARTOR_KEY_PASSPHRASE is
    set.
    trust: also copy the public key to the folder that `verify` searches.
    purposes: what the key may sign.
    upgrade: write the purposes into a key from before keys had them. The key itself stays, so that what it signed
        stays valid; a copy in SARTOR_HOME/trusted is replaced, and every other reader has to replace theirs.
    Raises ConfigError if a key already exists there: a lost signing key cannot be made again. With `upgrade`, if there
    is none, or if it has purposes.
    """
    if unknown := [purpose for purpose in purposes if purpose not in PURPOSES] or not purposes:
        raise ConfigError(
            f"a key has the purposes {', '.join(PURPOSES)}, and not {unknown if purposes else 'none'}",
            f"sartor keygen {shlex.quote(str(path))} --purpose release",
        )
    if upgrade:
        return _upgrade(path, purposes, trust=trust)
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
    # Created with its final permissions, so that others can never read the secret, and under its own name, which a
    # second keygen at the same time cannot take. It is durable before anybody can trust the public key.
    try:
        descriptor = os.open(private_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"another keygen made a key in {path} just now", "choose another directory") from None
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(_header(purposes) + secret)
        stream.flush()
        fsync_descriptor(stream.fileno())
    fsync_directory(path)
    write_file_atomic(public_file, _header(purposes) + public)
    return _key_files(path, purposes, private.public_key(), trust=trust)


def _upgrade(path: Path, purposes: Sequence[Purpose], *, trust: bool) -> dict[str, Any]:
    """Write purposes into both files of a key that has none."""
    private_file, public_file = path / "sartor.key", path / "sartor.pub"
    command = f"sartor keygen {shlex.quote(str(path))}{''.join(f' --purpose {purpose}' for purpose in purposes)}"
    remedy = f"--upgrade takes the DIR of an old key, with its sartor.pub; {command} makes a new key"
    public = open_public(path, remedy=remedy)
    if public.purposes:
        raise ConfigError(
            f"the key in {path} has its purposes: {', '.join(sorted(public.purposes))}",
            "sartor keygen OTHER_DIR --purpose PURPOSE makes another key",
        )
    identity = key_id(public)
    pem = public_file.read_bytes()
    if private_file.is_file():
        _check_mode(private_file)
        secret = private_file.read_bytes()
        if _purposes_in(secret, private_file):
            secret = secret[secret.index(_BEGIN) :]  # an upgrade that was cut short
        write_file_atomic(private_file, _header(purposes) + secret, mode=0o600)
    write_file_atomic(public_file, _header(purposes) + pem)
    is_trusted = (folder("trusted") / f"{identity}.pub").is_file()
    return _key_files(path, purposes, public.key, trust=trust or is_trusted)


def _key_files(path: Path, purposes: Sequence[Purpose], public: Ed25519PublicKey, *, trust: bool) -> dict[str, Any]:
    """Return the result of `keygen`; with `trust`, copy the public key to the trusted ones."""
    private_file, public_file, identity = path / "sartor.key", path / "sartor.pub", key_id(public)
    if trust:
        write_file_atomic(folder("trusted") / f"{identity}.pub", public_file.read_bytes())
    return {
        "key_id": identity,
        "private": str(private_file),
        "public": str(public_file),
        "purposes": list(dict.fromkeys(purposes)),
    }


def _header(purposes: Sequence[Purpose]) -> bytes:
    return f"sartor-key-purposes: {' '.join(dict.fromkeys(purposes))}\n".encode()


def _purposes_in(pem: bytes, file: Path) -> frozenset[Purpose]:
    """Return the purposes before a PEM block; empty if it states none.

    Raises ConfigError for purposes that this version does not know: the key must not count as one without limits.
    """
    lines = _HEADER.findall(pem.partition(_BEGIN)[0])
    if not lines:
        if b"sartor-key-purposes" in pem.partition(_BEGIN)[0]:
            raise ConfigError(f"{file} states purposes that cannot be read", f"get {file} again from its maker")
        return frozenset()
    words = lines[0].decode().split()
    if len(lines) > 1 or not words or not set(words) <= set(PURPOSES):
        raise ConfigError(
            f"{file} has the purposes {' '.join(words) or 'none'}; known are {', '.join(PURPOSES)}",
            f"get {file} again from its maker, or a newer version of Sartor",
        )
    return frozenset(purpose for purpose in PURPOSES if purpose in words)


def open_private(path: Path, purpose: Purpose | None = None, *, keygen_command: str = "") -> Ed25519PrivateKey:
    """Return the private key in a PEM file; `path` may be the directory that `keygen` created.

    purpose: what the caller will sign with it.
    keygen_command: the command that makes such a key, for remedies; by default `sartor keygen DIR` for the purpose.
    Raises ConfigError if there is none, if others can read it, if it is not for the purpose, or if the passphrase is
    wrong.
    """
    file = path / "sartor.key" if path.is_dir() else path
    keygen_command = keygen_command or f"sartor keygen DIR{f' --purpose {purpose}' if purpose else ''}"
    if not file.is_file():
        raise ConfigError(f"there is no private key at {file}", f"{keygen_command} makes one")
    _check_mode(file)
    pem = file.read_bytes()
    purposes = _purposes_in(pem, file)
    if purpose and purposes and purpose not in purposes:
        raise ConfigError(
            f"the key {file} is for {', '.join(sorted(purposes))}, not for {purpose}",
            f"{keygen_command} makes one that is, in another DIR",
        )
    passphrase = os.environ.get(PASSPHRASE_VARIABLE, "").encode() or None
    try:
        key = serialization.load_pem_private_key(pem, passphrase)
    except TypeError:
        state = "is not encrypted, but a passphrase is set" if passphrase else "is encrypted"
        remedy = f"unset {PASSPHRASE_VARIABLE}" if passphrase else _READ_PASSPHRASE
        raise ConfigError(f"{file} {state}", remedy) from None
    except ValueError:
        raise ConfigError(
            f"{file} is no PEM private key, or the passphrase is wrong",
            f"give the DIR that {keygen_command} made; or {_READ_PASSPHRASE}",
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{file} is not an Ed25519 key", f"{keygen_command} makes one")
    return key


def _check_mode(file: Path) -> None:
    """Raise ConfigError for a private key that others can read."""
    if os.name == "posix" and file.stat().st_mode & 0o077:
        raise ConfigError(
            f"{file} can be read by others (mode {file.stat().st_mode & 0o777:o})",
            f"chmod 600 {shlex.quote(str(file))}",
        )


def open_public(path: Path, *, remedy: str = "--public-key DIR/sartor.pub, as sartor keygen DIR made it") -> PublicKey:
    """Return the public key in a PEM file, with its purposes; `path` may be the directory that `keygen` created.

    remedy: of the error where the caller did not get the path as --public-key.
    Raises ConfigError if there is none.
    """
    file = path / "sartor.pub" if path.is_dir() else path
    try:
        pem = file.read_bytes()
        key = serialization.load_pem_public_key(pem)
    except (OSError, ValueError):
        raise ConfigError(f"{file} is no PEM public key", remedy) from None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{file} is not an Ed25519 key", remedy)
    return PublicKey(key, _purposes_in(pem, file))


def sign(document: bytes, key: Ed25519PrivateKey, purpose: Purpose = "release") -> str:
    """Return the text of a signature file for these bytes."""
    return json.dumps(signature_of(document, key, purpose), indent=1) + "\n"


def signature_of(document: bytes, key: Ed25519PrivateKey, purpose: Purpose) -> dict[str, Any]:
    """Return the content of a signature file as a mapping, for documents that embed their signature."""
    signature = base64.b64encode(key.sign(_signed_bytes(document, purpose))).decode()
    identity = key_id(key.public_key())
    return {
        "schema": SCHEMA,
        "algorithm": "ed25519",
        "key_id": identity,
        "purpose": purpose,
        "signature": signature,
    }


def _signed_bytes(document: bytes, purpose: str) -> bytes:
    """Return the bytes that a signature of schema 2 covers: a domain, the purpose, and the document."""
    return b"sartor signature 2\n" + purpose.encode() + b"\n" + document


def check(
    document: bytes,
    signature_file: Path,
    trusted: Iterable[AnyPublicKey] | None = None,
    purpose: Purpose = "release",
) -> str:
    """Return the id of the trusted key that signed these bytes.

    trusted: the keys to accept; by default those in SARTOR_HOME/trusted.
    purpose: what the document is; another purpose's keys and signatures are refused.
    Raises SignatureError for a missing signature, a signer that is not trusted, is not for the purpose or is revoked,
    or bytes that were not signed.
    """
    if not signature_file.is_file():
        raise SignatureError(
            f"{signature_file.parent} has no signature",
            "sartor release signs an Adapter; sartor export --key KEYS signs an export",
        )
    return check_signature_bytes(
        document, signature_file.read_bytes(), signature_file, signature_file.parent.name, trusted, purpose
    )


def check_signature_bytes(
    document: bytes,
    signature: bytes,
    file: Path,
    subject: str,
    trusted: Iterable[AnyPublicKey] | None,
    purpose: Purpose,
) -> str:
    """Return the id of the trusted key of a signature file's content that was already read, as `check` does."""
    try:
        fields = strict_json.loads(signature)
    except ValueError:
        fields = None
    return check_signature(document, fields, file=file, subject=subject, trusted=trusted, purpose=purpose)


def check_signature(
    document: bytes,
    signature: Any,
    file: Path,
    subject: str,
    trusted: Iterable[AnyPublicKey] | None,
    purpose: Purpose,
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
    by_id = {key_id(key): key if isinstance(key, PublicKey) else PublicKey(key) for key in keys}
    if identity not in by_id:
        names = ", ".join(sorted(by_id)) or "nobody"
        raise SignatureError(
            f"{file} is signed by {identity}, whom this machine does not trust (it trusts {names})",
            f"if you know that key, put its .pub into {folder('trusted')} or give it with --public-key",
        )
    key = by_id[identity]
    if not key.allows(purpose):
        raise SignatureError(
            f"{file} is signed by {identity}, a key for {', '.join(sorted(key.purposes))} and not for {purpose}",
            f"sartor keygen DIR --purpose {purpose} makes a key for it; get {subject} signed by such a key",
        )
    if signature["schema"] == SCHEMA and signature["purpose"] != purpose:
        raise SignatureError(
            f"{file} is a signature of the purpose {signature['purpose']!r:.40}, not {purpose}",
            f"get {subject} again from its maker",
        )
    signed_bytes = document if signature["schema"] == 1 else _signed_bytes(document, purpose)
    try:
        key.key.verify(base64.b64decode(signature["signature"], validate=True), signed_bytes)
    except (InvalidSignature, ValueError):
        raise SignatureError(
            f"{file} does not sign {subject} as it stands: it or its signature was changed",
            "get it again from its maker",
        ) from None
    if signature["schema"] == 1 or not key.purposes and key in keys:
        _warn_any_purpose(file, identity)
    return identity


_warned_of_any: set[str] = set()


def _warn_any_purpose(file: Path, identity: str) -> None:
    """Tell once a process that a signature or its key is from before keys had purposes."""
    if _warned_of_any:
        return
    _warned_of_any.add(identity)
    print(
        f"warning: {file} verifies as `purpose: any`: it or the key {identity} was made before keys had purposes; "
        "its signer writes them down with sartor keygen DIR --upgrade --purpose release, and gives you the new .pub",
        file=sys.stderr,
    )


def trusted_keys() -> list[PublicKey]:
    """Return the keys in SARTOR_HOME/trusted."""
    return _keys_in("trusted")


def trusted_ids(purpose: Purpose) -> set[str]:
    """Return the ids of the keys in SARTOR_HOME/trusted that are for a purpose."""
    return {key_id(key) for key in trusted_keys() if key.allows(purpose)}


def revoked_ids() -> set[str]:
    """Return the ids of the keys in SARTOR_HOME/revoked."""
    return {key_id(key) for key in _keys_in("revoked")}


def _is_signature(signature: Any) -> bool:
    if not isinstance(signature, dict) or signature.get("algorithm") != "ed25519":
        return False
    if type(signature.get("schema")) is not int or signature["schema"] not in (1, SCHEMA):
        return False
    names = ("key_id", "signature") if signature["schema"] == 1 else ("key_id", "signature", "purpose")
    return all(isinstance(signature.get(name), str) and signature[name] for name in names)


def _keys_in(name: str) -> list[PublicKey]:
    return [
        open_public(file, remedy=f"cp DIR/sartor.pub {shlex.quote(str(file))}, of the key's owner")
        for file in sorted(folder(name).glob("*.pub"))
    ]
