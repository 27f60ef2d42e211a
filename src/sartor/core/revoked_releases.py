"""Signed lists of revoked Releases.

    SARTOR_HOME/revoked/KEYID.releases.json      the newest list of the signer KEYID
    SARTOR_HOME/revoked/serials.json             signer -> highest serial number seen here, and that list's digest

A key in SARTOR_HOME/revoked revokes all that it ever signed. A list revokes single Releases, by their ids: a Release
that is validly signed and turned out bad. Each signer has one list; every key that this machine trusts for `release`
may revoke any Release, also one of another signer, since a lost key must not protect what it signed. An export is
revoked with the Release that it was made from.

The serial number of a list only grows. This machine remembers the highest that it has seen: an older list in its
place, another list with the same number, or no list, is refused, and with it every Release until the newest list is
back. Lists of keys that this machine does not trust say nothing.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sartor.core import records, signing, strict_json
from sartor.core.artifacts import Artifact, read_manifest
from sartor.core.errors import ArtifactError, ConfigError, SignatureError
from sartor.core.filesystem import write_file_atomic, writer_lock
from sartor.core.home import folder
from sartor.core.signing import AnyPublicKey

SCHEMA = 1
KIND = "revoked_releases"
SUFFIX = ".releases.json"
MOST_BYTES = 16 << 20
_SERIALS = "serials.json"


@dataclass(frozen=True)
class RevokedRelease:
    """Entry of a list: a Release that must not be used any more, and the reason."""

    id: str
    name: str
    version: str
    reason: str
    date: str


@dataclass(frozen=True)
class RevokedReleaseList:
    """Verified list of one signer.

    serial: number of the list; it grows with each.
    document: the file's bytes.
    """

    signer: str
    serial: int
    releases: tuple[RevokedRelease, ...]
    document: bytes

    @property
    def file(self) -> Path:
        """Place of the signer's newest list on this machine."""
        return folder("revoked") / f"{self.signer}{SUFFIX}"


def read_list(document: bytes, file: Path, trusted: Sequence[AnyPublicKey] | None = None) -> RevokedReleaseList:
    """Return the list in the bytes of a file, checked against the keys that are trusted for `release`.

    Raises SignatureError for bytes that are no list, or that no such key signed.
    """
    try:
        if len(document) > MOST_BYTES:
            raise ValueError(f"it has {len(document):,} bytes; {MOST_BYTES:,} are the limit")
        fields = strict_json.loads(document)
        signature = fields.pop("signature")
        signed_bytes = records.canonical(fields)
        if (fields["schema"], fields["kind"]) != (SCHEMA, KIND) or type(fields["serial"]) is not int:
            raise ValueError("another schema, kind or serial number")
        releases = tuple(RevokedRelease(**entry) for entry in fields["releases"])
        if not all(isinstance(value, str) for entry in releases for value in asdict(entry).values()):
            raise ValueError("an entry holds what is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SignatureError(
            f"{file} is no list of revoked Releases: {error}", f"get {file.name} again from its signer"
        ) from None
    signer = signing.check_signature(signed_bytes, signature, file, "the list of revoked Releases", trusted, "release")
    return RevokedReleaseList(signer, fields["serial"], releases, document)


def revoke_release(path: Path | str, *, key: Path | str | None = None, reason: str = "") -> dict[str, Any]:
    """Revoke the Release at `path`, or take over the signed list in the file `path`; return the list's facts.

    key: private key for Releases that signs the list; needed for a Release.
    Raises ArtifactError if nothing is at `path`, ConfigError without a key or a reason, SignatureError for a list that
    is not believed or is older than the one here.
    """
    path = Path(path)
    if path.is_file():
        present = import_list(path)
    elif not path.exists():
        raise ArtifactError(
            f"there is nothing at {path}", f"ls {shlex.quote(str(path.parent))}; give a Release, or a signed list"
        )
    elif not key or not reason.strip():
        missing = "a key" if not key else "a reason"
        raise ConfigError(
            f"{path} is to be revoked without {missing}",
            f"sartor revoke-release {shlex.quote(str(path))} --key KEYS --reason TEXT",
        )
    else:
        private = signing.open_private(Path(key), "release")
        present = add_to_list(read_manifest(path, ("release",)), private, reason)
    newest = present.releases[-1] if present.releases else None
    return {
        "list": str(present.file),
        "signer": present.signer,
        "serial": present.serial,
        "revoked": [asdict(entry) for entry in present.releases],
        "newest": newest.id if newest else "",
    }


def add_to_list(manifest: Mapping[str, Any], key: Ed25519PrivateKey, reason: str) -> RevokedReleaseList:
    """Add a Release to this machine's list of the key, sign the list with the next serial number, and return it."""
    signer = signing.key_id(key.public_key())
    file = folder("revoked") / f"{signer}{SUFFIX}"
    with writer_lock(folder("revoked") / _SERIALS):
        seen = _seen_serials()
        earlier = read_list(file.read_bytes(), file, [key.public_key()]) if file.is_file() else None
        if signer in seen and (earlier is None or earlier.serial < seen[signer]["serial"]):
            raise _rolled_back(file, seen[signer]["serial"], earlier)
        identity, name, version = (str(manifest.get(field, "")) for field in ("id", "name", "version"))
        entry = RevokedRelease(identity, name, version, reason, _now())
        entries = [item for item in (earlier.releases if earlier else ()) if item.id != identity]
        document = {
            "schema": SCHEMA,
            "kind": KIND,
            "serial": earlier.serial + 1 if earlier else 1,
            "issued": _now(),
            "releases": [asdict(item) for item in (*entries, entry)],
        }
        signature = signing.signature_of(records.canonical(document), key, "release")
        content = json.dumps({**document, "signature": signature}, indent=1, ensure_ascii=False).encode() + b"\n"
        result = read_list(content, file, [key.public_key()])
        _install(result, seen)
    return result


def import_list(file: Path) -> RevokedReleaseList:
    """Install a list that another machine signed, and return it.

    Raises SignatureError if no key that is trusted for `release` signed it, or if it is older than the list here.
    """
    content = file.read_bytes()
    result = read_list(content, file)
    with writer_lock(folder("revoked") / _SERIALS):
        seen = _seen_serials()
        _check_serial(result, seen.get(result.signer), file)
        _install(result, seen)
    return result


def take_over(content: bytes, file: Path, trusted: Sequence[AnyPublicKey]) -> bool:
    """Install a list that came with an update if it is newer than the one here; return whether it was.

    Raises SignatureError if no trusted key signed it.
    """
    present = read_list(content, file, trusted)
    with writer_lock(folder("revoked") / _SERIALS):
        seen = _seen_serials()
        if present.signer in seen and present.serial <= seen[present.signer]["serial"]:
            return False
        _install(present, seen)
    return True


def newest_lists() -> dict[str, bytes]:
    """Return the content of each list that this machine believes, by signer. Raises as `revoked`."""
    revoked()
    return {signer: (folder("revoked") / f"{signer}{SUFFIX}").read_bytes() for signer in sorted(_seen_serials())}


def revoked(trusted: Sequence[AnyPublicKey] | None = None) -> dict[str, RevokedRelease]:
    """Return the revoked Releases by id, of all lists whose signers this machine trusts.

    trusted: keys whose lists count beside those of SARTOR_HOME/trusted.
    Raises SignatureError for a list that is damaged, missing, or older than one seen before.
    """
    seen = _seen_serials()
    result: dict[str, RevokedRelease] = {}
    keys: list[AnyPublicKey] = [*signing.trusted_keys(), *(trusted or ())]
    trusted_ids = {
        signing.key_id(key) for key in keys if not isinstance(key, signing.PublicKey) or key.allows("release")
    }
    revoked_keys = signing.revoked_ids()
    files = {file.name.removesuffix(SUFFIX): file for file in sorted(folder("revoked").glob(f"*{SUFFIX}"))}
    newer: list[RevokedReleaseList] = []
    for signer in sorted(set(files) | set(seen)):
        # Whoever revokes a key does not lose its list: it can only refuse, and nothing new is taken from it.
        file = files.get(signer)
        if file is None:
            raise _rolled_back(folder("revoked") / f"{signer}{SUFFIX}", seen[signer]["serial"], None)
        content = file.read_bytes()
        if signer in seen and _digest(content) == seen[signer]["digest"]:
            entries = strict_json.loads(content)["releases"]  # the very bytes that were verified when they came
            result.update({entry["id"]: RevokedRelease(**entry) for entry in entries})
            continue
        if signer not in trusted_ids or signer in revoked_keys:
            if signer in seen:
                raise _rolled_back(file, seen[signer]["serial"], None)
            continue
        present = read_list(content, file, keys)
        if present.signer != signer:  # a list in another's place would hide that one's
            raise SignatureError(
                f"{file} is the list of {present.signer}", f"mv {file} {file.with_name(present.signer + SUFFIX)}"
            )
        _check_serial(present, seen.get(signer), file)
        newer.append(present)
        result.update({entry.id: entry for entry in present.releases})
    # Files that a person copied here. A process that may not write there cannot be the one that takes them back, and
    # one that finds the file being written leaves it to the next check.
    if newer:
        with suppress(ConfigError, OSError), writer_lock(folder("revoked") / _SERIALS):
            _remember(newer, _seen_serials())
    return result


def check_not_revoked(artifact: Artifact, trusted: Sequence[AnyPublicKey] | None = None) -> None:
    """Raise SignatureError if a Release, or the Release that an export was made from, is on a list.

    trusted: as `revoked` takes it.
    """
    parents = artifact.manifest.get("parents", [])
    origins = {parent["id"] for parent in parents if _is_release(parent)} if isinstance(parents, list) else set()
    check_ids({artifact.id, *origins}, artifact.path.name, trusted)


def check_ids(ids: Collection[str], subject: str, trusted: Sequence[AnyPublicKey] | None = None) -> None:
    """Raise SignatureError if one of these ids of Releases is on a list. subject: name, for the error."""
    lists = revoked(trusted)
    if found := next((lists[identity] for identity in sorted(ids) if identity in lists), None):
        raise SignatureError(
            f"{subject} is revoked since {found.date[:10]} ({found.name} {found.version}): {found.reason}",
            "use another version; sartor release ADAPTER --name NAME --version NEW --key KEYS makes one",
        )


def _is_release(parent: Any) -> bool:
    return isinstance(parent, dict) and parent.get("kind") == "release" and isinstance(parent.get("id"), str)


def _check_serial(present: RevokedReleaseList, seen: Mapping[str, Any] | None, file: Path) -> None:
    if seen is None or present.serial > seen["serial"]:
        return
    if present.serial < seen["serial"]:
        raise _rolled_back(file, seen["serial"], present)
    if _digest(present.document) != seen["digest"]:
        raise SignatureError(
            f"{file} has the serial number {present.serial}, as another list of {present.signer} that was seen here",
            f"ask the holder of the key {present.signer} for a list with a higher number",
        )


def _rolled_back(file: Path, serial: int, present: RevokedReleaseList | None) -> SignatureError:
    state = f"has the serial number {present.serial}" if present else "is gone, or no key trusted here signed it"
    return SignatureError(
        f"{file} {state}; a list with the number {serial} was seen here, and a list never goes back",
        f"sartor revoke-release LIST, with the newest {file.name} of its signer",
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _digest(document: bytes) -> str:
    return hashlib.sha256(document).hexdigest()


def _install(present: RevokedReleaseList, seen: dict[str, dict[str, Any]]) -> None:
    """Write a list to its place and remember its number. A kill in between leaves the list, which is newer."""
    write_file_atomic(present.file, present.document)
    _remember([present], seen)


def _remember(lists: Sequence[RevokedReleaseList], seen: dict[str, dict[str, Any]]) -> None:
    for present in lists:
        if present.signer not in seen or seen[present.signer]["serial"] < present.serial:
            seen[present.signer] = {"serial": present.serial, "digest": _digest(present.document)}
    write_file_atomic(folder("revoked") / _SERIALS, records.canonical({"schema": SCHEMA, "seen": seen}))


def _seen_serials() -> dict[str, dict[str, Any]]:
    """Return signer -> serial and digest of the newest list seen. Raises SignatureError if the file is damaged."""
    file = folder("revoked") / _SERIALS
    if not file.is_file():
        return {}
    try:
        fields = strict_json.loads(file.read_bytes())
        seen: dict[str, dict[str, Any]] = fields["seen"]
        if not all(type(entry["serial"]) is int and isinstance(entry["digest"], str) for entry in seen.values()):
            raise ValueError("an entry has another form")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        quoted = shlex.quote(str(file))
        raise SignatureError(
            f"{file} cannot be read: {error}",
            f"cp BACKUP/{_SERIALS} {quoted}; without a copy, rm {quoted}, then sartor revoke-release LIST for each "
            "list",
        ) from None
    return seen
