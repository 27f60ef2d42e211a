"""Encoding of samples as WAV, FLAC, MP3, Opus or raw PCM."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from sartor.core.errors import ConfigError, missing_package

if TYPE_CHECKING:
    from numpy.typing import NDArray

FULL = 32768.0


@dataclass(frozen=True)
class Format:
    """Audio file format.

    container, subtype: names in libsndfile; "" for raw PCM.
    rate: sample rate that the format requires, in Hz; 0 for any.
    """

    name: str
    media_type: str
    container: str = ""
    subtype: str = ""
    rate: int = 0


# pcm is the raw format of OpenAI's service: 16 bits, little-endian, without a header. Opus does not support 22,050 Hz,
# the rate of most voices.
FORMATS = {
    form.name: form
    for form in (
        Format("wav", "audio/wav", container="WAV", subtype="PCM_16"),
        Format("flac", "audio/flac", container="FLAC", subtype="PCM_16"),
        Format("mp3", "audio/mpeg", container="MP3", subtype="MPEG_LAYER_III"),
        Format("opus", "audio/ogg", container="OGG", subtype="OPUS", rate=24_000),
        Format("pcm", "audio/pcm", rate=24_000),
    )
}
# File name extension -> format
ENDINGS = {".wav": "wav", ".flac": "flac", ".mp3": "mp3", ".opus": "opus", ".ogg": "opus"}


@dataclass(frozen=True)
class AudioClip:
    """Clip of one channel of 16-bit samples.

    samples: (N,) int16. rate: samples per second.
    """

    samples: NDArray[np.int16]
    rate: int

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return len(self.samples) / self.rate

    @property
    def rms(self) -> float:
        """Root mean square of the samples, 0..1."""
        return float(np.sqrt(np.mean(np.square(self.samples / FULL)))) if len(self.samples) else 0.0

    def at(self, rate: int) -> AudioClip:
        """Return the clip at another sample rate. Raises ExtraError if soxr is missing."""
        if rate == self.rate:
            return self
        try:
            import soxr
        except ImportError:
            raise missing_package("soxr", "multimodal") from None
        return AudioClip(soxr.resample(self.samples, self.rate, rate), rate)

    def encoded(self, form: str) -> bytes:
        """Encode the clip as a file of one of FORMATS.

        Raises ConfigError if libsndfile cannot write the format here; ExtraError if soxr is missing.
        """
        file_format = FORMATS[form]
        sound = self.at(file_format.rate or self.rate)
        if not file_format.container:
            return sound.samples.astype("<i2").tobytes()
        buffer = io.BytesIO()
        file_options: Any = {"format": file_format.container, "subtype": file_format.subtype}
        try:
            # Close the file while the buffer exists: libsndfile writes the end of a file on close or destruction
            with soundfile.SoundFile(buffer, "w", sound.rate, 1, **file_options) as file:
                file.write(sound.samples)
        except (soundfile.LibsndfileError, ValueError) as error:
            remedy = "wav can; or install a newer soundfile"
            raise ConfigError(f"{file_format.name} cannot be written here: {error}", remedy) from None
        return buffer.getvalue()


def join_clips(sounds: Sequence[AudioClip]) -> AudioClip:
    """Concatenate clips of one sample rate."""
    return AudioClip(np.concatenate([sound.samples for sound in sounds]), sounds[0].rate)


def read_wav(data: bytes, head_bytes: int = 44) -> AudioClip:
    """Read a WAV file as espeak-ng streams it: 16 bits, one channel. The length in its header is ignored.

    head_bytes: size of the header.
    """
    rate = int.from_bytes(data[24:28], "little")
    whole = len(data) - (len(data) - head_bytes) % 2
    return AudioClip(np.frombuffer(data[head_bytes:whole], dtype="<i2").astype(np.int16), rate)
