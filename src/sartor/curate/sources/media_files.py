"""Checks and copies of the image and audio files of rows.

The decoded size of an image is read from its header, so a decompression bomb is refused before it is decoded. Each
file is then decoded once: a file that cannot be seen or heard becomes a Drop here, while its row can still be
corrected.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import os
import re
import shutil
import struct
import urllib.parse
from pathlib import Path, PurePath
from typing import BinaryIO

from sartor.core.errors import MediaError
from sartor.core.filesystem import write_file_atomic
from sartor.core.records import MalformedRow
from sartor.curate.sources import file_formats
from sartor.curate.sources.safe_paths import open_regular
from sartor.media import audio, images
from sartor.media.images import MOST_PIXELS

MOST_BYTES = 1 << 30  # of one media file
MOST_DECODED = 256 << 20  # larger files are first decoded by the steps `images` and `audio`, and by the encoder
MOST_FRAMES = 1000
PICTURES = ("PNG", "JPEG", "GIF", "WebP", "BMP", "TIFF")
_SUFFIXES = {
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/jpg": ".jpg",
    "image/bmp": ".bmp",
    "image/tiff": ".tiff",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "audio/wav": ".wav",
    "audio/x-wav": ".wav",
    "audio/mpeg": ".mp3",
    "audio/mp3": ".mp3",
    "audio/flac": ".flac",
    "audio/ogg": ".ogg",
}
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def store_media(kind: str, value: str, folder: Path | None, media_folder: Path) -> str:
    """Copy a media file of a row into `media_folder`; return its path below the dataset.

    value: path below `folder`, or a data URL. Without a `folder` (rows of a query or the Hub) only data URLs are
    accepted. Raises MalformedRow.
    """
    if value.startswith("data:"):
        content = of_data_url(kind, value)
        mime = value.partition(",")[0].removeprefix("data:").partition(";")[0].lower()
        suffix = _SUFFIXES.get(mime, "") or file_formats.suffix_of(content[: file_formats.HEAD_BYTES])
        return copy(io.BytesIO(content), f"data URL{suffix}", media_folder)
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.\-]+://", value):
        raise MalformedRow("bad_media", f"the {kind} is an address to fetch ({value[:60]}); give a path or a data URL")
    return copy_file(locate(kind, value, folder), media_folder)


def copy_file(file: Path, media_folder: Path, sha256: str = "") -> str:
    """Copy a media file by its path as `copy` does."""
    try:
        stream = open_regular(file)
    except OSError as error:
        raise MalformedRow("bad_media", f"the file {file.name[:80]!r} cannot be opened: {error.strerror}") from None
    with stream:
        return copy(stream, file.name, media_folder, sha256)


def locate(kind: str, value: str, folder: Path | None) -> Path:
    """Return the file that a row's path names.

    Raises MalformedRow for a path that could lead out of the folder, is invalid, or names no file.
    """
    if folder is None:
        raise MalformedRow(
            "bad_media", f"the {kind} is a path ({value[:60]!r}), and rows of this source lie in no folder"
        )
    decoded = urllib.parse.unquote(urllib.parse.unquote(value))
    for spelling in (value, decoded):
        parts = re.split(r"[/\\]", spelling)
        if spelling.startswith(("/", "\\", "~")) or re.match(r"[a-zA-Z]:", spelling) or ".." in parts:
            raise MalformedRow("bad_media", f"the {kind} path {value[:80]!r} leaves the folder of its source")
    if (
        not value
        or "\0" in decoded
        or len(value) > 4096
        or any(len(part.encode("utf-8", "replace")) > 255 for part in value.split("/"))
    ):
        raise MalformedRow("bad_media", f"the {kind} path {value[:80]!r} is none that a file can have")
    file = folder / value
    try:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise MalformedRow("bad_media", f"the {kind} path {value[:80]!r} leaves the folder of its source")
        exists = file.exists()
    except (OSError, ValueError, RuntimeError):  # a loop of links, or a lone surrogate
        raise MalformedRow("bad_media", f"the {kind} path {value[:80]!r} is none that can be followed") from None
    if not exists:
        raise MalformedRow("missing_media", f"there is no {kind} at {value[:80]!r} beside the file")
    return file


def of_data_url(kind: str, value: str) -> bytes:
    """Return the bytes in a data URL.

    Raises MalformedRow.
    """
    try:
        return base64.b64decode(value.partition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise MalformedRow("bad_media", f"the {kind} data URL is not base64") from None


def copy(stream: BinaryIO, name: str, media_folder: Path, sha256: str = "") -> str:
    """Check a media file and copy it under its digest; return its path below the dataset.

    sha256: digest that the file must have; not checked if empty. Several processes may copy the same file at once.
    Raises MalformedRow.
    """
    size = stream.seek(0, os.SEEK_END)
    if size > MOST_BYTES:
        raise MalformedRow("bad_media", f"the media file has {size:,} bytes; the limit is {MOST_BYTES:,}")
    stream.seek(0)
    check(stream, name)
    digest = digest_of(stream)
    if sha256 and digest != sha256:
        raise MalformedRow("changed_file", "the file was changed after the run began")
    target = media_folder / f"{digest}{PurePath(name).suffix.lower()}"
    if not target.exists():
        if size <= MOST_DECODED:
            stream.seek(0)
            _decode(stream.read())
        stream.seek(0)
        # durable: an interrupted run continues with the existing files and does not read their bytes again
        write_file_atomic(target, lambda out: shutil.copyfileobj(stream, out, 1 << 20))
    return f"{media_folder.name}/{target.name}"


def _decode(content: bytes) -> None:
    """Raise MalformedRow for an image or recording that cannot be decoded to its end."""
    try:
        if file_formats.sniff(content[: file_formats.HEAD_BYTES]) in PICTURES:
            with images.open_checked(content) as image:
                image.load()
        else:
            with audio.open_audio(content) as sound:
                for _ in audio.blocks(sound, math.inf):
                    pass
    except MediaError as error:
        raise MalformedRow(error.reason, error.problem) from None


def check(stream: BinaryIO, name: str) -> None:
    """Raise MalformedRow for a media file that is empty, of another format, or too large when decoded."""
    head = stream.read(file_formats.HEAD_BYTES)
    if not head:
        raise MalformedRow("bad_media", f"the media file {name[:80]!r} is empty")
    if (fault := file_formats.must_be(name, head)) is not None:
        raise fault
    format_name = file_formats.sniff(head)
    if format_name not in PICTURES:
        return
    try:
        width, height, frames = image_size(stream, format_name)
    except (struct.error, IndexError, ValueError):
        raise MalformedRow("bad_media", f"the {format_name} ends inside its header") from None
    if width < 1 or height < 1:
        raise MalformedRow("bad_media", f"the {format_name} says that it has {width} x {height} pixels")
    if width * height > MOST_PIXELS:
        raise MalformedRow("image_bomb", f"{width:,} x {height:,} pixels; the limit is {MOST_PIXELS:,}")
    if frames > MOST_FRAMES:
        raise MalformedRow("image_bomb", f"more than {MOST_FRAMES:,} frames in one picture")


def image_size(stream: BinaryIO, format_name: str) -> tuple[int, int, int]:
    """Return (width, height, frames) from the header, without decoding.

    Frames are counted only to just over MOST_FRAMES. Raises struct.error, IndexError or ValueError for a truncated or
    invalid file.
    """
    stream.seek(0)
    head = stream.read(64)
    if format_name == "PNG":
        return (*struct.unpack(">II", head[16:24]), _png_frames(stream))
    if format_name == "GIF":
        return (*struct.unpack("<HH", head[6:10]), _gif_frames(stream, head))
    if format_name == "BMP":
        width, height = struct.unpack("<ii", head[18:26])
        return abs(width), abs(height), 1
    if format_name == "WebP":
        return _webp_size(stream, head)
    return (*_jpeg_size(stream), 1) if format_name == "JPEG" else (*_tiff_size(stream, head), 1)


def _png_frames(stream: BinaryIO) -> int:
    """Return the frames of an animated PNG; its acTL chunk precedes the first image data."""
    position = 8
    for _ in range(1000):
        stream.seek(position)
        chunk = stream.read(12)
        if len(chunk) < 12 or chunk[4:8] == b"IDAT":
            return 1
        if chunk[4:8] == b"acTL":
            return int(struct.unpack(">I", chunk[8:12])[0])
        position += 12 + int(struct.unpack(">I", chunk[:4])[0])
    return 1


def _gif_frames(stream: BinaryIO, head: bytes) -> int:
    """Count the frames of a GIF block by block; the count stops above MOST_FRAMES and at the file's end."""
    stream.seek(13 + (3 << ((head[10] & 7) + 1) if head[10] & 0x80 else 0))
    frames = 0
    while frames <= MOST_FRAMES and (mark := stream.read(1)) in (b"!", b","):
        if mark == b"!":
            stream.read(1)
        else:
            frames += 1
            flags = stream.read(9)[8]
            stream.seek((3 << ((flags & 7) + 1) if flags & 0x80 else 0) + 1, os.SEEK_CUR)
        while (size := stream.read(1)) not in (b"", b"\0"):
            stream.seek(size[0], os.SEEK_CUR)
    return frames


def _webp_size(stream: BinaryIO, head: bytes) -> tuple[int, int, int]:
    if head[12:16] == b"VP8X":
        width, height = (int.from_bytes(head[position : position + 3], "little") + 1 for position in (24, 27))
        return width, height, _webp_frames(stream)
    if head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, 1
    width, height = struct.unpack("<HH", head[26:30])
    return width & 0x3FFF, height & 0x3FFF, 1


def _webp_frames(stream: BinaryIO) -> int:
    position, frames = 12, 0
    while frames <= MOST_FRAMES:
        stream.seek(position)
        chunk = stream.read(8)
        if len(chunk) < 8:
            break
        frames += chunk[:4] == b"ANMF"
        size = int(struct.unpack("<I", chunk[4:])[0])
        position += 8 + size + (size & 1)
    return max(frames, 1)


def _jpeg_size(stream: BinaryIO) -> tuple[int, int]:
    position = 2
    for _ in range(10_000):
        stream.seek(position)
        mark, code, size = struct.unpack(">BBH", stream.read(4))
        if mark != 0xFF:
            raise ValueError
        if code in _JPEG_SIZES:
            height, width = struct.unpack(">xHH", stream.read(5))
            return width, height
        position += 1 if code == 0xFF else 2 + size
    raise ValueError


def _tiff_size(stream: BinaryIO, head: bytes) -> tuple[int, int]:
    order = "<" if head[:2] == b"II" else ">"
    stream.seek(struct.unpack(f"{order}I", head[4:8])[0])
    (count,) = struct.unpack(f"{order}H", stream.read(2))
    sizes: dict[int, int] = {}
    for _ in range(count):
        entry = stream.read(12)
        tag, kind = struct.unpack(f"{order}HH", entry[:4])
        if tag in (256, 257):
            sizes[tag] = struct.unpack(
                f"{order}H" if kind == 3 else f"{order}I", entry[8:10] if kind == 3 else entry[8:12]
            )[0]
    return sizes.get(256, 0), sizes.get(257, 0)


def digest_of(content: BinaryIO | bytes) -> str:
    """Return the SHA-256 of bytes, or of an open file from its start, in hex."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256()
    content.seek(0)
    while block := content.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
