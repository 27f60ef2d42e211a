"""Ed25519 identities and the pinned key list.

A roster is a folder of public keys, NAME.pub, as `sartor keygen` writes them; of the clients and of the coordinator.
Who fills
it is the root of trust: a roster of clients that are all the coordinator's protects nobody.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sartor.core import signing
from sartor.core.config import is_valid_name
from sartor.core.errors import ConfigError, SignatureError

# what is signed here is never mistaken for another document that the same key signs
_DOMAIN = b"sartor federated round\n"


@dataclass(frozen=True)
class Identity:
    """A name and its private key."""

    name: str
    key: Ed25519PrivateKey

    @classmethod
    def open(cls, name: str, path: Path) -> Identity:
        """The key that `sartor keygen` made at `path`. Raises ConfigError as signing.open_private does."""
        return cls(name, signing.open_private(path))

    def check_in(self, roster: PinnedKeys) -> None:
        """Raise ConfigError unless the roster has this key under this name."""
        pinned = roster.keys.get(self.name)
        if pinned is None or signing.key_id(pinned) != signing.key_id(self.key.public_key()):
            has = "no key" if pinned is None else f"the key {signing.key_id(pinned)}"
            problem = (
                f"the roster has {has} for {self.name}; the private key given is "
                f"{signing.key_id(self.key.public_key())}"
            )
            raise ConfigError(
                problem, f"its public key into the roster, as {self.name}.pub; or the key that belongs to it"
            )

    def sign(self, document: bytes) -> bytes:
        """64 bytes; the same ones each time."""
        return self.key.sign(_DOMAIN + document)


@dataclass(frozen=True)
class PinnedKeys:
    """Name -> pinned key."""

    keys: Mapping[str, Ed25519PublicKey]

    @classmethod
    def open(cls, folder: Path) -> PinnedKeys:
        """The keys of a folder, without those that this machine holds for revoked."""
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder}", "a folder of NAME.pub, as sartor keygen writes them")
        revoked = signing.revoked_ids()
        keys = {
            file.stem: signing.open_public(file) for file in sorted(folder.glob("*.pub")) if is_valid_name(file.stem)
        }
        return cls({name: key for name, key in keys.items() if signing.key_id(key) not in revoked})

    def check(self, name: str, document: bytes, signature: bytes) -> None:
        """Raise SignatureError unless the key pinned for `name` signed the document."""
        key = self.keys.get(name)
        if key is None:
            raise SignatureError(f"no key is pinned for {name!r:.80}", "enrol it, if you know it")
        try:
            key.verify(signature, _DOMAIN + document)
        except InvalidSignature:
            raise SignatureError(
                f"this message is not {name}'s: the pinned key did not sign it, or it was changed",
                f"compare the .pub of {name} in --roster with its owner's, and replace it if they differ",
            ) from None


def keygen(directory: Path | str, name: str) -> dict[str, str]:
    """Make the identity of a client or a coordinator: `sartor.key` (0600), `sartor.pub`, and NAME.pub as a roster
    holds it.

    Returns name, key_id, private, and public: the file to hand over. Raises ConfigError for a name of another form,
    and where a key stands.
    """
    if not is_valid_name(name):
        raise ConfigError(f"{name!r:.80} is no name of a client", "lower-case letters, digits, - . _; such as ward-a")
    key_files = signing.keygen(Path(directory))
    public = Path(directory) / f"{name}.pub"
    shutil.copyfile(key_files["public"], public)
    return {"name": name, "key_id": key_files["key_id"], "private": key_files["private"], "public": str(public)}
