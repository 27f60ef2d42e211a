"""TUF update repository: publish, widen, halt, rotate.

    REPOSITORY/metadata/1.root.json  N.targets.json  N.snapshot.json  timestamp.json
    REPOSITORY/targets/NAME/DIGEST.VERSION.json
    REPOSITORY/blobs/ab/DIGEST

A device is given `metadata/1.root.json` once, when it is set up; all later trust comes from it (TUF 5.2). Everything
that a new document names is on disk before it, and the timestamp comes last. So a publication that is cut short
changes nothing for a device. One publication at a time: the repository is locked.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import shlex
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tuf.api.metadata import TargetFile

from sartor.core import revoked_releases, signing
from sartor.core.artifacts import MANIFESTS
from sartor.core.config import is_valid_name
from sartor.core.errors import ArtifactError, ConfigError, one_of
from sartor.core.filesystem import file_digest, make_parent, write_file_atomic, writer_lock
from sartor.edge.update import tensor_delta
from sartor.edge.update import version_metadata as words
from sartor.edge.update.tuf_roles import Documents, Expiry, RoleName, folders, public
from sartor.edge.update.version_metadata import Blob, DeltaStep, Offer, VersionContent
from sartor.release.release import Verified, verify

# Below this a delta saves less than its request costs
LEAST_DELTA_BYTES = 1 << 12
# Maximum size of a packed file as a fraction of the whole: its LZMA decoding on the device must be worth it
PACKED_FRACTION = 0.95


@dataclass(frozen=True)
class Published:
    """Result of `publish`.

    deltas: version -> fraction of the whole files that a device with that version fetches.
    """

    name: str
    version: str
    release_bytes: int
    deltas: dict[str, float]
    percent: int


def publish(
    release: Path | str,
    repository: Path,
    keys: Path,
    *,
    key: Path | None = None,
    percent: int = 100,
    expiry: Expiry | None = None,
) -> Published:
    """Add a signed Release (or export) to `repository`, created if absent, for `percent` of the devices.

    The Release is verified first, by `key` or the trusted keys, and is published byte for byte as it was signed.
    Raises what `verify` raises, ConfigError (version taken, percent out of 0..100, no keys), and SignatureError (too
    few keys are here).
    """
    checked = verify(release, key=key)
    _check_percent(percent)
    name, version = checked.release.manifest["name"], checked.release.manifest["version"]
    if not (is_valid_name(name) and is_valid_name(version)):
        raise ConfigError(
            f"{name!r} {version!r} is no name and version that a device takes", "release it with --name and --version"
        )
    expiry = expiry or Expiry()
    with _locked(repository):
        documents = _open_or_new(repository, keys, expiry)
        path = words.target_path(name, version)
        if path in documents.targets.signed.targets:
            raise ConfigError(
                f"{repository} has {name} {version} already",
                f"sartor release ADAPTER --name {name} --version NEW --key KEYS, then sartor edge publish",
            )
        offers = offers_of(documents, name)
        files = _add_files(repository, checked)
        earlier = [(offer.version, _content(documents, repository, name, offer)) for offer in offers]
        steps, fetched = _deltas(repository, earlier, files)
        order = 1 + max((offer.order for offer in offers), default=0)
        offer = Offer(version, order, percent=percent, halted=False, published=int(time.time()))
        _set_target(documents, repository, VersionContent(name, version, files, steps), offer)
        _add_lists(documents, repository)
        documents.write(keys, expiry)
    total_bytes = sum(blob.bytes for blob in files.values())
    return Published(
        name,
        version,
        release_bytes=total_bytes,
        deltas={earlier_version: round(count / total_bytes, 4) for earlier_version, count in fetched.items()},
        percent=percent,
    )


def refresh(repository: Path, keys: Path, *, expiry: Expiry | None = None) -> None:
    """Sign new snapshot and timestamp documents before they expire.

    It needs the keys of these two roles alone.
    """
    with _locked(repository):
        Documents.open(repository / "metadata").write(keys, expiry or Expiry(), targets=False)


def rotate(
    repository: Path, keys: Path, role: RoleName, *, old: Sequence[str] = (), expiry: Expiry | None = None
) -> list[str]:
    """Replace keys of a role by new ones, and return the new ids.

    old: folders of the keys to replace (`targets-1`); by default all.

    The new root is signed by the old root keys and, where root's own are replaced, by the new ones (TUF 5.3.4, 6.1).
    After a theft of the timestamp and snapshot keys, rotate both: devices then forget the versions that the thief
    made (5.3.11).
    """
    expiry = expiry or Expiry()
    with _locked(repository):
        documents = Documents.open(repository / "metadata")
        root, old_root = documents.root.signed, copy.deepcopy(documents.root.signed)
        folders_by_id = {public(folder).keyid: folder for folder in folders(keys, role)}
        revoked_ids = [
            identity
            for identity in root.roles[role].keyids
            if not old or folders_by_id.get(identity, Path()).name in old
        ]
        if not revoked_ids or len(revoked_ids) < len(old):
            available = ", ".join(folder.name for folder in folders_by_id.values())
            used = [folders_by_id[key].name for key in root.roles[role].keyids if key in folders_by_id]
            raise ConfigError(
                f"{role} has no such key in use as {', '.join(old)}; in {keys} are {available}",
                one_of("--old", used) if used else f"copy the key folders of {role} to {keys}",
            )
        number = max([int(folder.name.rpartition("-")[2]) for folder in folders_by_id.values()], default=0)
        new_folders = [keys / f"{role}-{number + index + 1}" for index in range(len(revoked_ids))]
        for identity, folder in zip(revoked_ids, new_folders, strict=True):
            signing.keygen(folder, purposes=("fleet",))
            root.revoke_key(identity, role)
            root.add_key(public(folder), role)
        root.version += 1
        root.expires = expiry.of("root")
        documents.write_root(keys, [old_root, root])
        documents.write(keys, expiry, targets=role == "targets")
    return [public(folder).keyid for folder in new_folders]


def widen(
    repository: Path, keys: Path, name: str, version: str, percent: int, *, expiry: Expiry | None = None
) -> Offer:
    """Offer a version to more devices.

    Raises ConfigError for fewer devices (only `halt` takes a ring back) or a halted version.
    """
    _check_percent(percent)

    def change(offer: Offer) -> Offer:
        """Return the wider offer. Raises ConfigError for a halted version or a smaller percent."""
        if offer.halted or percent < offer.percent:
            state, remedy = f"is offered to {offer.percent} % already", f"--percent {offer.percent} or more"
            if offer.halted:
                state, remedy = "is halted", "sartor edge publish of the release under another version"
            raise ConfigError(f"{name} {version} {state}", remedy)
        if percent == offer.percent:
            return offer
        return replace(offer, percent=percent, previous_percent=offer.percent)

    return _change(repository, keys, name, version, change=change, expiry=expiry)


def halt(repository: Path, keys: Path, name: str, version: str, *, expiry: Expiry | None = None) -> Offer:
    """Stop offering a version; devices that have it go back to the newest that is offered to them."""
    return _change(repository, keys, name, version, change=lambda offer: replace(offer, halted=True), expiry=expiry)


def withdraw(repository: Path, keys: Path, name: str, version: str, *, expiry: Expiry | None = None) -> int:
    """Remove a version, and every blob that no remaining version refers to; return the bytes freed.

    A device that is fetching it at that moment fails, and takes another version at its next sync.
    """
    with _locked(repository):
        documents = Documents.open(repository / "metadata")
        _find(documents, name, version)
        target = documents.targets.signed.targets.pop(words.target_path(name, version))
        documents.write(keys, expiry or Expiry())
        (repository / "targets" / target.get_prefixed_paths()[0]).unlink(missing_ok=True)
        return _sweep(repository, documents)


def names_of(documents: Documents) -> list[str]:
    """Return the names that have a version."""
    named_offers = (words.offer_of(path, target.custom) for path, target in documents.targets.signed.targets.items())
    return sorted({item[0] for item in named_offers if item})


def offers_of(documents: Documents, name: str) -> list[Offer]:
    """Return the versions of a name, newest first."""
    named_offers = (words.offer_of(path, target.custom) for path, target in documents.targets.signed.targets.items())
    return sorted((item[1] for item in named_offers if item and item[0] == name), key=lambda offer: -offer.order)


@contextmanager
def _locked(repository: Path) -> Iterator[None]:
    """Hold the writer lock of a repository."""
    make_parent(repository)
    with writer_lock(repository.absolute()):
        yield


def _open_or_new(repository: Path, keys: Path, expiry: Expiry) -> Documents:
    """Return the documents of a repository, or those of a new one. Raises ConfigError for another folder."""
    metadata = repository / "metadata"
    if (metadata / "timestamp.json").is_file():
        return Documents.open(metadata)
    if any(path.name != "metadata" for path in repository.glob("[!.]*")) and not (metadata / "1.root.json").is_file():
        raise ConfigError(f"{repository} holds something else", "sartor edge publish RELEASE NEW_DIRECTORY")
    return Documents.new(metadata, keys, expiry)


def _add_files(repository: Path, checked: Verified) -> dict[str, Blob]:
    """Add every file of the release as a blob, with the manifest and its signature."""
    root = checked.release.path
    manifest = checked.release.manifest
    # manifest and signature as they were verified, never as they stand now
    contents = {MANIFESTS[checked.release.kind]: checked.release.document, "signature": checked.signature}
    files = {}
    for name in [*manifest["files"], *contents]:
        content = contents[name] if name in contents else (root / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if name in manifest["files"] and digest != manifest["files"][name]["sha256"]:
            raise ArtifactError(
                f"{root / name} was changed while it was published",
                f"sartor verify {shlex.quote(str(root))}; if it is whole, "
                + shlex.join(["sartor", "edge", "publish", str(root), str(repository)]),
            )
        _add_blob(repository, content, digest)
        files[name] = Blob(digest, len(content))
    return files


def _add_blob(repository: Path, content: bytes, digest: str) -> None:
    """Write a blob unless it is there whole."""
    target = repository / words.blob_path(digest)
    if not target.is_file() or file_digest(target) != digest:
        write_file_atomic(target, content)


def _deltas(
    repository: Path, earlier: Iterable[tuple[str, VersionContent]], files: dict[str, Blob]
) -> tuple[tuple[DeltaStep, ...], dict[str, int]]:
    """Return the deltas, and the bytes that a device with each earlier version will fetch.

    The deltas include packed files, which need no earlier version.
    """
    steps: dict[tuple[str, str], DeltaStep] = {}
    fetched = {}
    large = {path: blob for path, blob in files.items() if blob.bytes >= LEAST_DELTA_BYTES}
    for blob in large.values():
        _add_step(repository, "", blob, steps=steps, fraction=PACKED_FRACTION)
    packed = {result: step.bytes for (_, result), step in steps.items()}
    for version, earlier_content in earlier:
        count = 0
        for path, blob in files.items():
            if blob.sha256 in earlier_content.blobs:
                continue
            ways = [blob.bytes, packed.get(blob.sha256, blob.bytes)]
            if path in earlier_content.files:
                base = earlier_content.files[path].sha256
                if path in large:
                    _add_step(repository, base, blob, steps=steps, fraction=1.0)
                if step := steps.get((base, blob.sha256)):
                    ways.append(step.bytes)
            count += min(ways)
        fetched[version] = count
    return tuple(steps.values()), fetched


def _add_step(
    repository: Path, base: str, blob: Blob, steps: dict[tuple[str, str], DeltaStep], fraction: float
) -> None:
    """Make a delta, and keep it if it is smaller than `fraction` of the whole file."""
    if (base, blob.sha256) in steps:
        return
    with tempfile.TemporaryDirectory(prefix="sartor-delta-") as folder:
        out = Path(folder) / "delta"
        source = repository / words.blob_path(base) if base else None
        delta = tensor_delta.make(source, repository / words.blob_path(blob.sha256), out)
        if delta and delta.delta_bytes < fraction * blob.bytes:
            content = out.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            _add_blob(repository, content, digest)
            steps[base, blob.sha256] = DeltaStep(base, blob.sha256, digest, delta.delta_bytes)


def _content(documents: Documents, repository: Path, name: str, offer: Offer) -> VersionContent:
    """Return the content of a version from its document."""
    target = documents.targets.signed.targets[words.target_path(name, offer.version)]
    path = repository / "targets" / target.get_prefixed_paths()[0]
    return words.read_version_metadata(path.read_bytes(), name, offer.version)


def _set_target(documents: Documents, repository: Path, content: VersionContent, offer: Offer) -> None:
    """Write a version's document, and list it with its offer among the targets."""
    path, document = words.target_path(content.name, content.version), content.as_bytes()
    target = TargetFile.from_data(path, document, ["sha256"])
    target.unrecognized_fields["custom"] = offer.as_custom()
    write_file_atomic(repository / "targets" / target.get_prefixed_paths()[0], document)
    documents.targets.signed.targets[path] = target


def _change(repository: Path, keys: Path, name: str, version: str, change: Any, expiry: Expiry | None) -> Offer:
    """Change the offer of a version and sign the documents; return the new offer."""
    with _locked(repository):
        documents = Documents.open(repository / "metadata")
        offer: Offer = change(_find(documents, name, version))
        target = documents.targets.signed.targets[words.target_path(name, version)]
        target.unrecognized_fields["custom"] = offer.as_custom()
        _add_lists(documents, repository)
        documents.write(keys, expiry or Expiry())
    return offer


def _add_lists(documents: Documents, repository: Path) -> None:
    """List the signed lists of revoked Releases that this machine believes, for devices to take over."""
    for signer, content in revoked_releases.newest_lists().items():
        path = words.list_path(signer)
        target = TargetFile.from_data(path, content, ["sha256"])
        write_file_atomic(repository / "targets" / target.get_prefixed_paths()[0], content)
        documents.targets.signed.targets[path] = target


def _find(documents: Documents, name: str, version: str) -> Offer:
    """Return the offer of a version. Raises ConfigError if there is none."""
    offers = offers_of(documents, name)
    for offer in offers:
        if offer.version == version:
            return offer
    versions = [offer.version for offer in offers]
    near = next(iter(difflib.get_close_matches(version, versions, n=1)), versions[0] if versions else "")
    raise ConfigError(
        f"the repository has no {name} {version}; it has {', '.join(versions) or 'none of that name'}",
        f"{name} {near} in its place" if near else "sartor edge publish RELEASE REPOSITORY",
    )


def _sweep(repository: Path, documents: Documents) -> int:
    """Remove the blobs that no version names; return their bytes."""
    used_digests: set[str] = set()
    for path in documents.targets.signed.targets:
        named_offer = words.offer_of(path, documents.targets.signed.targets[path].custom)
        if named_offer:
            content = _content(documents, repository, *named_offer)
            used_digests |= set(content.blobs) | {step.sha256 for step in content.deltas}
    freed = 0
    for blob in sorted((repository / "blobs").glob("*/*")):
        if blob.name not in used_digests:
            freed += blob.stat().st_size
            blob.unlink()
    return freed


def _check_percent(percent: int) -> None:
    if not 0 <= percent <= 100:
        raise ConfigError(f"the percent is {percent}; it must be in 0..100", "a percent of 10")
