"""Device update: signed metadata, delta or files, activation.

The metadata follow TUF's client workflow.

`sync` is the only function of a device that uses the network. The mirror is not trusted. Trust comes from the root
that the device was set up with, and from what that root's holders signed since (TUF specification 1.0, section 5).

    FOLDER/metadata/       verified timestamp, snapshot, targets and every root; fsynced, for rollback protection
    FOLDER/reported.json   the outcome last reported of each version (device_reports.py)
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, Targets
from tuf.ngclient import Updater
from tuf.ngclient.fetcher import FetcherInterface

from sartor.core import revoked_releases, signing
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ArtifactError, ConfigError, MissingError, SignatureError, StoreError
from sartor.core.filesystem import write_file_atomic
from sartor.core.home import folder
from sartor.core.signing import PublicKey
from sartor.edge.store.release_store import ReleaseStore
from sartor.edge.update import tensor_delta
from sartor.edge.update import version_metadata as words
from sartor.edge.update.downloader import DownloadLimits, Fetcher
from sartor.edge.update.version_metadata import DeltaStep, Offer, VersionContent
from sartor.release.release import check_signed

_CHUNK_BYTES = 1 << 18
# Tolerated lag of the device's clock behind the publisher's
_CLOCK_S = 86_400


@dataclass(frozen=True)
class SyncClient:
    """Identity and trust of a device.

    id: decides its ring.
    folder: its own folder, for verified metadata.
    root: the first root document, or its file, which the device was set up with: all its trust comes from there.
    starts: number of starts within which a new version has to confirm that it works, or the device goes back
    (`ReleaseStore.start`); 0 means no trial.
    signers: keys of which one must have signed the Release itself; None takes those in SARTOR_HOME/trusted.
    """

    id: str
    folder: Path
    root: bytes | Path
    starts: int = 0
    signers: Sequence[PublicKey] | None = None


@dataclass(frozen=True)
class Synced:
    """Result of one sync.

    changed: whether another version is active now.
    missing_bytes: bytes to fetch, by the cheaper of delta and whole file, minus those of an interrupted sync.
    fetched_bytes: bytes fetched, with metadata.
    deltas, whole: number of blobs fetched each way.
    notes: irregularities: attempts that broke off, deltas that were given up.
    """

    name: str
    version: str
    was: str
    changed: bool
    ring: int
    missing_bytes: int = 0
    fetched_bytes: int = 0
    deltas: int = 0
    whole: int = 0
    notes: tuple[str, ...] = ()


@dataclass
class _Transfer:
    """Transfer of the blobs of one version into the store."""

    store: ReleaseStore
    url: str
    fetcher: Fetcher
    missing_bytes: int = 0
    deltas: int = 0
    whole: int = 0
    notes: list[str] = field(default_factory=list)

    def bring(self, content: VersionContent) -> None:
        """Fetch every file of the version by the cheapest way, after making room for all of them."""
        plan = [
            (digest, length, self._cheapest(content, digest, length))
            for digest, length in content.blobs.items()
            if not self.store.has(digest)
        ]
        self.missing_bytes = sum(
            self._missing(step.sha256, step.bytes) if step else self._missing(digest, length)
            for digest, length, step in plan
        )
        delta_sizes = {step.sha256: step.bytes for _, _, step in plan if step}
        self.store.make_room(content.name, {**content.blobs, **delta_sizes})
        for digest, length, step in plan:
            if not (step and self._by_delta(step, length)):
                self._blob(digest, length)
                self.whole += 1

    def _missing(self, digest: str, length: int) -> int:
        """Return the bytes of a blob that are still to fetch."""
        return 0 if self.store.has(digest) else max(0, length - self.store.partial(digest))

    def _cheapest(self, content: VersionContent, digest: str, length: int) -> DeltaStep | None:
        """Return the delta that takes fewer bytes than the file itself, or None for the file."""
        usable = [
            step for step in content.deltas if step.result == digest and (not step.base or self.store.has(step.base))
        ]
        best = min(usable, key=lambda step: self._missing(step.sha256, step.bytes), default=None)
        if best is None or self._missing(best.sha256, best.bytes) >= self._missing(digest, length):
            return None
        return best

    def _by_delta(self, step: DeltaStep, length: int) -> bool:
        """Fetch one delta and apply it; return false if it does not lead to the file.

        The file is then fetched whole.
        """
        self._blob(step.sha256, step.bytes)
        try:
            with self.store.open(step.sha256) as difference, _open_blob(self.store, step.base) as base:
                for offset, piece in _join_pieces(tensor_delta.apply(base, difference, length)):
                    # skip the bytes that an interrupted sync left of this file
                    fresh = piece[max(0, self.store.partial(step.result) - offset) :]
                    if fresh:
                        self.store.append(step.result, offset + len(piece) - len(fresh), fresh)
            self.store.finish(step.result)
        except (ArtifactError, StoreError) as error:
            self.notes.append(f"a delta was given up: {error.problem}")
            return False
        self.deltas += 1
        return True

    def _blob(self, digest: str, length: int) -> None:
        """Fetch a blob; once more from its beginning if the joined pieces have another digest."""
        for attempt in (1, 2):
            if self.store.has(digest):
                return
            try:
                self._resume(digest, length)
                self.store.finish(digest)
                return
            except (ArtifactError, StoreError) as error:
                if attempt == 2 or self.store.partial(digest):
                    raise
                self.notes.append(f"fetched again: {error.problem}")

    def _resume(self, digest: str, length: int) -> None:
        """Fetch the rest of a blob."""
        if length == 0:
            self.store.append(digest, 0, b"")
        self.fetcher.resume(
            f"{self.url}/{words.blob_path(digest)}",
            length,
            lambda: self.store.partial(digest),
            lambda offset, piece: self.store.append(digest, offset, piece),
        )


def sync(
    store: ReleaseStore,
    url: str,
    name: str,
    device: SyncClient,
    healthy: Callable[[Path], None],
    *,
    limits: DownloadLimits | None = None,
    again: bool = False,
) -> Synced:
    """Update the release `name` to the newest version signed for this device; activate it if healthy.

    url: the repository's folder, http(s) or file.
    healthy: gets the staged version's path, and raises if the version must not become active.
    again: also accept a version that was refused here before, for its check, its trial or by a rollback.

    Raises SignatureError for metadata that are forged, too old, expired, or newer than this device's clock, and for a
    Release that none of the device's signers signed, or that is revoked;
    ArtifactError, StoreError for content that differs from what was signed; MissingError if the mirror is unreachable
    or too slow (fetched bytes are kept); and what the store raises. In each case the active version stays.
    """
    url = url.rstrip("/")
    fetcher = Fetcher(limits or DownloadLimits())
    offers, targets = _refresh_metadata(url, device, fetcher)
    list_notes = _take_lists(url, targets, fetcher, device.signers)
    matching_offers = sorted(
        (offer for offer_name, offer in offers if offer_name == name), key=lambda offer: -offer.order
    )
    if not matching_offers:
        names = ", ".join(sorted({offer_name for offer_name, _ in offers})) or "nothing"
        raise MissingError(
            f"{url} offers no {name!r}; it has {names}",
            f"sartor edge sync {url} NAME --device ID --root 1.root.json, with one of those names",
        )
    _check_clock(matching_offers)
    current = store.current(name)
    old_version, ring = current.version if current else "", words.ring_of(device.id)
    offer = _choose(matching_offers, device.id, old_version, {} if again else store.refused(name))
    if offer is None or offer.version == old_version:
        notes = [*list_notes, *([] if offer else [f"no version of {name} is offered to ring {ring}"])]
        return Synced(
            name,
            version=old_version,
            was=old_version,
            changed=False,
            ring=ring,
            fetched_bytes=fetcher.fetched_bytes,
            notes=(*notes, *fetcher.broken),
        )
    transfer = _Transfer(store, url, fetcher)
    content = _read_content(url, name, offer, targets=targets, fetcher=fetcher)
    transfer.bring(content)
    store.forgive(name, offer.version)
    staged = store.stage(name, offer.version, {path: blob.sha256 for path, blob in content.files.items()})
    _check_release(staged, name, offer.version, device.signers)
    store.activate(name, offer.version, healthy, starts=device.starts)
    store.collect()  # removes deltas, and the files of the version before the previous one
    return Synced(
        name,
        version=offer.version,
        was=old_version,
        changed=True,
        ring=ring,
        missing_bytes=transfer.missing_bytes,
        fetched_bytes=fetcher.fetched_bytes,
        deltas=transfer.deltas,
        whole=transfer.whole,
        notes=(*list_notes, *transfer.notes, *fetcher.broken),
    )


def _take_lists(
    url: str, targets: Metadata[Targets], fetcher: Fetcher, signers: Sequence[PublicKey] | None
) -> list[str]:
    """Take over the lists of revoked Releases that the repository carries; return what was irregular.

    A list by a signer whom this device does not trust is left out: the repository's keys alone revoke nothing.
    """
    notes = []
    keys = signing.trusted_keys() if signers is None else list(signers)
    for path, target in targets.signed.targets.items():
        if not path.startswith(words.LISTS) or target.length > revoked_releases.MOST_BYTES:
            continue
        file = Path(path.removeprefix(words.LISTS))
        try:
            content = fetcher.small(f"{url}/targets/{target.get_prefixed_paths()[0]}", target.length)
            if content is None:
                raise MissingError(f"{url} lacks {path}", "the same command again later")
            target.verify_length_and_hashes(content)
            revoked_releases.take_over(content, file, keys)
        except exceptions.LengthOrHashMismatchError:
            notes.append(f"a list of revoked Releases is another one than was signed: {path}")
        except (SignatureError, MissingError, ArtifactError) as error:
            notes.append(f"a list of revoked Releases was left out: {error.problem}")
    return notes


def _check_release(path: Path, name: str, version: str, signers: Sequence[PublicKey] | None) -> None:
    """Check the signature of a staged Release or export, beside that of the update's metadata.

    Whoever stole the keys of the repository cannot make devices run another Release than its signer's.
    Raises SignatureError, ArtifactError.
    """
    artifact = open_artifact(path, ("release", "export"))
    if (artifact.manifest.get("name"), artifact.manifest.get("version")) != (name, version):
        raise SignatureError(
            f"{name} {version} of the repository is the Release {artifact.manifest.get('name')} "
            f"{artifact.manifest.get('version')}",
            "tell its publisher: sartor edge publish RELEASE REPOSITORY",
        )
    keys = signing.trusted_keys() if signers is None else signers
    if not any(key.allows("release") for key in keys):
        raise SignatureError(
            f"this device trusts no key for Releases, so nobody vouches for {name} {version} beside the repository",
            f"cp SIGNER.pub {folder('trusted')}/ with the public key of who signs the Releases; or --public-key",
        )
    check_signed(artifact, keys)


def _choose(offers: list[Offer], device_id: str, old_version: str, refused: Mapping[str, str]) -> Offer | None:
    """Return the newest version that this device is admitted to, or None.

    A refused version is left out. The present version stays admitted until it is halted.
    """
    for offer in offers:
        if offer.version in refused and offer.version != old_version:
            continue
        if offer.admits(device_id) or (offer.version == old_version and not offer.halted):
            return offer
    return None


class _Metadata(FetcherInterface):
    """Fetcher of TUF's client, on top of `Fetcher`."""

    def __init__(self, fetcher: Fetcher) -> None:
        self.fetcher = fetcher

    def _fetch(self, url: str) -> Iterator[bytes]:
        """Yield the content of a URL."""
        yield self.download_bytes(url, 1 << 20)

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return the content of a URL. Raises the errors that TUF's client expects."""
        try:
            result = self.fetcher.small(url, max_length)
        except ArtifactError as error:
            raise exceptions.DownloadLengthMismatchError(error.problem) from error
        if result is None:
            # the client takes a 404 as "there is no newer root"
            raise exceptions.DownloadHTTPError(f"there is no {url}", 404)
        return result


def _refresh_metadata(
    url: str, device: SyncClient, fetcher: Fetcher
) -> tuple[list[tuple[str, Offer]], Metadata[Targets]]:
    """Run TUF's client workflow on a copy of the trusted metadata; return the offers and the targets.

    Verified metadata are kept also if a later step is refused.
    """
    root = device.root if isinstance(device.root, bytes) else _read(device.root)
    _check_root(root, device.root)
    trusted = device.folder / "metadata"
    trusted.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".metadata-", dir=device.folder) as temp_folder:
        shutil.copytree(trusted, temp_folder, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns(".*"))
        try:
            updater = Updater(temp_folder, f"{url}/metadata", fetcher=_Metadata(fetcher), bootstrap=root)
            try:
                updater.refresh()
            finally:
                _persist(Path(temp_folder), trusted)
        except exceptions.ExpiredMetadataError as error:
            raise SignatureError(
                f"what {url} serves has expired: {error}",
                "the publisher runs sartor edge refresh, or the mirror is stuck in the past; is the device's clock "
                "right?",
            ) from None
        except exceptions.RepositoryError as error:
            raise SignatureError(
                f"what {url} serves is not as it was signed: {error}",
                "sartor edge sync OTHER_URL NAME --device ID --root 1.root.json, with another mirror; or the "
                "metadata/1.root.json of this repository, from its publisher",
            ) from None
        except exceptions.DownloadLengthMismatchError as error:
            raise ArtifactError(str(error), "try another mirror: this one is broken or lies") from None
        except exceptions.DownloadError as error:
            raise MissingError(
                f"{url} serves no update repository: {error}",
                f"curl -I {url}/metadata/timestamp.json shows whether a repository is there",
            ) from None
        targets: Metadata[Targets] = Metadata.from_file(str(Path(temp_folder) / "targets.json"))
    named_offers = (words.offer_of(path, target.custom) for path, target in targets.signed.targets.items())
    return [item for item in named_offers if item], targets


def _check_root(document: bytes, source: bytes | Path) -> None:
    """Raise SignatureError unless a document is a root of TUF that its own keys signed."""
    try:
        root: Metadata[Root] = Metadata.from_bytes(document)
        if root.signed.type != Root.type:
            raise exceptions.RepositoryError(f"it is the document of the role {root.signed.type}")
        root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
    except exceptions.RepositoryError as error:
        name = source if isinstance(source, Path) else "the device's root"
        raise SignatureError(
            f"{name} is no whole root document: {error}",
            "--root 1.root.json, with the metadata/1.root.json of the repository, from its publisher",
        ) from None


def _persist(source: Path, trusted: Path) -> None:
    """Make verified metadata durable, file by file.

    python-tuf renames without fsync. After a power cut an empty timestamp would count as none, and the protection
    against rollback would be lost.
    """
    for file in sorted(source.rglob("*.json")):
        target = trusted / file.relative_to(source)
        if (
            file.is_file()
            and not file.is_symlink()
            and (not target.is_file() or target.read_bytes() != file.read_bytes())
        ):
            write_file_atomic(target, file.read_bytes())


def _read_content(url: str, name: str, offer: Offer, targets: Metadata[Targets], fetcher: Fetcher) -> VersionContent:
    """Return the version's document, checked for its signed length and digest."""
    target = targets.signed.targets[words.target_path(name, offer.version)]
    document = fetcher.small(f"{url}/targets/{target.get_prefixed_paths()[0]}", target.length)
    if document is None:
        raise MissingError(
            f"{url} lacks {target.path}, which it lists", "the same command again later, or with another mirror's URL"
        )
    try:
        target.verify_length_and_hashes(document)
    except exceptions.LengthOrHashMismatchError as error:
        raise SignatureError(
            f"{url} serves another {target.path} than was signed: {error}",
            f"sartor edge sync OTHER_URL {name} --device ID --root 1.root.json, with another mirror",
        ) from None
    return words.read_version_metadata(document, name, offer.version)


def _check_clock(offers: list[Offer]) -> None:
    """Raise SignatureError if the clock is before the newest publication.

    Such a clock makes every expiry date void, and with it the protection against a freeze attack.
    """
    newest, now = max(offer.published for offer in offers), time.time()
    if now < newest - _CLOCK_S:
        date = time.strftime("%Y-%m-%d", time.gmtime(now))
        raise SignatureError(
            f"the device's clock says {date}, before the newest publication",
            "sudo timedatectl set-ntp true, or sudo date -s YYYY-MM-DD",
        )


def _join_pieces(pieces: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, piece), of at least _CHUNK_BYTES each except the last.

    An append costs an fsync, and tensors are small.
    """
    pending, position = bytearray(), 0
    for piece in pieces:
        pending += piece
        if len(pending) >= _CHUNK_BYTES:
            yield position, bytes(pending)
            position, pending = position + len(pending), bytearray()
    if pending:
        yield position, bytes(pending)


@contextmanager
def _open_blob(store: ReleaseStore, digest: str) -> Iterator[BinaryIO | None]:
    """Open a blob of the store; yield None for an empty digest, since a packed file has no base."""
    if not digest:
        yield None
        return
    with store.open(digest) as stream:
        yield stream


def _read(path: Path) -> bytes:
    """Return the bytes of the root file. Raises ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", "--root 1.root.json, from the repository's folder metadata"
        ) from None
