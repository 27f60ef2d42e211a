"""Recordings decoded, by one way for curation, tuning and serving: what libsndfile reads, as one channel at a given rate."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import MediaError, SartorError, need, said_of

MOST_SECONDS = 3600.0
_REMEDY = "give a whole WAV, FLAC, Ogg or MP3 file"
_UNKNOWN = 1 << 62  # libsndfile's word for a length that no header gives is SF_COUNT_MAX, 2**63 - 1

F32 = NDArray[np.float32]


def read_sound(content: bytes | Path, rate: int, max_seconds: float = MOST_SECONDS) -> F32:
    """(samples,) a recording at `rate`, -1..1, the mean of its channels.

    Raises MediaError (`unreadable_audio`, `audio_too_long`); ExtraError without soundfile, or without soxr where the
    recording has another rate.
    """
    with opened(content) as sound:
        if (seconds := sound.frames / sound.samplerate) > max_seconds:
            raise _too_long(seconds, max_seconds)
        mono = np.concatenate([block.mean(1, dtype=np.float32) for block in blocks(sound, max_seconds)])
        found = int(sound.samplerate)
        if len(mono) > max_seconds * found:
            raise _too_long(len(mono) / found, max_seconds)
    return mono if found == rate else resampled(mono, found, rate)


def _too_long(seconds: float, most: float) -> MediaError:
    return MediaError("audio_too_long", f"the recording has {seconds:.1f} s or more; at most {most:g}", "cut it into pieces")


def resampled(mono: F32, found: float, rate: float) -> F32:
    """(samples,) at `rate` from (samples,) at `found`. Raises MediaError where none is left, ExtraError without soxr."""
    try:
        import soxr
    except ImportError:
        raise need("soxr", "multimodal") from None
    try:
        made = soxr.resample(mono, found, rate)
    except (ValueError, RuntimeError) as error:
        raise MediaError("unreadable_audio", f"{found:g} samples a second cannot be made {rate:g}: {error}", _REMEDY) from None
    if not len(made):
        raise MediaError("unreadable_audio", f"it holds {len(mono)} samples at {found:g} a second: none at {rate:g}", _REMEDY)
    return np.asarray(made, np.float32)


@contextlib.contextmanager
def opened(content: bytes | Path) -> Iterator[Any]:
    """A soundfile.SoundFile. Whatever decoding raises inside is a MediaError."""
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package without its library
        raise need("soundfile") from None
    file = content if isinstance(content, Path) else None
    try:
        with soundfile.SoundFile(content if isinstance(content, Path) else io.BytesIO(content)) as sound:
            if sound.samplerate < 1:
                raise MediaError("unreadable_audio", "it has no sample rate", _REMEDY)
            if sound.frames >= _UNKNOWN:  # of which not even the first second can be read by seeking
                raise MediaError(
                    "unreadable_audio", "its header does not say how long it is", "write it to a file, not to a pipe"
                )
            yield sound
    except (SartorError, MemoryError):
        raise
    except Exception as error:  # the library raises several kinds on broken files
        raise MediaError("unreadable_audio", said_of(error, file), _REMEDY) from None


def blocks(sound: Any, max_seconds: float, size: int = 0) -> Iterator[F32]:
    """(frames, channels) the recording a block of `size` frames (a second) at a time, none after `max_seconds` are passed.

    Raises MediaError where a sample is no number, where there are none, and where it ends before its header says.
    """
    frames, size = 0, size or int(sound.samplerate)
    while frames <= max_seconds * sound.samplerate and len(block := sound.read(size, dtype="float32", always_2d=True)):
        if not np.isfinite(block).all():
            raise MediaError("unreadable_audio", "it holds samples that are no numbers", _REMEDY)
        frames += len(block)
        yield block
    if not frames:
        raise MediaError("unreadable_audio", "it holds no samples", _REMEDY)
    if frames < min(sound.frames, max_seconds * sound.samplerate):
        problem = f"it ends after {frames / sound.samplerate:.2f} of {sound.frames / sound.samplerate:.2f} s"
        raise MediaError("unreadable_audio", problem, _REMEDY)
