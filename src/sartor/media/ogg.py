"""Page and header checks of Ogg files within limits.

libvorbis reserves memory for the sizes that a setup header of a few bytes announces, a part of it on the stack. A
codebook of 2**20 entries ends the process. The layout of pages is that of RFC 3533, the layout of codebooks that of
Vorbis I, section 3.2.1. libvorbis's own encoder makes at most 6,561 entries in a codebook, and 19,413 entries with
87,952 values in a file (six channels at 44.1 kHz).
"""

from __future__ import annotations

import contextlib
import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path

from sartor.core.errors import MediaError

# libvorbis makes a table of a codebook for each of up to 64 residues: 36 MB for 2**13 entries of 13 dimensions
MOST_BOOK_ENTRIES = 1 << 13
# Totals over all codebooks of a file. Each chained stream adds its own codebooks.
MOST_ENTRIES, MOST_VALUES = 1 << 17, 1 << 20
MOST_BYTES = 1 << 17  # size of a setup header that spans several pages
_PAGE, _SETUP, _ID3 = b"OggS", b"\x05vorbis", b"ID3"
_HEAD = 27  # bytes of a page before its segment table
_IS_CONTINUED = 1  # flag of a page: its first packet began on an earlier page
_BOOK_SYNC = 0x564342
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

Bytes = bytes | mmap.mmap


def check_ogg(content: bytes | Path) -> None:
    """Raise MediaError for an incomplete Ogg file or one with too large codebooks.

    The error's reason is `unreadable_audio`. Other files pass. Raises OSError if a file cannot be read.
    """
    with _bytes_of(content) as data:
        if data[:3] == _ID3 and data.find(_PAGE + b"\0") >= 0:  # libsndfile skips the tag and reads the Ogg pages
            raise _broken(
                "an ID3 tag is not part of an Ogg file", "remove it: ffmpeg -i RECORDING -c copy UNTAGGED.ogg"
            )
        if data[:4] != _PAGE:
            return
        entries = values = 0
        for packet in _setup_packets(data):
            for size, dimensions in _codebooks(packet):
                entries, values = entries + size, values + size * dimensions
                _check_size(size, entries, values)


def _check_size(size: int, entries: int, values: int) -> None:
    for label, number, limit in (
        ("entries in a codebook", size, MOST_BOOK_ENTRIES),
        ("entries in its codebooks", entries, MOST_ENTRIES),
        ("values in its codebooks", values, MOST_VALUES),
    ):
        if number > limit:
            raise _too_large(label, number, limit)


def _too_large(label: str, number: int, limit: int) -> MediaError:
    problem = f"its Vorbis header has {number} {label} or more; at most {limit}"
    return _broken(problem, "convert it: ffmpeg -i RECORDING CONVERTED.flac")


def _broken(problem: str, remedy: str = "give a whole WAV, FLAC, Ogg or MP3 file") -> MediaError:
    return MediaError("unreadable_audio", problem, remedy)


@contextlib.contextmanager
def _bytes_of(content: bytes | Path) -> Iterator[Bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        if not file.read(1):  # an empty file cannot be mapped
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _setup_packets(data: Bytes) -> Iterator[bytes]:
    """Yield the setup headers of all logical streams.

    Raises MediaError for broken pages and for a header above MOST_BYTES that spans pages.
    """
    unfinished: dict[int, bytes] = {}  # packets by serial number
    for flags, serial, segments, body in _pages(data):
        packet = unfinished.pop(serial, b"")
        if bool(flags & _IS_CONTINUED) != bool(packet):
            raise _broken("an Ogg packet is not continued on the next page of its stream")
        is_unfinished = segments[-1:] == b"\xff"
        if not packet and not is_unfinished and _SETUP not in body:
            continue
        start = end = 0
        for size in segments:
            end += size
            if size == 255:
                continue
            if packet or body.startswith(_SETUP, start):
                packet += body[start:end]
                if packet.startswith(_SETUP):
                    yield packet
                packet = b""
            start = end
        if is_unfinished:
            packet += body[start:end]
            if packet.startswith(_SETUP) and len(packet) > MOST_BYTES:
                raise _too_large("bytes", len(packet), MOST_BYTES)
            unfinished[serial] = packet if packet.startswith(_SETUP) else packet[: len(_SETUP)]


def _pages(data: Bytes) -> Iterator[tuple[int, int, bytes, bytes]]:
    """Yield (flags, serial number, segment table, body) of each page.

    Raises MediaError for an incomplete page, a wrong checksum, and data between pages.
    """
    start = 0
    while data[start : start + 4] == _PAGE:
        head = data[start : start + _HEAD]
        segments = data[start + _HEAD : start + _HEAD + head[-1]] if len(head) == _HEAD else b""
        end = start + _HEAD + len(segments) + sum(segments)
        page = data[start:end]
        # libogg would search for the next page inside a page with a wrong checksum
        if len(head) < _HEAD or len(segments) < head[-1] or len(page) < end - start or _checksum(page) != page[22:26]:
            raise _broken(f"its Ogg page at byte {start} is not whole")
        yield head[5], int.from_bytes(head[14:18], "little"), segments, page[_HEAD + len(segments) :]
        start = end
    if data.find(_PAGE, start) >= 0:
        raise _broken(f"at byte {start} there is no Ogg page, and there are pages after it")


def _checksum(page: bytes) -> bytes:
    """Return the CRC of a page as it stores it: zlib's polynomial, bits not reflected, start value 0, not inverted."""
    bare = page[:22] + bytes(4) + page[26:]
    crc = zlib.crc32(bare.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "little").translate(_REVERSED)[::-1]


class _Bits:
    """Bit reader of a packet, lowest bits first. Raises MediaError beyond the end."""

    def __init__(self, packet: bytes, start: int) -> None:
        self._packet, self._position = packet, start * 8

    def skip(self, count: int) -> None:
        self._position += count
        if self._position > len(self._packet) * 8:
            raise _broken("its Vorbis header ends too early")

    def next(self, count: int) -> int:
        """Return a number of `count` bits, at most 32."""
        first, shift = divmod(self._position, 8)
        self.skip(count)
        return int.from_bytes(self._packet[first : first + 5], "little") >> shift & (1 << count) - 1


def _codebooks(packet: bytes) -> Iterator[tuple[int, int]]:
    """Yield (entries, dimensions) of each codebook of a setup header, before its content is read.

    Raises MediaError for an invalid codebook.
    """
    bits = _Bits(packet, len(_SETUP))
    for _ in range(bits.next(8) + 1):
        if bits.next(24) != _BOOK_SYNC:
            raise _broken("its Vorbis header holds no codebook where one is due")
        dimensions, entries = bits.next(16), bits.next(24)
        if not dimensions or not entries:
            raise _broken("its Vorbis header holds an empty codebook")
        yield entries, dimensions
        _skip_lengths(bits, entries)
        _skip_values(bits, entries, dimensions)


def _skip_lengths(bits: _Bits, entries: int) -> None:
    if bits.next(1):  # ordered: the number of entries of each codeword length
        bits.skip(5)
        remaining = entries
        for _ in range(32):
            if remaining > 0:
                remaining -= bits.next(remaining.bit_length())
        if remaining:
            raise _broken("its Vorbis header holds a codebook of other lengths than entries")
        return
    is_sparse = bits.next(1)
    for _ in range(entries):
        if not is_sparse or bits.next(1):
            bits.skip(5)


def _skip_values(bits: _Bits, entries: int, dimensions: int) -> None:
    kind = bits.next(4)
    if kind > 2:
        raise _broken(f"its Vorbis header holds a codebook with lookup {kind}; there are 0, 1 and 2")
    if not kind:
        return
    bits.skip(64)
    width = bits.next(4) + 1
    bits.skip(1)
    count = _root(entries, dimensions) if kind == 1 else entries * dimensions
    bits.skip(count * width)


def _root(number: int, degree: int) -> int:
    """Return the largest integer r with r**degree <= number."""
    root = round(number ** (1 / degree))
    while root**degree > number:
        root -= 1
    while (root + 1) ** degree <= number:
        root += 1
    return root
