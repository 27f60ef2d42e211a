"""TUF role keys and signed metadata.

    KEYS/root-1  root-2  root-3  targets-1  targets-2  snapshot-1  timestamp-1     each: sartor.key (0600), sartor.pub

The role root decides whose keys count, targets what may be installed, snapshot which documents belong together,
timestamp how fresh that is. A role's threshold is how many of its keys have to sign, so that one stolen key is not
enough. The folders of root and targets belong on media that are plugged in for a publication; `refresh` needs those
of snapshot and timestamp alone.
"""

from __future__ import annotations

import datetime
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import Metadata, MetaFile, Role, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from sartor.core import signing
from sartor.core.errors import ArtifactError, ConfigError, SignatureError
from sartor.core.filesystem import make_parent, write_file_atomic

RoleName = Literal["root", "targets", "snapshot", "timestamp"]
ROLES: tuple[RoleName, ...] = ("root", "targets", "snapshot", "timestamp")
# role -> (keys that are made, keys that have to sign)
THRESHOLDS: Mapping[RoleName, tuple[int, int]] = {
    "root": (3, 2),
    "targets": (2, 2),
    "snapshot": (1, 1),
    "timestamp": (1, 1),
}
_FOLDER = re.compile(r"(root|targets|snapshot|timestamp)-(\d+)$")
T = TypeVar("T", Root, Targets, Snapshot, Timestamp)


@dataclass(frozen=True)
class Expiry:
    """Days until a role's document is refused. A short timestamp limits a freeze attack; `refresh` renews it."""

    root: float = 365.0
    targets: float = 90.0
    snapshot: float = 14.0
    timestamp: float = 7.0

    def of(self, role: RoleName) -> datetime.datetime:
        """Return when a document signed now expires; TUF counts whole seconds."""
        days = datetime.timedelta(days=getattr(self, role))
        return datetime.datetime.now(datetime.UTC).replace(microsecond=0) + days


def keygen(keys: Path, thresholds: Mapping[RoleName, tuple[int, int]] = THRESHOLDS) -> dict[RoleName, list[str]]:
    """Create the keys of the four roles below `keys`; return their ids by role.

    `keys/thresholds` records the thresholds. The keys are encrypted with SARTOR_KEY_PASSPHRASE if it is set. Raises
    ConfigError if keys are there already, or a threshold cannot be met.
    """
    for role in ROLES:
        key_count, threshold = thresholds.get(role, (0, 0))
        if not 1 <= threshold <= key_count:
            raise ConfigError(
                f"the role {role} has {key_count} keys and a threshold of {threshold}", f"{role}: (2, 2)"
            )
    if any(_FOLDER.match(path.name) for path in keys.glob("*")):
        raise ConfigError(
            f"{keys} holds keys already", "choose another directory; an overwritten key is lost for ever"
        )
    make_parent(keys)
    result: dict[RoleName, list[str]] = {}
    for role in ROLES:
        key_count, _ = thresholds[role]
        result[role] = []
        for number in range(key_count):
            made = signing.keygen(keys / f"{role}-{number + 1}", purposes=("fleet",))
            result[role].append(made["key_id"])
    lines = "".join(f"{role} {thresholds[role][1]}\n" for role in ROLES)
    (keys / "thresholds").write_text(lines, encoding="utf-8")
    return result


def folders(keys: Path, role: RoleName) -> list[Path]:
    """Return the folders of a role's keys that are here, by number."""
    numbered = [
        (int(match[2]), path) for path in keys.glob("*") if (match := _FOLDER.match(path.name)) and match[1] == role
    ]
    return [path for _, path in sorted(numbered)]


def public(folder: Path) -> SSlibKey:
    """Return the public key in a folder as TUF writes it."""
    file = folder / "sartor.pub"
    remedy = f"cp BACKUP/sartor.pub {shlex.quote(str(file))}"
    return SSlibKey.from_crypto(signing.open_public(file, remedy=remedy).key)


def first_root(keys: Path, expiry: Expiry) -> Root:
    """Return version 1 of the root, unsigned, with the keys that are here and the thresholds of `keygen`."""
    try:
        lines = (keys / "thresholds").read_text(encoding="utf-8").split("\n")
        thresholds = {}
        for line in filter(None, lines):
            role_name, count = line.split()
            thresholds[role_name] = int(count)
    except (OSError, ValueError):
        raise ConfigError(
            f"{keys} has no keys of an update repository", f"sartor edge keygen {shlex.quote(str(keys))}"
        ) from None
    roles: dict[str, Any] = {role: Role([], thresholds[role]) for role in ROLES}
    root = Root(expires=expiry.of("root"), roles=roles, consistent_snapshot=True)
    for role in ROLES:
        for folder in folders(keys, role):
            root.add_key(public(folder), role)
    return root


def sign(document: Metadata[Any], keys: Path, role: RoleName, roots: Iterable[Root]) -> None:
    """Sign a document with every key of `role` that is here and that one of `roots` names.

    Then the thresholds of all `roots` must be met. A new root needs the threshold of the old one and its own (TUF
    5.3.4), so both are given. Raises SignatureError naming how many signatures are missing, and what
    `signing.open_private` raises.
    """
    document.signatures.clear()
    roots = list(roots)
    key_ids = {identity for root in roots for identity in root.roles[role].keyids}
    for folder in folders(keys, role):
        key = public(folder)
        if key.keyid in key_ids and (folder / "sartor.key").is_file():
            document.sign(CryptoSigner(signing.open_private(folder, "fleet"), key), append=True)
    for root in roots:
        result = root.get_verification_result(role, document.signed_bytes, document.signatures)
        if not result:
            raise SignatureError(
                f"{role} needs {result.threshold} signatures; {len(result.signed)} of its keys are in {keys}",
                f"bring the folders of {result.missing} more of the keys {', '.join(k[:8] for k in result.unsigned)} "
                "there",
            )


@dataclass
class Documents:
    """Newest documents of a repository; it writes their next versions. Blobs and targets are on disk before them."""

    folder: Path
    root: Metadata[Root]
    targets: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]

    @classmethod
    def new(cls, folder: Path, keys: Path, expiry: Expiry) -> Documents:
        """Return the documents of an empty repository; only the root is written, by `write_root`."""
        root = Metadata(first_root(keys, expiry))
        # version 0 is never published: every write raises it first
        documents = (Metadata(Targets(version=1)), Metadata(Snapshot(version=1)), Metadata(Timestamp(version=1)))
        result = cls(folder, root, *documents)
        for document in documents:
            document.signed.version = 0
        result.write_root(keys, [root.signed])
        return result

    @classmethod
    def open(cls, folder: Path) -> Documents:
        """Return the documents of a repository.

        Raises ConfigError if there is none, ArtifactError for documents that cannot be read.
        """
        roots = sorted((int(path.name.split(".")[0]), path) for path in folder.glob("*.root.json"))
        if not roots:
            raise ConfigError(
                f"{folder.parent} is no update repository", f"sartor edge publish RELEASE {folder.parent} makes one"
            )
        timestamp = _read(Timestamp, folder / "timestamp.json")
        snapshot = _read(Snapshot, folder / f"{timestamp.signed.snapshot_meta.version}.snapshot.json")
        version = snapshot.signed.meta["targets.json"].version
        targets = _read(Targets, folder / f"{version}.targets.json")
        root = _read(Root, roots[-1][1])
        return cls(folder, root, targets=targets, snapshot=snapshot, timestamp=timestamp)

    def write_root(self, keys: Path, roots: Sequence[Root]) -> None:
        """Write the root as it stands, signed."""
        sign(self.root, keys, "root", roots)
        self._write(f"{self.root.signed.version}.root.json", self.root)

    def write(self, keys: Path, expiry: Expiry, *, targets: bool = True) -> None:
        """Write the next timestamp and snapshot, and with `targets` the next targets, signed.

        The timestamp comes last: until then a device sees the previous state (consistent snapshots, TUF 6.2).
        """
        if targets:
            self._next(self.targets, keys, "targets", expiry)
        self.snapshot.signed.meta["targets.json"] = MetaFile(self.targets.signed.version)
        self._next(self.snapshot, keys, "snapshot", expiry)
        self.timestamp.signed.snapshot_meta = MetaFile(self.snapshot.signed.version)
        self._next(self.timestamp, keys, "timestamp", expiry)
        # write after all are signed, so that a missing key leaves no partial publication
        if targets:
            self._write(f"{self.targets.signed.version}.targets.json", self.targets)
        self._write(f"{self.snapshot.signed.version}.snapshot.json", self.snapshot)
        self._write("timestamp.json", self.timestamp)

    def _next(self, document: Metadata[Any], keys: Path, role: RoleName, expiry: Expiry) -> None:
        """Raise the version and the expiry of a document, and sign it."""
        document.signed.version += 1
        document.signed.expires = expiry.of(role)
        sign(document, keys, role, [self.root.signed])

    def _write(self, name: str, document: Metadata[Any]) -> None:
        write_file_atomic(self.folder / name, document.to_bytes())


def expiries(folder: Path) -> dict[str, str]:
    """Return when each of a repository's newest documents expires, UTC."""
    documents = Documents.open(folder)
    metadata: tuple[Metadata[Any], ...] = (documents.root, documents.targets, documents.snapshot, documents.timestamp)
    return {item.signed.type: item.signed.expires.strftime("%Y-%m-%dT%H:%M:%SZ") for item in metadata}


def _read(kind: type[T], path: Path) -> Metadata[T]:
    """Return a document of a kind. Raises ArtifactError."""
    try:
        result: Metadata[T] = Metadata.from_bytes(path.read_bytes())
    except (OSError, DeserializationError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", f"cp BACKUP/{path.name} {path}") from None
    if not isinstance(result.signed, kind):
        raise ArtifactError(f"{path} is no {kind.type}", f"cp BACKUP/{path.name} {path}")
    return result
