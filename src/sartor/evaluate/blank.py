"""Media that say nothing, in place of a row's own: a grey picture of the same size, silence of about the same length.

They go the way of every picture and recording, so that they are the same thing to a base with towers and to one that reads
media by itself.
"""

from __future__ import annotations

import base64
import io
import math
import wave
from dataclasses import replace
from functools import cache
from pathlib import Path

from PIL import Image

from sartor.core.records import Example, Part
from sartor.media import audio, images
from sartor.models.media_tokens import content_of

GREY = 127
RATE = 16_000


def blanked(example: Example, kind: str, folder: Path) -> Example:
    """The row with each of its media of a kind blank. Raises MediaError for one whose size cannot be told."""
    turns = [
        replace(turn, content=tuple(_blank(part, folder) if part.kind == kind else part for part in turn.content))
        for turn in example.messages
    ]
    return replace(example, messages=tuple(turns))


def _blank(part: Part, folder: Path) -> Part:
    content = content_of(part, folder)
    if part.kind == "image":
        with images.opened(content) as image:
            return Part("image", media=_grey(image.size))
    with audio.opened(content) as sound:
        audio.check_length(sound, audio.MOST_SECONDS)
        # whole seconds, so that few silences stand for many recordings and each is heard once
        return Part("audio", media=_silence(max(1, math.ceil(sound.frames / sound.samplerate))))


@cache
def _grey(size: tuple[int, int]) -> str:
    """A PNG as a data URL."""
    written = io.BytesIO()
    Image.new("L", size, GREY).save(written, "PNG")
    return _url("image/png", written)


@cache
def _silence(seconds: int) -> str:
    """A WAV as a data URL."""
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(bytes(2 * RATE * seconds))
    return _url("audio/wav", written)


def _url(kind: str, written: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(written.getvalue()).decode()}"
