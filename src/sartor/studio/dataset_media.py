"""Pictures and recordings of a Dataset's rows, as a browser may show them.

Only files that a row names are found: a request gives a row and a number, never a path. A file must be one of the
Dataset's, with the digest of its manifest. Its type follows from its first bytes, never from its name, and only types
without scripts are known: SVG, HTML and XML have none of these bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sartor.core.artifacts import Artifact, check_file
from sartor.core.errors import MediaError
from sartor.serving.http.http_errors import NotFoundError
from sartor.studio.dataset_rows import EXAMPLES, RowTable, row_media

MAX_BYTES = {"image": 24 << 20, "audio": 128 << 20}
HEAD_BYTES = 16


class _MediaFormat(NamedTuple):
    """Format of media. start: first bytes. inner: bytes 8 to 12 of a RIFF file; empty for others."""

    start: bytes
    media_type: str
    inner: bytes = b""


_FORMATS = (
    _MediaFormat(b"\x89PNG\r\n\x1a\n", "image/png"),
    _MediaFormat(b"\xff\xd8\xff", "image/jpeg"),
    _MediaFormat(b"GIF87a", "image/gif"),
    _MediaFormat(b"GIF89a", "image/gif"),
    _MediaFormat(b"RIFF", "image/webp", b"WEBP"),
    _MediaFormat(b"BM", "image/bmp"),
    _MediaFormat(b"RIFF", "audio/wav", b"WAVE"),
    _MediaFormat(b"fLaC", "audio/flac"),
    _MediaFormat(b"OggS", "audio/ogg"),
    _MediaFormat(b"ID3", "audio/mpeg"),
    *(_MediaFormat(bytes([0xFF, second]), "audio/mpeg") for second in (0xFB, 0xFA, 0xF3, 0xF2, 0xE3, 0xE2)),
)


@dataclass(frozen=True)
class ShownMedia:
    """A checked file of media. media_type: of its content."""

    path: Path
    media_type: str


def find_media(dataset: Artifact, position: int, number: int) -> ShownMedia:
    """Return a picture or recording of a row.

    position: of the row. number: as `row_media` counts them.
    Raises NotFoundError if the row names none, MediaError for a file that is not shown, ArtifactError for a changed
    one.
    """
    examples = RowTable(dataset, EXAMPLES)
    if not 0 <= position < examples.total:
        raise NotFoundError(f"there is no row {position:,}", "go back to the rows")
    files = row_media(examples.take([position], ["messages", "rejected"])[0])
    if not 0 <= number < len(files):
        raise NotFoundError(f"row {position:,} has {len(files)} pictures and recordings", "go back to the row")
    kind, name = files[number]["kind"], files[number]["path"]
    entry = dataset.manifest["files"].get(name)
    if entry is None or kind not in MAX_BYTES:
        raise NotFoundError(f"{name[:200]!a} is no file of the Dataset", "make the Dataset again: sartor curate")
    if entry["bytes"] > MAX_BYTES[kind]:
        problem = f"{name[:200]!a} has {entry['bytes']:,} bytes; at most {MAX_BYTES[kind]:,} are shown"
        raise MediaError("too_large", problem, "open it from the Dataset's folder")
    check_file(dataset, name)
    path = dataset.path / name
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    media_type = media_type_of(head)
    if not media_type.startswith(f"{kind}/"):
        problem = f"{name[:200]!a} is no {kind} that a browser shows"
        raise MediaError("not_shown", problem, "open it from the Dataset's folder")
    return ShownMedia(path, media_type)


def media_type_of(head: bytes) -> str:
    """Return the media type that the first bytes of a file indicate; empty for all that is not shown."""
    for known in _FORMATS:
        if head.startswith(known.start) and head[8 : 8 + len(known.inner)] == known.inner:
            return known.media_type
    return ""
