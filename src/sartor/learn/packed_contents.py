"""Contents of files that their own bytes do not show, for the search after an erasure.

A file is recognised by its first bytes, not by its name: gzip, bzip2, xz, zstandard, LZ4, zip (also .xlsx, .docx and
.npz), tar, the columns of Parquet and Arrow, and such files in one another, to a depth of `MOST_DEPTH`. What cannot be
decompressed is an error: it may hold anything. SQLite files hold their contents as they are.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from sartor.core.errors import MissingError

MOST_DEPTH = 6
# of one file, decompressed: what unfolds into more is no file of Sartor's
MOST_BYTES = 8 << 30
# of a packed file in another one, which is held in memory
MOST_INNER_BYTES = 1 << 30
_BLOCK = 1 << 24
_PARQUET, _ARROW, _ZIP, _TAR, _TAR_AT = b"PAR1", b"ARROW1", b"PK\x03\x04", b"ustar", 257
HEAD_BYTES = _TAR_AT + len(_TAR)


def _by_pyarrow(codec: str) -> Callable[[Any], Any]:
    return lambda stream: pa.CompressedInputStream(pa.PythonFile(stream, "r"), codec)


_STREAMS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b\x08": lambda stream: gzip.GzipFile(fileobj=stream),
    **{b"BZh%d1AY&" % level: bz2.BZ2File for level in range(1, 10)},
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": _by_pyarrow("zstd"),
    b"\x04\x22\x4d\x18": _by_pyarrow("lz4"),
}
# compressed in ways that nothing here opens
_CLOSED = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!\x1a\x07": "RAR", b"%PDF-": "PDF"}
_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,  # a zip with a password
    lzma.LZMAError,
    zlib.error,
    zipfile.BadZipFile,
    tarfile.TarError,
)


def is_packed(head: bytes) -> bool:
    """Return whether a file that begins with these bytes (HEAD_BYTES of them) has contents that they do not show."""
    return head.startswith((_ZIP, _PARQUET, _ARROW, *_STREAMS, *_CLOSED)) or _is_tar(head)


def unpacked(file: BinaryIO, overlap: int) -> Iterator[Any]:
    """Yield the contents of an open file as buffers, and of the packed files in it.

    overlap: bytes of the end of a buffer that stand at the start of the next one too, so that nothing is split.
    Raises MissingError for contents that cannot be decompressed, are nested too deep or are too large.
    """
    try:
        yield from _Unpacker(overlap).contents(file, 0)
    except _ERRORS as error:
        raise MissingError(
            f"cannot be searched in its compressed form: {error}",
            "rm FILE, if nothing needs it; else decompress it there",
        ) from None


def _is_tar(head: bytes) -> bool:
    return head[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR


class _Unpacker:
    """Decompression of one file, with one limit for all that is in it."""

    def __init__(self, overlap: int) -> None:
        self._overlap, self._remaining = overlap, MOST_BYTES

    def contents(self, stream: Any, depth: int) -> Iterator[Any]:
        """Yield the contents of a packed stream; nothing for a stream that is not packed."""
        stream.seek(0)
        head = stream.read(HEAD_BYTES)
        stream.seek(0)
        if not is_packed(head):
            return
        if depth >= MOST_DEPTH:
            raise ValueError(f"it is packed {depth} times over")
        if head.startswith(tuple(_CLOSED)):
            raise ValueError(
                f"{next(name for magic, name in _CLOSED.items() if head.startswith(magic))} is not opened"
            )
        if head.startswith((_PARQUET, _ARROW)):
            yield from self._columns(stream, is_parquet=head.startswith(_PARQUET))
        elif head.startswith(_ZIP):
            with zipfile.ZipFile(stream) as archive:
                for member in archive.infolist():
                    with archive.open(member) as inner:
                        yield from self._whole(inner, depth)
        elif _is_tar(head):
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for entry in tar:
                    if (content := tar.extractfile(entry)) is not None:
                        yield from self._whole(content, depth)
        else:
            make_stream = next(make for magic, make in _STREAMS.items() if head.startswith(magic))
            yield from self._whole(make_stream(stream), depth)

    def _columns(self, stream: Any, *, is_parquet: bool) -> Iterator[Any]:
        table = pq.read_table(stream) if is_parquet else pa.ipc.open_file(stream).read_all()
        for column in table.columns:
            for chunk in column.chunks:
                yield from self._buffers(chunk)

    def _buffers(self, array: Any) -> Iterator[Any]:
        for buffer in array.buffers():
            if buffer is not None and buffer.size:
                self._count(buffer.size)
                yield buffer
        if isinstance(array, pa.DictionaryArray):  # its values stand in buffers of their own
            yield from self._buffers(array.dictionary)

    def _whole(self, inner: Any, depth: int) -> Iterator[Any]:
        """Yield the blocks of a decompressed stream, then the contents of what is packed in it."""
        head, rest, inner_file = b"", b"", io.BytesIO()
        while block := inner.read(_BLOCK):
            self._count(len(block))
            head = head or bytes(block[:HEAD_BYTES])
            if is_packed(head):
                if inner_file.tell() + len(block) > MOST_INNER_BYTES:
                    raise ValueError(f"a packed file in it has over {MOST_INNER_BYTES >> 30} GiB")
                inner_file.write(block)
            yield rest + block
            rest = bytes(block[-self._overlap :])
        if is_packed(head):
            yield from self.contents(inner_file, depth + 1)

    def _count(self, size: int) -> None:
        self._remaining -= size
        if self._remaining < 0:
            raise ValueError(f"it has over {MOST_BYTES >> 30} GiB decompressed")
