"""Audio decoding and resampling within limits.

A file of a few kilobytes can expand to gigabytes of samples. The header is therefore checked before decoding, and
samples are counted during it. A recording is decoded, mixed to mono and resampled in blocks; only the result is held
whole.
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
LEAST_RATE = 50  # Hz; below it soxr processes minutes of a recording as one piece
# Per second, over all channels: 192 kHz in stereo, 384 kHz in mono, 48 kHz in eight channels
MOST_SAMPLES_PER_S = 192_000 * 2
# Full scale is 1. A float file may use the scale of 16-bit integers, but the spectrum of samples at 1e20 overflows.
MOST_LEVEL = float(1 << 16)
BLOCK_SAMPLES = 1 << 18
_REMEDY = "give a whole WAV, FLAC, Ogg or MP3 file"
_CONVERT = "convert it: ffmpeg -i RECORDING -ar 48000 -ac 1 SMALLER.flac"
_CUT = "cut it into pieces: ffmpeg -i RECORDING -f segment -segment_time {:g} PART%03d.flac"
_UNKNOWN = 1 << 62  # libsndfile reports an unknown length as SF_COUNT_MAX, 2**63 - 1
_SPARE = 64  # samples added to an estimated length, which may be too short
_longest = {"seconds": MOST_SECONDS}

F32 = NDArray[np.float32]


def limit_seconds(seconds: float) -> None:
    """Set the default limit for the length of recordings that this process decodes."""
    _longest["seconds"] = seconds


def read_sound(content: bytes | Path, rate: int, max_seconds: float | None = None) -> F32:
    """Return a recording as mono samples, shape (samples,), at `rate`.

    Samples are the mean of the channels, with full scale -1..1. max_seconds: by default the process's limit.
    Raises MediaError (`unreadable_audio`, `audio_too_long`); ExtraError without soundfile, or without soxr if the
    recording has another rate.
    """
    longest = _longest["seconds"] if max_seconds is None else max_seconds
    with open_audio(content) as sound:
        check_length(sound, longest)
        source_rate, frames = int(sound.samplerate), 0
        mono = _Samples(math.ceil(sound.frames * rate / source_rate) + _SPARE)
        resampler = None if source_rate == rate else _Resampler(source_rate, rate)
        block_frames = max(1, min(source_rate, BLOCK_SAMPLES // int(sound.channels)))
        for block in blocks(sound, longest, block_frames, most_samples(longest)):
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
    """Return the limit for the samples of a recording, over all channels.

    max_seconds: limit for its length.
    """
    return max_seconds * MOST_SAMPLES_PER_S


def check_length(sound: Any, max_seconds: float) -> None:
    """Raise MediaError (`audio_too_long`) if the header announces more than may be decoded.

    max_seconds: limit for the length, and by MOST_SAMPLES_PER_S for the samples.
    """
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


class _Samples:
    """Growing buffer of samples, with the expected size allocated at once."""

    def __init__(self, expected: int) -> None:
        self._buffer = np.empty(expected, np.float32)
        self.size = 0

    def add(self, samples: F32) -> None:
        """Append samples, shape (samples,)."""
        end = self.size + len(samples)
        if end > len(self._buffer):
            self._buffer.resize(end + len(self._buffer) // 4, refcheck=False)
        self._buffer[self.size : end] = samples
        self.size = end

    def whole(self) -> F32:
        """Return all samples, shape (size,). Nothing can be added afterwards."""
        self._buffer.resize(self.size, refcheck=False)
        return self._buffer


class _Resampler:
    """Streaming resampler of one channel. Its output is bit-identical to soxr's for all samples at once.

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
        """Resample a block of shape (samples,); return the samples that are ready, shape (ready,)."""
        with self._typed():
            return self._stream.resample_chunk(samples)

    def last(self) -> F32:
        """Return the remaining samples, shape (rest,)."""
        with self._typed():
            return self._stream.resample_chunk(np.zeros(0, np.float32), last=True)

    @contextlib.contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError) as error:
            raise MediaError("unreadable_audio", f"{self._rates}: {error}", _REMEDY) from None


def resampled(mono: F32, source_rate: float, rate: float) -> F32:
    """Return samples of shape (samples,) at `source_rate`, resampled to `rate`.

    Raises MediaError if no sample is left; ExtraError without soxr.
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
    """Open a recording as a soundfile.SoundFile, within the limits of rate and channels.

    Any error of decoding inside the context becomes a MediaError. Raises ExtraError without soundfile.
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
            if sound.frames >= _UNKNOWN:  # seeking fails even within the first second of such a file
                raise MediaError(
                    "unreadable_audio", "its header does not say how long it is", "write it to a file, not to a pipe"
                )
            yield sound
    except (SartorError, MemoryError):
        raise
    except Exception as error:  # soundfile raises several types on broken files
        raise MediaError("unreadable_audio", decoder_message(error, file), _REMEDY) from None


def blocks(
    sound: Any, max_seconds: float, size: int = 0, max_samples: float = MOST_SECONDS * MOST_SAMPLES_PER_S
) -> Iterator[F32]:
    """Yield a recording in blocks of shape (frames, channels), at most `size` frames each.

    It stops once more than `max_seconds` have been decoded.
    size: default one second. max_samples: limit over all channels, for the header and for the decoded samples.
    Raises MediaError if there are more samples, or none; for NaN, infinities and values above MOST_LEVEL; and if the
    recording is shorter than its header says.
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
