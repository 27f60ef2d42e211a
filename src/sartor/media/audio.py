"""Decodes and resamples audio within limits.

A file of a few kilobytes can stand for gigabytes of samples. So what a header says is checked before anything is
decoded, what comes is counted while it is, and a recording is decoded, mixed and resampled a block at a time: the
result alone is held whole.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import MediaError, SartorError, decoder_message, missing_package
from sartor.media.ogg import check_ogg

MOST_SECONDS = 3600.0
MOST_RATE, MOST_CHANNELS = 384_000, 8
LEAST_RATE = 50  # below it soxr makes all of a recording of minutes in one piece
# Of a second, over all channels: 192 kHz in stereo, 384 kHz in mono, 48 kHz in eight channels
MOST_SAMPLES_PER_S = 192_000 * 2
# Full scale is 1. A float file may be written at the scale of 16-bit integers; the spectrum of samples at 1e20
# overflows.
MOST_LEVEL = float(1 << 16)
BLOCK_SAMPLES = 1 << 18
_REMEDY = "give a whole WAV, FLAC, Ogg or MP3 file"
_CONVERT = "convert it: ffmpeg -i RECORDING -ar 48000 -ac 1 SMALLER.flac"
_CUT = "cut it into pieces: ffmpeg -i RECORDING -f segment -segment_time {:g} PART%03d.flac"
_UNKNOWN = 1 << 62  # libsndfile's word for a length that no header gives is SF_COUNT_MAX, 2**63 - 1
_SPARE = 64  # samples by which the length that was reckoned may be short
_longest = {"seconds": MOST_SECONDS}

F32 = NDArray[np.float32]


def limit_seconds(seconds: float) -> None:
    """Set the longest recording that this process decodes where `read_sound` is given no other limit."""
    _longest["seconds"] = seconds


def read_sound(content: bytes | Path, rate: int, max_seconds: float | None = None) -> F32:
    """(samples,) a recording at `rate`, -1..1, the mean of its channels. max_seconds: by default the process's limit.

    Raises MediaError (`unreadable_audio`, `audio_too_long`); ExtraError without soundfile, or without soxr where the
    recording has another rate.
    """
    longest = _longest["seconds"] if max_seconds is None else max_seconds
    with open_audio(content) as sound:
        check_length(sound, longest)
        source_rate, frames = int(sound.samplerate), 0
        mono = _Samples(math.ceil(sound.frames * rate / source_rate) + _SPARE)
        resampler = None if source_rate == rate else _Resampler(source_rate, rate)
        for block in blocks(sound, longest, _block_frames(sound), most_samples(longest)):
            frames += len(block)
            mixed = block.mean(1, dtype=np.float32)
            mono.add(mixed if resampler is None else resampler.next(mixed))
        if frames > longest * source_rate:
            raise _too_long(frames / source_rate, longest)
        if resampler is not None:
            mono.add(resampler.last())
            _check_any(mono.size, frames, source_rate, rate)
    return mono.whole()


def most_samples(max_seconds: float) -> float:
    """How many samples, over all channels, a recording of at most so many seconds may hold."""
    return max_seconds * MOST_SAMPLES_PER_S


def check_length(sound: Any, max_seconds: float) -> None:
    """Raise MediaError (`audio_too_long`) where the header says of more than may be decoded."""
    if (seconds := sound.frames / sound.samplerate) > max_seconds:
        raise _too_long(seconds, max_seconds)
    if (samples := sound.frames * sound.channels) > most_samples(max_seconds):
        raise _too_large(samples, sound.channels, most_samples(max_seconds))


def _too_long(seconds: float, limit: float) -> MediaError:
    problem = f"the recording has {seconds:.1f} s or more; at most {limit:g}"
    return MediaError("audio_too_long", problem, _CUT.format(limit))


def _too_large(samples: int, channels: int, limit: float) -> MediaError:
    problem = f"the recording has {samples} samples or more in {channels} channels; at most {limit:.0f}"
    return MediaError("audio_too_long", problem, _CONVERT)


def _check_any(count: int, samples: int, source_rate: float, rate: float) -> None:
    if not count:
        problem = f"it holds {samples} samples at {source_rate:g} a second: none at {rate:g}"
        raise MediaError("unreadable_audio", problem, _REMEDY)


def _block_frames(sound: Any) -> int:
    return max(1, min(int(sound.samplerate), BLOCK_SAMPLES // int(sound.channels)))


class _Samples:
    """Samples put one after the other, in one buffer of the expected size, which grows if more come."""

    def __init__(self, expected: int) -> None:
        self._buffer = np.empty(expected, np.float32)
        self.size = 0

    def add(self, samples: F32) -> None:
        """Append."""
        end = self.size + len(samples)
        if end > len(self._buffer):
            self._buffer.resize(end + len(self._buffer) // 4, refcheck=False)
        self._buffer[self.size : end] = samples
        self.size = end

    def whole(self) -> F32:
        """All of them. Nothing can be added afterwards."""
        self._buffer.resize(self.size, refcheck=False)
        return self._buffer


class _Resampler:
    """One channel at another rate, a block at a time: bit for bit what soxr makes of all samples at once.

    Raises MediaError, and ExtraError without soxr.
    """

    def __init__(self, source_rate: float, rate: float) -> None:
        try:
            import soxr
        except ImportError:
            raise missing_package("soxr", "multimodal") from None
        self._rates = f"{source_rate:g} samples a second cannot be made {rate:g}"
        with self._typed():
            self._stream = soxr.ResampleStream(source_rate, rate, 1, dtype="float32")

    def next(self, samples: F32) -> F32:
        """What is ready after these."""
        with self._typed():
            return self._stream.resample_chunk(samples)

    def last(self) -> F32:
        """What is left."""
        with self._typed():
            return self._stream.resample_chunk(np.zeros(0, np.float32), last=True)

    @contextlib.contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError) as error:
            raise MediaError("unreadable_audio", f"{self._rates}: {error}", _REMEDY) from None


def resampled(mono: F32, source_rate: float, rate: float) -> F32:
    """(samples,) at `rate` from (samples,) at `source_rate`. Raises MediaError where none is left, ExtraError without
    soxr.
    """
    resampler = _Resampler(source_rate, rate)
    result = _Samples(math.ceil(len(mono) * rate / source_rate) + _SPARE)
    for start in range(0, len(mono), BLOCK_SAMPLES):
        result.add(resampler.next(mono[start : start + BLOCK_SAMPLES]))
    result.add(resampler.last())
    _check_any(result.size, len(mono), source_rate, rate)
    return result.whole()


@contextlib.contextmanager
def open_audio(content: bytes | Path) -> Iterator[Any]:
    """A soundfile.SoundFile within the limits of rate and channels. Whatever decoding raises inside is a
    MediaError.
    """
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: the package without its library
        raise missing_package("soundfile") from None
    file = content if isinstance(content, Path) else None
    try:
        check_ogg(content)
        with soundfile.SoundFile(content if isinstance(content, Path) else io.BytesIO(content)) as sound:
            if sound.samplerate < 1:
                raise MediaError("unreadable_audio", "it has no sample rate", _REMEDY)
            if sound.samplerate < LEAST_RATE:
                problem = f"it has {sound.samplerate} samples a second; at least {LEAST_RATE}"
                raise MediaError("unreadable_audio", problem, _CONVERT)
            if sound.samplerate > MOST_RATE:
                problem = f"it has {sound.samplerate} samples a second; at most {MOST_RATE}"
                raise MediaError("unreadable_audio", problem, _CONVERT)
            if sound.channels > MOST_CHANNELS:
                problem = f"it has {sound.channels} channels; at most {MOST_CHANNELS}"
                raise MediaError("unreadable_audio", problem, _CONVERT)
            if sound.frames >= _UNKNOWN:  # of which not even the first second can be read by seeking
                raise MediaError(
                    "unreadable_audio", "its header does not say how long it is", "write it to a file, not to a pipe"
                )
            yield sound
    except (SartorError, MemoryError):
        raise
    except Exception as error:  # the library raises several kinds on broken files
        raise MediaError("unreadable_audio", decoder_message(error, file), _REMEDY) from None


def blocks(
    sound: Any, max_seconds: float, size: int = 0, max_samples: float = MOST_SECONDS * MOST_SAMPLES_PER_S
) -> Iterator[F32]:
    """(frames, channels) the recording a block of `size` frames (a second) at a time, none after `max_seconds` are
    passed.

    max_samples: over all channels, of what is decoded, whatever the header says. Raises MediaError where there are
    more, where a sample is no number or above MOST_LEVEL, where there are none, and where it ends before its header
    says.
    """
    if (samples := sound.frames * sound.channels) > max_samples:
        raise _too_large(samples, sound.channels, max_samples)
    frames, size = 0, size or int(sound.samplerate)
    while frames <= max_seconds * sound.samplerate and len(block := sound.read(size, dtype="float32", always_2d=True)):
        frames += len(block)
        if (samples := frames * sound.channels) > max_samples:
            raise _too_large(samples, sound.channels, max_samples)
        if not np.isfinite(block).all():
            raise MediaError("unreadable_audio", "it holds samples that are no numbers", _REMEDY)
        if (level := max(block.max(), -block.min())) > MOST_LEVEL:
            problem = f"it holds a sample of {level:.3g} where full scale is 1; at most {MOST_LEVEL:g}"
            raise MediaError("unreadable_audio", problem, "write it as 16-bit integers, or scale it to -1..1")
        yield block
    if not frames:
        raise MediaError("unreadable_audio", "it holds no samples", _REMEDY)
    if frames < min(sound.frames, max_seconds * sound.samplerate):
        problem = f"it ends after {frames / sound.samplerate:.2f} of {sound.frames / sound.samplerate:.2f} s"
        raise MediaError("unreadable_audio", problem, _REMEDY)
