"""Byte-exact delta of safetensors files.

    delta  =  "SARTORD1"  length of head (4 bytes, little endian)  head (LZMA)  streams (LZMA), one after the other
    head   =  JSON: from, to (sha256), bytes of the result, `form` of each tensor in file order, lengths of the
              streams; then the header of the resulting file as it stands

A tensor that did not change is one character of `form`. A changed one is a difference of its bit patterns, in
whichever form codes shorter. One form maps the patterns to integers in the order of their numbers, subtracts, and
folds the difference to small unsigned integers. The other is XOR. Two ideas make noise shorter. Each byte of the
difference goes into a stream of its own (byte planes, as in Blosc's shuffle), since the upper ones hardly vary. And
the values are visited in the order of the base's magnitude. Adam moves every weight by about the same absolute
amount, which is many units in the last place of a small weight and few of a large one. So neighbours in that order
have differences of one width. The device has the base, so the order costs nothing. With an empty `from` the file is
only packed, and needs no base.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import ArtifactError
from sartor.core.filesystem import file_digest

MAGIC = b"SARTORD1"
SCHEMA = 1
# safetensors' own limit is 100 MB; an adapter's header has some hundred bytes a tensor
MOST_HEADER_BYTES = 1 << 24
_DTYPES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
_FLOATS = ("F64", "F32", "F16", "BF16")
# Three forms of elements of 1, 2, 4 and 8 bytes, a stream for each byte of an element
_MOST_STREAMS = 3 * (1 + 2 + 4 + 8)
_SAME, _SUBTRACTED, _XORED, _NEW = "=", "-", "^", "r"
# Contexts of neighbouring bytes do not predict noise and dilute the statistics: lc=lp=pb=0 is an adaptive order-0
# coder.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0, "dict_size": 1 << 20}]
_PIECE_BYTES = 1 << 16
Words = NDArray[Any]


@dataclass(frozen=True)
class TensorLocation:
    """Location of one tensor in a file.

    start, end: bytes from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsLayout:
    """Header of a safetensors file as it stands, and its tensors in file order.

    The tensors cover everything after the header.
    """

    header: bytes
    tensors: tuple[TensorLocation, ...]

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return self.tensors[-1].end if self.tensors else len(self.header)


@dataclass(frozen=True)
class TensorDelta:
    """Delta that `make` wrote: digests of both files, its size and the result's.

    base: empty if none is needed.
    """

    base: str
    result: str
    delta_bytes: int
    result_bytes: int


def layout_of(stream: BinaryIO) -> SafetensorsLayout:
    """Return the layout of a safetensors file.

    Raises ArtifactError for another format, a truncated file, and tensors that overlap or leave gaps.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    lead = stream.read(8)
    length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else 0
    if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
        raise _layout_error(f"its header has {length:,} bytes")
    result = _layout(lead + stream.read(length))
    if result.file_bytes != size:
        raise _layout_error(f"its header is of a file of {result.file_bytes:,} bytes, it has {size:,}")
    return result


def _layout(header: bytes) -> SafetensorsLayout:
    """Return the layout of a header, length included. Raises ArtifactError."""
    try:
        fields = json.loads(header[8:])
        tensors = []
        for name, entry in fields.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            tensors.append(
                TensorLocation(
                    name,
                    dtype=entry["dtype"],
                    shape=tuple(entry["shape"]),
                    start=len(header) + int(start),
                    end=len(header) + int(end),
                )
            )
        tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise _layout_error(f"its header cannot be read ({type(error).__name__})") from None
    position = len(header)
    for tensor in tensors:
        width = _DTYPES.get(tensor.dtype, 0) if isinstance(tensor.dtype, str) else 0
        if not width or tensor.start != position or tensor.end < position or (tensor.end - position) % width:
            raise _layout_error(f"the tensor {tensor.name[:80]!r} ({tensor.dtype}) lies where it cannot")
        position = tensor.end
    return SafetensorsLayout(header, tuple(tensors))


def make(base: Path | None, result: Path, out: Path) -> TensorDelta | None:
    """Write the delta from `base` (None: from nothing) to `result` as `out`.

    A tensor is coded against the base's tensor of the same name, dtype and shape, if there is one. Returns None, and
    writes no file, if the delta would save nothing, or if a file is no safetensors: a delta is an economy, and the
    whole file is always available.
    """
    with contextlib.ExitStack() as stack:
        result_stream = stack.enter_context(result.open("rb"))
        base_stream = stack.enter_context(base.open("rb")) if base else None
        try:
            target = layout_of(result_stream)
            base_tensors = {tensor.name: tensor for tensor in layout_of(base_stream).tensors} if base_stream else {}
        except ArtifactError:
            return None
        form, planes = [], _Planes()
        for tensor in target.tensors:
            base_tensor = base_tensors.get(tensor.name)
            fits = base_tensor is not None and (base_tensor.dtype, base_tensor.shape) == (tensor.dtype, tensor.shape)
            words = _words(result_stream, tensor)
            old = _words(base_stream, base_tensor) if base_stream and base_tensor and fits else None
            form.append(_code(tensor, old, words, planes))
        digests = [file_digest(path) for path in (base, result) if path]
    streams = planes.finish()
    head = {
        "schema": SCHEMA,
        "from": digests[0] if base else "",
        "to": digests[-1],
        "bytes": target.file_bytes,
        "form": "".join(form),
        "streams": {key: len(content) for key, content in streams.items()},
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    packed = lzma.compress(struct.pack("<I", len(text)) + text + target.header, lzma.FORMAT_RAW, filters=_FILTERS)
    encoded = b"".join((MAGIC, struct.pack("<I", len(packed)), packed, *streams.values()))
    if len(encoded) >= target.file_bytes:
        return None
    out.write_bytes(encoded)
    return TensorDelta(digests[0] if base else "", digests[-1], len(encoded), target.file_bytes)


def apply(base: BinaryIO | None, delta: BinaryIO, result_bytes: int) -> Iterator[bytes]:
    """Yield the bytes of the result, a tensor at a time.

    Memory holds one tensor, its base and its difference.

    result_bytes: the signed size; nothing longer is made, whatever `delta` states.

    Raises ArtifactError for a delta that is invalid, or not of this base. The caller checks the digest of the result:
    only that proves it.
    """
    try:
        head, header, position = _head(delta)
        target = _layout(header)
        if target.file_bytes != result_bytes or len(head["form"]) != len(target.tensors):
            raise _delta_error(f"it makes {target.file_bytes:,} bytes; {result_bytes:,} are signed")
        base_tensors = {tensor.name: tensor for tensor in layout_of(base).tensors} if base else {}
        if len(head["streams"]) > _MOST_STREAMS:  # each holds a decompressor of a megabyte
            raise _delta_error(f"it has {len(head['streams'])} streams; {_MOST_STREAMS} are the most")
        streams = {}
        for key, length in head["streams"].items():
            streams[key] = _Stream(delta, position, length)
            position += length
        yield header
        for tensor, form in zip(target.tensors, head["form"], strict=True):
            base_tensor = base_tensors.get(tensor.name)
            if form != _NEW and (
                base_tensor is None or (base_tensor.dtype, base_tensor.shape) != (tensor.dtype, tensor.shape)
            ):
                raise _delta_error(f"it is not of this base, which has no such tensor as {tensor.name[:80]!r}")
            old = _words(base, base_tensor) if base and base_tensor and form != _NEW else None
            yield _decode(tensor, form, old, streams).tobytes()
    except (
        lzma.LZMAError,
        struct.error,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
        RecursionError,
        OverflowError,
    ) as error:
        raise _delta_error(f"it cannot be read ({type(error).__name__})") from None


def _code(tensor: TensorLocation, old: Words | None, new: Words, planes: _Planes) -> str:
    """Return the form of one tensor; its planes are added to the streams.

    old, new: (N,) bit patterns, N elements.
    """
    if old is None:
        planes.add(_NEW, new)
        return _NEW
    if np.array_equal(old, new):
        return _SAME
    order = _order(tensor.dtype, old)
    forms = {
        _SUBTRACTED: _folded(_ordinal(tensor.dtype, new) - _ordinal(tensor.dtype, old))[order],
        _XORED: (new ^ old)[order],
        _NEW: new,
    }
    best = min(forms, key=lambda form: _coded_bytes(forms[form]))
    planes.add(best, forms[best])
    return best


def _decode(tensor: TensorLocation, form: str, old: Words | None, streams: dict[str, _Stream]) -> Words:
    """Return the bit patterns of one tensor, (N,), from its form and streams."""
    count, width = (tensor.end - tensor.start) // _DTYPES[tensor.dtype], _DTYPES[tensor.dtype]
    if form == _SAME:
        assert old is not None
        return old
    planes = np.empty((count, width), np.uint8)
    for plane in range(width):
        planes[:, plane] = np.frombuffer(streams[f"{form}{width}{plane}"].take(count), np.uint8)
    words = planes.reshape(-1).view(f"<u{width}")
    if form == _NEW:
        return words
    if form not in (_SUBTRACTED, _XORED) or old is None:
        raise _delta_error(f"it has the form {form!r}")
    ordered = np.empty_like(words)
    ordered[_order(tensor.dtype, old)] = words
    if form == _XORED:
        return ordered ^ old
    return _bits(tensor.dtype, _ordinal(tensor.dtype, old) + _unfolded(ordered))


def _order(dtype: str, old: Words) -> NDArray[np.intp]:
    """Return the positions by rising magnitude of the base, (N,), ties as they stand.

    Only the upper 15 bits of the magnitude count, which allows a radix sort.
    """
    if dtype not in _FLOATS:
        return np.arange(len(old))
    upper = (old >> (8 * old.itemsize - 16)).astype(np.uint16)
    return np.argsort(upper & 0x7FFF, kind="stable")


def _ordinal(dtype: str, bits: Words) -> Words:
    """Return the unsigned integers of bit patterns, (N,), in the order of the numbers.

    For floats, u = ~b if the sign bit is set, else b | sign. Integers stand for themselves (differences wrap).
    """
    if dtype not in _FLOATS:
        return bits
    sign = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    return np.where(bits & sign, ~bits, bits | sign)


def _bits(dtype: str, ordinals: Words) -> Words:
    """Return the inverse of `_ordinal`, (N,)."""
    if dtype not in _FLOATS:
        return ordinals
    sign = ordinals.dtype.type(1 << (8 * ordinals.itemsize - 1))
    return np.where(ordinals & sign, ordinals ^ sign, ~ordinals)


def _folded(difference: Words) -> Words:
    """Return small unsigned integers for signed differences, (N,): zigzag, as in protocol buffers.

    0, -1, 1, -2 ... become 0, 1, 2, 3.
    """
    signed = difference.view(f"<i{difference.itemsize}")
    return ((signed << 1) ^ (signed >> (8 * difference.itemsize - 1))).view(difference.dtype)


def _unfolded(folded: Words) -> Words:
    """Return the inverse of `_folded`, (N,)."""
    return (folded >> 1) ^ (0 - (folded & 1)).astype(folded.dtype)


def _coded_bytes(words: Words) -> int:
    """Return about how many bytes the words will code to.

    It uses Huffman coding alone, which takes a hundredth of LZMA's time and ranks the forms as LZMA does.
    """
    coder = zlib.compressobj(level=1, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
    coded_bytes = sum(len(coder.compress(plane.tobytes())) for plane in _split(words))
    return coded_bytes + len(coder.flush())


def _split(words: Words) -> Words:
    """Return the byte planes, (width, count), lowest first."""
    return words.view(np.uint8).reshape(-1, words.itemsize).T


class _Planes:
    """Writer of the streams: one coder for each form, width and byte."""

    def __init__(self) -> None:
        self.coders: dict[str, tuple[lzma.LZMACompressor, bytearray]] = {}

    def add(self, form: str, words: Words) -> None:
        """Add the byte planes of the words to their streams."""
        for number, plane in enumerate(_split(words)):
            key = f"{form}{words.itemsize}{number}"
            if key not in self.coders:
                self.coders[key] = (lzma.LZMACompressor(lzma.FORMAT_RAW, filters=_FILTERS), bytearray())
            coder, written = self.coders[key]
            written += coder.compress(plane.tobytes())

    def finish(self) -> dict[str, bytes]:
        """Return the finished streams by key."""
        return {key: bytes(written) + coder.flush() for key, (coder, written) in sorted(self.coders.items())}


class _Stream:
    """Reader of one stream. It decodes only as much as is requested, so that nothing can unpack to more."""

    def __init__(self, source: BinaryIO, start: int, length: int) -> None:
        self.source, self.position, self.end = source, start, start + length
        self.coder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)

    def take(self, count: int) -> bytes:
        """Return exactly `count` decoded bytes. Raises EOFError if the stream ends before."""
        parts = bytearray()
        while len(parts) < count:
            piece = b""
            if self.coder.needs_input:
                self.source.seek(self.position)
                piece = self.source.read(min(_PIECE_BYTES, self.end - self.position))
                self.position += len(piece)
                if not piece:
                    raise EOFError
            parts += self.coder.decompress(piece, count - len(parts))
        return bytes(parts)


def _head(delta: BinaryIO) -> tuple[dict[str, Any], bytes, int]:
    """Return the head's JSON, the result's header, and the position where the streams begin."""
    delta.seek(0)
    lead = delta.read(len(MAGIC) + 4)
    if not lead.startswith(MAGIC):
        raise _delta_error("it does not begin as one")
    length = struct.unpack("<I", lead[len(MAGIC) :])[0]
    coder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    text = coder.decompress(delta.read(min(length, MOST_HEADER_BYTES)), 2 * MOST_HEADER_BYTES)
    split = 4 + struct.unpack("<I", text[:4])[0]
    head = json.loads(text[4:split])
    if head["schema"] != SCHEMA:
        raise _delta_error(f"it has schema {head['schema']}; this version reads {SCHEMA}")
    return head, text[split:], len(lead) + length


def _words(stream: BinaryIO, tensor: TensorLocation) -> Words:
    """Return a tensor's bit patterns as unsigned little-endian integers, (N,)."""
    stream.seek(tensor.start)
    return np.frombuffer(stream.read(tensor.end - tensor.start), f"<u{_DTYPES[tensor.dtype]}")


def _layout_error(problem: str) -> ArtifactError:
    return ArtifactError(f"this is no safetensors file: {problem}", "fetch the whole file instead of a delta")


def _delta_error(problem: str) -> ArtifactError:
    return ArtifactError(f"this is no delta for this file: {problem}", "fetch the whole file instead")
