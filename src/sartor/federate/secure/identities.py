"""Ed25519 identities, and the list of pinned public keys (the roster).

A roster is a folder of public keys, NAME.pub, as `sartor federate keygen` writes them, of the clients and of the
coordinator. Whoever fills it is the root of trust: a roster whose clients all belong to the coordinator protects
nobody.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sartor.core import signing
from sartor.core.config import is_valid_name
from sartor.core.errors import ConfigError, SignatureError
from sartor.core.signing import AnyPublicKey

# domain separation: a signature made here is never valid for another kind of document of the same key
_DOMAIN = b"sartor federated round\n"


@dataclass(frozen=True)
class Identity:
    """Name of a participant and its private key."""

    name: str
    key: Ed25519PrivateKey

    @classmethod
    def open(cls, name: str, path: Path) -> Identity:
        """Return the identity with the key that `sartor federate keygen` made at `path`.

        Raises ConfigError as signing.open_private does.
        """
        command = f"sartor federate keygen DIR --name {shlex.quote(name)}"
        return cls(name, signing.open_private(path, "fleet", keygen_command=command))

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
        """Return the signature of a document: 64 bytes, the same each time."""
        return self.key.sign(_DOMAIN + document)


@dataclass(frozen=True)
class PinnedKeys:
    """Pinned public keys by name."""

    keys: Mapping[str, AnyPublicKey]

    @classmethod
    def open(cls, folder: Path) -> PinnedKeys:
        """Return the keys of a folder, without those that this machine lists as revoked.

        Raises ConfigError if the folder is missing, or if a key is not for the purpose `fleet`.
        """
        if not folder.is_dir():
            raise ConfigError(
                f"there is no folder {folder}",
                "a folder of NAME.pub, as sartor federate keygen DIR --name NAME writes them",
            )
        revoked = signing.revoked_ids()
        keys = {
            file.stem: signing.open_public(
                file, remedy=f"get {file.name} from its owner: sartor federate keygen DIR --name {file.stem} wrote it"
            )
            for file in sorted(folder.glob("*.pub"))
            if is_valid_name(file.stem)
        }
        for name, key in keys.items():
            if not key.allows("fleet"):
                raise ConfigError(
                    f"the key of {name} in {folder} is for {', '.join(sorted(key.purposes))}, not for fleet",
                    f"sartor federate keygen DIR --name {name} makes one that is",
                )
        return cls({name: key for name, key in keys.items() if signing.key_id(key) not in revoked})

    def check(self, name: str, document: bytes, signature: bytes) -> None:
        """Raise SignatureError unless the key pinned for `name` signed the document."""
        key = self.keys.get(name)
        if key is None:
            raise SignatureError(f"no key is pinned for {name!r:.80}", "enrol it, if you know it")
        try:
            signing.bare_key(key).verify(signature, _DOMAIN + document)
        except InvalidSignature:
            raise SignatureError(
                f"this message is not {name}'s: the pinned key did not sign it, or it was changed",
                f"compare the .pub of {name} in --roster with its owner's, and replace it if they differ",
            ) from None


def keygen(directory: Path | str, name: str) -> dict[str, str]:
    """Create the identity of a client or a coordinator: `sartor.key` (0600), `sartor.pub` and NAME.pub.

    Returns name, key_id, private, and public: the file to hand over for a roster. Raises ConfigError for an invalid
    name, and where a key exists.
    """
    if not is_valid_name(name):
        raise ConfigError(f"{name!r:.80} is no name of a client", "lower-case letters, digits, - . _; such as ward-a")
    key_files = signing.keygen(Path(directory), purposes=("fleet",))
    public = Path(directory) / f"{name}.pub"
    shutil.copyfile(key_files["public"], public)
    return {"name": name, "key_id": key_files["key_id"], "private": key_files["private"], "public": str(public)}
