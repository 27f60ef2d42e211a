"""Pictures and recordings as bytes, whole and otherwise, and the parts of a request that hold them. No torch."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import numpy as np
import soundfile
from PIL import Image, ImageDraw


def png(shade: int = 200, side: int = 40) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (shade, shade // 2, 30)).save(file, "PNG")
    return file.getvalue()


def noise(side: int = 40) -> bytes:
    """A PNG that cannot be made small: cut in its middle, it is no picture."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def bomb(side: int = 100_000) -> bytes:
    """A PNG whose header says so many pixels, and that holds few bytes."""
    chunks = {
        b"IHDR": side.to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00",
        b"IDAT": zlib.compress(bytes(1000)),
        b"IEND": b"",
    }
    parts = [
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        for name, data in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def sound(seconds: float = 0.5, rate: int = 16_000, form: str = "WAV", pitch: float = 440.0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * pitch / rate), rate, format=form)
    return file.getvalue()


def data_url(content: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def image_part(content: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content)}}


def audio_part(content: bytes, form: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": form}}


def silence(rate: int, seconds: float, channels: int = 1, form: str = "FLAC", subtype: str | None = None) -> bytes:
    """A recording of silence: few bytes, however long it is. Made a block at a time."""
    file, left = io.BytesIO(), round(rate * seconds)
    block = np.zeros((1 << 20, channels), np.int16)
    with soundfile.SoundFile(file, "w", rate, channels, subtype, format=form) as out:
        while left:
            out.write(block[:left])
            left -= min(left, len(block))
    return file.getvalue()


class _Bits:
    """Numbers written lowest bit first, as Vorbis does."""

    def __init__(self) -> None:
        self._value = self._size = 0

    def add(self, *pairs: tuple[int, int]) -> None:
        """Each (number, bits)."""
        for number, size in pairs:
            self._value |= number << self._size
            self._size += size

    def bytes(self) -> bytes:
        return self._value.to_bytes((self._size + 7) // 8, "little")


def ogg_page(flags: int, serial: int, number: int, segments: bytes, body: bytes) -> bytes:
    """A page of an Ogg file, with its checksum."""
    head = (
        b"OggS\0"
        + bytes([flags])
        + (2432).to_bytes(8, "little")
        + serial.to_bytes(4, "little")
        + number.to_bytes(4, "little")
    )
    crc = 0
    for byte in head + bytes(4) + bytes([len(segments)]) + segments + body:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x104C11DB7 if crc & 1 << 31 else 0)) & (1 << 32) - 1
    return head + crc.to_bytes(4, "little") + bytes([len(segments)]) + segments + body


def ogg_pages(packets: list[bytes], serial: int = 1, cut: int = 255) -> list[bytes]:
    """Pages of packets, the first on a page of its own, at most `cut` segments on the others."""
    segments = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets[1:])
    pages = [ogg_page(2, serial, 0, bytes([len(packets[0])]), packets[0])]
    body, is_continued = b"".join(packets[1:]), 0
    for start in range(0, len(segments), cut):
        part = segments[start : start + cut]
        flags = is_continued | (4 if start + cut >= len(segments) else 0)
        pages.append(ogg_page(flags, serial, len(pages), part, body[: sum(part)]))
        body, is_continued = body[sum(part) :], part[-1] == 255
    return pages


def vorbis_packets(books: int, log2_entries: int) -> list[bytes]:
    """A Vorbis stream whose header says of `books` codebooks with so many entries each, in ten bytes a book."""
    identification = _Bits()
    identification.add((0, 32), (1, 8), (16_000, 32), (0, 32), (64_000, 32), (0, 32), (8, 4), (8, 4), (1, 8))
    setup, entries = _Bits(), 1 << log2_entries
    setup.add((books - 1, 8))
    for _ in range(books):
        setup.add(
            (0x564342, 24), (1, 16), (entries, 24), (1, 1), (log2_entries - 1, 5), (entries, log2_entries + 1), (0, 4)
        )
    setup.add((0, 22))  # one time
    setup.add((0, 6), (1, 16), (0, 5), (0, 2), (4, 4))  # one floor
    setup.add((0, 6), (0, 16), (0, 72), (0, 6), (0, 8), (0, 4))  # one residue
    setup.add((0, 6), (0, 16), (0, 4), (0, 24), (0, 6), (0, 1), (0, 40))  # one mapping, one mode
    setup.add((1, 1))
    heads = [b"\x01vorbis" + identification.bytes(), b"\x03vorbis" + bytes(8) + b"\x01", b"\x05vorbis" + setup.bytes()]
    return [*heads, *[bytes(2)] * 20]


RATE = 16_000


def scene(seed: int, width: int = 240, height: int = 200) -> Image.Image:
    """A picture with shapes of many sizes."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (width, height), tuple(int(value) for value in random.integers(0, 255, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, w, h = (
            random.integers(0, width),
            random.integers(0, height),
            random.integers(5, 70),
            random.integers(5, 70),
        )
        colour = tuple(int(value) for value in random.integers(0, 255, 3))
        (draw.ellipse if random.random() < 0.5 else draw.rectangle)((x, y, x + w, y + h), fill=colour)
    return image


def tone(seconds: float, loud: float = 0.5, rate: int = RATE) -> Any:
    return loud * np.sin(np.arange(int(seconds * rate)) / rate * 440 * 2 * np.pi)
