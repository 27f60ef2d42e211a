"""A small picture and a short clip, made here: what a canary shows to an agent that reads them."""

from __future__ import annotations

import io
import math
import struct
import wave
import zlib
from functools import cache

from sartor.media.content_parts import url_of

SIDE = 64
RATE, SECONDS = 16_000, 0.5


@cache
def sample(kind: str) -> str:
    """A data URL of that kind: a picture with shades from corner to corner, half a second of a rising tone."""
    return url_of(_picture(), "image/png") if kind == "image" else url_of(_clip(), "audio/wav")


def _picture() -> bytes:
    shades = [[(4 * x, 4 * y, 255 - 2 * (x + y)) for x in range(SIDE)] for y in range(SIDE)]
    rows = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in shades)
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def _clip() -> bytes:
    times = (place / RATE for place in range(int(RATE * SECONDS)))
    samples = (round(9000 * math.sin(2 * math.pi * (300 + 400 * at) * at)) for at in times)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(b"".join(struct.pack("<h", value) for value in samples))
    return file.getvalue()
