"""Files, deltas and rollout offer of a version.

targets/NAME/DIGEST.VERSION.json   a TUF target: every file of the version by digest, and the deltas that lead to them
targets/revoked-releases/...       the publisher's signed lists of revoked Releases (core/revoked_releases.py)
its `custom` in targets.json       order, percent, halted, published: the offer (signed; it changes without the target)
blobs/ab/abcd...                   content by sha256: named by a signed document, so no mirror has to be trusted
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from sartor.core import strict_json
from sartor.core.config import is_valid_name
from sartor.core.errors import ArtifactError
from sartor.edge.store.version_pointers import DIGEST

SCHEMA = 1
MOST_FILES = 10_000
LISTS = "revoked-releases/"  # targets without an offer, so that no device takes one for a version


@dataclass(frozen=True)
class Blob:
    """Content of a file, by its sha256."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class DeltaStep:
    """Delta: the blob `sha256` makes `result` out of `base`; an empty base needs nothing (a packed file)."""

    base: str
    result: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class VersionContent:
    """Content of one version: its files by path, and the deltas to them."""

    name: str
    version: str
    files: Mapping[str, Blob]
    deltas: tuple[DeltaStep, ...] = ()

    def as_bytes(self) -> bytes:
        """Return the document to sign."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, separators=(",", ":")).encode()

    @property
    def blobs(self) -> dict[str, int]:
        """Digest -> bytes of every file."""
        return {blob.sha256: blob.bytes for blob in self.files.values()}


@dataclass(frozen=True)
class Offer:
    """Offer of a version to a fraction of the devices.

    order: rises with each publication.
    percent: of the devices, by `ring_of`.
    published: seconds since 1970; a device whose clock is before it cannot judge expiry dates.
    previous_percent: `percent` before it was widened; the newest ring lies between both.
    """

    version: str
    order: int
    percent: int
    halted: bool
    published: int
    previous_percent: int = 0

    def admits(self, device_id: str) -> bool:
        """Return whether this device is in the rings that the version is offered to."""
        return not self.halted and ring_of(device_id) < self.percent

    def as_custom(self) -> dict[str, Any]:
        """Return the target's `custom`; whole numbers, since canonical JSON has no others."""
        return {key: value for key, value in asdict(self).items() if key != "version"}


def ring_of(device_id: str) -> int:
    """Return a device's ring, 0..99.

    Rings are even over devices and constant for each, so that a wider offer includes all earlier devices.
    """
    return int.from_bytes(hashlib.sha256(device_id.encode()).digest()[:8], "big") % 100


def target_path(name: str, version: str) -> str:
    """Return the name of a version's document among the targets."""
    return f"{name}/{version}.json"


def list_path(signer: str) -> str:
    """Return the name of a signer's list of revoked Releases among the targets."""
    return f"{LISTS}{signer}.json"


def blob_path(digest: str) -> str:
    """Return the path of a blob in the repository."""
    return f"blobs/{digest[:2]}/{digest}"


def offer_of(path: str, custom: Any) -> tuple[str, Offer] | None:
    """Return (name, offer) of a signed target, or None if it is no version.

    A target of another program is no version.
    """
    name, _, file = path.partition("/")
    version = file.removesuffix(".json")
    if (
        not file.endswith(".json")
        or not (is_valid_name(name) and is_valid_name(version))
        or not isinstance(custom, dict)
    ):
        return None
    numbers = [custom.get(key) for key in ("order", "percent", "published")]
    if not all(type(number) is int and number >= 0 for number in numbers) or type(custom.get("halted")) is not bool:
        return None
    # An older repository has no previous_percent: then all devices belong to the newest ring
    previous = custom.get("previous_percent", 0)
    if type(previous) is not int or not 0 <= previous <= custom["percent"]:
        return None
    return name, Offer(
        version,
        order=custom["order"],
        percent=custom["percent"],
        halted=custom["halted"],
        published=custom["published"],
        previous_percent=previous,
    )


def read_version_metadata(document: bytes, name: str, version: str) -> VersionContent:
    """Return a version's content, checked for what a device relies on.

    Raises ArtifactError for another version's document, paths that lead out of the release, or invalid sizes or
    digests. The document is signed, but a signer can be wrong too.
    """
    try:
        fields = strict_json.loads(document)
        files = {path: Blob(**blob) for path, blob in fields["files"].items()}
        result = VersionContent(
            fields["name"], fields["version"], files, tuple(DeltaStep(**step) for step in fields["deltas"])
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _document_error(name, version, type(error).__name__) from None
    if fields.get("schema") != SCHEMA:
        raise _document_error(
            name, version, f"it has schema {fields.get('schema')}; this version of Sartor reads {SCHEMA}"
        )
    if (result.name, result.version) != (name, version):
        raise _document_error(name, version, f"it is of {result.name} {result.version}")
    if len(files) > MOST_FILES or any(not _is_inside(path) for path in files):
        raise _document_error(name, version, "a path in it leads out of the release, or there are too many")
    digests = [*(blob.sha256 for blob in files.values()), *(step.sha256 for step in result.deltas)]
    digests += [step.result for step in result.deltas]
    sizes = [*(blob.bytes for blob in files.values()), *(step.bytes for step in result.deltas)]
    digests += [step.base for step in result.deltas if step.base]
    if not all(isinstance(digest, str) and DIGEST.fullmatch(digest) for digest in digests) or not all(
        type(size) is int and size >= 0 for size in sizes
    ):
        raise _document_error(name, version, "a digest or a size in it is none")
    return result


def _is_inside(path: str) -> bool:
    """Return whether a path is plain and relative, and stays inside the release."""
    parts = PurePosixPath(path).parts
    plain = "\\" not in path and "\0" not in path and ":" not in path and str(PurePosixPath(path)) == path
    return bool(parts) and plain and not path.startswith("/") and ".." not in parts


def _document_error(name: str, version: str, problem: str) -> ArtifactError:
    return ArtifactError(
        f"the document of {name} {version} cannot be used: {problem}", "tell its publisher: publish it again"
    )
