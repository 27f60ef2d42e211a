"""Key wrapping by file, keyring or passphrase.

    FileKey     a file that its owner alone may read     Keyring     the system's keyring (the package `keyring`)
    Passphrase  scrypt (RFC 7914) of a typed passphrase

A key source holds the key that wraps. It gives a fresh key whenever the rows get a new one, and drops the old ones
once the rows are stored under the new one. So a copy of the old rows cannot be decrypted with any key that the device
still has. docs/edge-personal.md explains what each source protects from, and from what it does not.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import os
import secrets
import shlex
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from sartor.core import records
from sartor.core.errors import ConfigError, ExtraError, KeyRefusedError, MissingError, StoreError
from sartor.core.filesystem import FileSystem, PrivateFileSystem
from sartor.core.installation import pip_command

KEY_BYTES, NONCE_BYTES = 32, 12
# N = 2**15, r = 8, p = 3: 32 MiB, a small one of the settings that OWASP's Password Storage Cheat Sheet rates equal
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 15, 8, 3
# A header comes from the disk: its parameters must not exhaust the device's memory
_IN_A_FILE = "keep the key in a file: --row-key FILE"
_MOST_SCRYPT_BYTES = 256 << 20


class KeySource(Protocol):
    """Source of the key that wraps.

    kind: its name in a header.
    """

    kind: str

    def fresh(self, owner: str) -> tuple[dict[str, Any], bytes]:
        """Return the header's fields and a new key, durable beside the earlier keys.

        owner: whose key it is.
        """
        ...

    def find(self, fields: Mapping[str, Any]) -> bytes:
        """Return the key that a header names. Raises KeyRefusedError if this source does not have it."""
        ...

    def settle(self, fields: Mapping[str, Any]) -> None:
        """Drop every key of the same owner except the one that this header names."""
        ...


def wrap(secret: bytes, header_fields: Mapping[str, Any], source: KeySource, owner: str) -> dict[str, Any]:
    """Return a header: `header_fields`, the source's fields, and the secret under a fresh key.

    The cipher is ChaCha20-Poly1305 (RFC 8439), with the header as associated data.
    """
    fields, key = source.fresh(owner)
    header = {**header_fields, "source": {"kind": source.kind, **fields}}
    nonce = os.urandom(NONCE_BYTES)
    sealed = ChaCha20Poly1305(key).encrypt(nonce, secret, records.canonical(header))
    return {**header, "wrapped": base64.b64encode(nonce + sealed).decode()}


def unwrap(header: Mapping[str, Any], source: KeySource) -> bytes:
    """Return the secret of a header.

    Raises KeyRefusedError for another key, or a header that was changed; StoreError for an invalid header.
    """
    aad = {name: value for name, value in header.items() if name != "wrapped"}
    fields = aad.get("source")
    if not isinstance(fields, dict) or not isinstance(header.get("wrapped"), str):
        raise StoreError("the header of the rows is not whole", "cp BACKUP/diary to the person's directory")
    if fields.get("kind") != source.kind:
        raise KeyRefusedError(
            f"the rows are under a key of the kind {fields.get('kind')!r:.40}, not {source.kind!r}",
            f"--row-key of the kind {fields.get('kind')!r:.40}: FILE, keyring or passphrase",
        )
    key = source.find(fields)
    try:
        sealed = base64.b64decode(header["wrapped"], validate=True)
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], records.canonical(aad))
    except (InvalidTag, ValueError):
        raise KeyRefusedError(
            f"the {source.kind} does not open the rows: it is another one, or the header of the rows was changed",
            "--row-key with the one that sartor edge add had",
        ) from None


def _add_key(keys: Mapping[str, bytes], owner: str) -> tuple[str, dict[str, bytes]]:
    """Return the name of a new key, and all keys."""
    key = secrets.token_bytes(KEY_BYTES)
    name = f"{owner}.{hashlib.sha256(key).hexdigest()[:16]}"
    return name, {**keys, name: key}


def _prune(keys: Mapping[str, bytes], fields: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the keys without those of the same owner that the header does not name."""
    owner = fields["key"].partition(".")[0]
    return {name: key for name, key in keys.items() if name == fields["key"] or name.partition(".")[0] != owner}


def _dump(keys: Mapping[str, bytes]) -> str:
    """Return the keys as JSON."""
    encoded = {name: base64.b64encode(key).decode() for name, key in keys.items()}
    return json.dumps({"schema": 1, "kind": "device key", "keys": encoded}) + "\n"


def _parse(text: str | bytes, location: str) -> dict[str, bytes]:
    """Return the keys in a JSON text. Raises KeyRefusedError."""
    try:
        fields = json.loads(text)
        keys = {name: base64.b64decode(key, validate=True) for name, key in fields["keys"].items()}
        if fields["schema"] != 1 or any(len(key) != KEY_BYTES for key in keys.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise KeyRefusedError(
            f"{location} holds no key of a device", "restore it from a copy; without it the rows are lost"
        ) from None
    return keys


def _find_key(keys: Mapping[str, bytes], fields: Mapping[str, Any], location: str) -> bytes:
    """Return the key that a header names. Raises KeyRefusedError."""
    name = fields.get("key")
    if not isinstance(name, str) or name not in keys:
        raise KeyRefusedError(
            f"{location} does not hold the key {name!r:.40} of these rows",
            "--row-key with the one that sartor edge add had",
        )
    return keys[name]


@dataclass
class FileKey:
    """Keys in a file that its owner alone may read; created when first needed. Put it on another disk than the rows.

    Raises ConfigError for a file that others may read or that belongs to another user.
    """

    path: Path
    disk: FileSystem = field(default_factory=PrivateFileSystem)
    kind: str = "file"

    def fresh(self, owner: str) -> tuple[dict[str, Any], bytes]:
        """Return the header's fields and a new key, added to the file."""
        name, keys = _add_key(self._load_keys(), owner)
        self._write(keys)
        return {"key": name}, keys[name]

    def find(self, fields: Mapping[str, Any]) -> bytes:
        """Return the key that a header names. Raises KeyRefusedError if the file does not hold it."""
        if self.disk.stat(self.path) is None:
            raise KeyRefusedError(
                f"there is no key at {self.path}",
                f"cp BACKUP/{self.path.name} {self.path}; without a copy the rows are lost",
            )
        return _find_key(self._load_keys(), fields, str(self.path))

    def settle(self, fields: Mapping[str, Any]) -> None:
        """Drop every key of the same owner except the one that this header names."""
        keys = self._load_keys()
        if (remaining := _prune(keys, fields)) != keys:
            self._write(remaining)

    def check_rights(self) -> None:
        """Raise ConfigError unless the file is regular, this user's, and unreadable to others."""
        status = os.lstat(self.path)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{self.path} is no plain file", "give the path of the key itself, not of a link")
        if os.name == "posix" and status.st_mode & 0o077:
            raise ConfigError(
                f"{self.path} is open to others (mode {status.st_mode & 0o777:o})",
                f"chmod 600 {shlex.quote(str(self.path))}",
            )
        if os.name == "posix" and status.st_uid != os.geteuid():
            raise ConfigError(
                f"{self.path} belongs to the user {status.st_uid}, not {os.geteuid()}", "give a key of your own"
            )

    def _load_keys(self) -> dict[str, bytes]:
        """Return the keys in the file; empty if it is missing."""
        if self.disk.stat(self.path) is None:
            return {}
        self.check_rights()
        with self.disk.open(self.path) as stream:
            return _parse(stream.read(), str(self.path))

    def _write(self, keys: Mapping[str, bytes]) -> None:
        """Write the keys to the file. Raises MissingError if that fails."""
        try:
            missing = [
                folder for folder in (self.path.parent, *self.path.parent.parents) if self.disk.stat(folder) is None
            ]
            for folder in reversed(missing):
                self.disk.mkdir(folder)
                self.disk.sync_folder(folder.parent)
            self.disk.remove_leftovers(self.path)  # a killed writer's file may hold dropped keys
            self.disk.replace(self.path, _dump(keys).encode())
        except OSError as error:
            raise MissingError(
                f"the key {self.path} could not be written: {error.strerror}",
                f"ls -ld {self.path.parent}; df -h {self.path.parent}; then the same command again",
            ) from error


@dataclass
class Keyring:
    """Keys in an entry of the system's keyring: Secret Service, KWallet, macOS's keychain, Windows' vault.

    Raises ExtraError without the package `keyring`, MissingError if the system has no keyring or it is locked.
    """

    user: str = "personal"
    service: str = "sartor"
    kind: str = "keyring"

    def fresh(self, owner: str) -> tuple[dict[str, Any], bytes]:
        """Return the header's fields and a new key, added to the keyring's entry."""
        name, keys = _add_key(self._load_keys(), owner)
        self._write(keys)
        return {"key": name}, keys[name]

    def find(self, fields: Mapping[str, Any]) -> bytes:
        """Return the key that a header names. Raises KeyRefusedError if the entry does not hold it."""
        return _find_key(self._load_keys(), fields, f"the keyring's entry {self.service}/{self.user}")

    def settle(self, fields: Mapping[str, Any]) -> None:
        """Drop every key of the same owner except the one that this header names."""
        keys = self._load_keys()
        if (remaining := _prune(keys, fields)) != keys:
            self._write(remaining)

    def _load_keys(self) -> dict[str, bytes]:
        text = self._ask("get_password", self.service, self.user)
        return _parse(text, f"the keyring's entry {self.service}/{self.user}") if text else {}

    def _write(self, keys: Mapping[str, bytes]) -> None:
        """Write the keys to the entry. Raises MissingError if the backend does not keep them."""
        self._ask("set_password", self.service, self.user, _dump(keys))
        if self._load_keys() != keys:  # some backends store nothing
            raise MissingError(
                "the system's keyring did not keep what it was given",
                f"another backend of the keyring; or {_IN_A_FILE}",
            )

    def _ask(self, call: str, *arguments: str) -> Any:
        """Call the package `keyring`. Raises ExtraError without it, MissingError if the call fails."""
        try:
            package = importlib.import_module("keyring")
        except ImportError:
            raise ExtraError(
                "this needs the Python package 'keyring', which is not installed",
                f"{pip_command()} install keyring; or {_IN_A_FILE}",
            ) from None
        try:
            return getattr(package, call)(*arguments)
        except Exception as error:  # backends raise errors of their own
            raise MissingError(
                f"the system's keyring does not answer: {type(error).__name__}: {error}",
                f"unlock it; or {_IN_A_FILE}",
            ) from error


@dataclass
class Passphrase:
    """Key derived from a typed passphrase.

    n, r, p: of scrypt, for fresh keys; the header of older rows states theirs.
    """

    text: str = field(repr=False)
    n: int = SCRYPT_N
    r: int = SCRYPT_R
    p: int = SCRYPT_P
    kind: str = "passphrase"

    def __post_init__(self) -> None:
        if not self.text:
            raise ConfigError("the passphrase is empty", "type one; six random words are strong")

    def fresh(self, owner: str) -> tuple[dict[str, Any], bytes]:
        """Return a new salt with the parameters, and the key derived with them."""
        fields = {"salt": base64.b64encode(os.urandom(16)).decode(), "n": self.n, "r": self.r, "p": self.p}
        return fields, self.find(fields)

    def find(self, fields: Mapping[str, Any]) -> bytes:
        """Return the key derived with a header's salt and parameters.

        Raises StoreError for parameters that are invalid or need too much memory.
        """
        try:
            salt, n, r, p = base64.b64decode(fields["salt"], validate=True), *(int(fields[name]) for name in "nrp")
            if 128 * n * r * p > _MOST_SCRYPT_BYTES:
                raise ValueError
            return hashlib.scrypt(
                self.text.encode(), salt=salt, n=n, r=r, p=p, maxmem=2 * _MOST_SCRYPT_BYTES, dklen=KEY_BYTES
            )
        except (KeyError, ValueError, TypeError, OverflowError):
            raise StoreError(
                "the header of the rows asks for a scrypt that cannot be", "cp BACKUP/diary to the person's directory"
            ) from None

    def settle(self, fields: Mapping[str, Any]) -> None:
        """Do nothing: no key is stored."""
