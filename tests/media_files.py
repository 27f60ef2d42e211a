"""Pictures and recordings as bytes, whole and otherwise, and the parts of a request that hold them. No torch."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import numpy as np
import soundfile
from PIL import Image


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
    chunks = {b"IHDR": side.to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00", b"IDAT": zlib.compress(bytes(1000)), b"IEND": b""}
    parts = [
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in chunks.items()
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
