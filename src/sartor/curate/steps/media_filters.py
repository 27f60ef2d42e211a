"""Steps images and audio: drops unusable media."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sartor.core.config import option
from sartor.core.errors import ConfigError, MediaError
from sartor.core.records import Drop, Example, drop_of
from sartor.curate.step import RowFunction
from sartor.media import audio
from sartor.media.images import SHARP_SIDE, open_picture, sharpness

# Five photographs in focus: 0.18 to 0.9. With a Gaussian blur of 2 pixels: 0.001 to 0.006; of 4 pixels: up to 0.0005.
SHARPNESS = 0.001


def media_of(example: Example, kind: str) -> Iterator[str]:
    """Yield the media paths of an Example's parts of a kind."""
    for message in example.messages + example.rejected:
        yield from (part.media for part in message.content if part.kind == kind)


@dataclass(frozen=True)
class Images:
    """Drop rows with an image that is unreadable, tiny, blurred or of an extreme shape."""

    min_side: int = option(32, "fewest pixels of the shorter side")
    max_aspect: float = option(10.0, "longer side over shorter side, at most")
    min_sharpness: float = option(
        SHARPNESS, "variance of the Laplacian over the picture's, at most 512 pixels wide; 0 lets blurred pictures be"
    )
    kind: Literal["images"] = "images"

    def __post_init__(self) -> None:
        if self.min_side < 1:
            raise ConfigError(f"min_side is {self.min_side}; it must be at least 1", "min_side: 32")
        if not self.max_aspect >= 1:
            raise ConfigError(f"max_aspect is {self.max_aspect}; it must be at least 1", "max_aspect: 10")
        if not self.min_sharpness >= 0:
            raise ConfigError(
                f"min_sharpness is {self.min_sharpness}; it must not be negative", "min_sharpness: 0.001"
            )

    def open(self, folder: Path) -> RowFunction:
        """Return the row function."""

        def apply(example: Example) -> Example | Drop:
            for name in media_of(example, "image"):
                if fault := self._fault(folder / name):
                    return drop_of(example, fault[0], f"{name[:18]}...: {fault[1]}", step=self.kind)
            return example

        return apply

    def _fault(self, file: Path) -> tuple[str, str] | None:
        try:
            picture = open_picture(file, SHARP_SIDE)
        except MediaError as error:
            return error.reason, error.problem
        short, long = sorted((picture.width, picture.height))
        if short < self.min_side:
            return "tiny_image", f"{picture.width} x {picture.height} pixels; at least {self.min_side} on each side"
        if long > self.max_aspect * short:
            return "extreme_aspect", f"{picture.width} x {picture.height} pixels; at most {self.max_aspect:g} to 1"
        if self.min_sharpness and (picture_sharpness := sharpness(picture.grey)) < self.min_sharpness:
            return "blurred_image", f"its sharpness is {picture_sharpness:.4f}; at least {self.min_sharpness:g}"
        return None


FULL_SCALE = 0.999  # a single sample there may be a true peak; clipped samples follow two others at full scale
WINDOW_S = 0.1  # window of the loudness measurement


@dataclass(frozen=True)
class AudioFacts:
    """Facts of a recording that the checks need.

    rate: samples per second.
    loudest_db: RMS of the loudest WINDOW_S, in dB relative to full scale.
    clipped_fraction: fraction of the samples that are clipped.
    """

    rate: int
    seconds: float
    loudest_db: float
    clipped_fraction: float


@dataclass(frozen=True)
class Audio:
    """Drop rows with an unusable recording, or a transcript that does not fit its length.

    A recording is unusable if it is unreadable, silent, clipped, too short, too long or of too low a sample rate.
    """

    min_rate: int = option(8000, "fewest samples a second")
    min_seconds: float = option(0.1, "shortest recording")
    max_seconds: float = option(3600.0, "longest recording; the rest of a longer one is not decoded")
    silence_db: float = option(-60.0, "silent: the loudest tenth of a second is below this, in dB of full scale")
    max_clipped: float = option(0.01, "fraction of samples at full scale that follow two others there")
    max_chars_per_s: float = option(35.0, "fastest transcript, beyond its first 20 characters; 0 does not look")
    min_chars_per_s: float = option(0.0, "slowest transcript; 0 does not look")
    transcripts: Literal["auto", "always"] = option(
        "auto", "the reply is a transcript: where a row asks nothing but one recording, or always"
    )
    kind: Literal["audio"] = "audio"

    def __post_init__(self) -> None:
        if not 0 <= self.min_seconds <= self.max_seconds:
            raise ConfigError(
                f"min_seconds {self.min_seconds:g} is above max_seconds {self.max_seconds:g}",
                f"min_seconds: {max(0.0, self.max_seconds):g}, max_seconds: {max(0.0, self.min_seconds):g}",
            )
        if not self.silence_db < 0:
            raise ConfigError(
                f"silence_db is {self.silence_db:g}; full scale is 0, so it must be below", "silence_db: -60"
            )
        if self.max_clipped < 0 or self.max_clipped > 1:
            raise ConfigError(f"max_clipped is {self.max_clipped:g}; it is a fraction, 0..1", "max_clipped: 0.01")
        if self.min_chars_per_s < 0 or self.max_chars_per_s < 0:
            raise ConfigError("characters a second are not negative", "max_chars_per_s: 35")

    def open(self, folder: Path) -> RowFunction:
        """Return the row function."""

        def apply(example: Example) -> Example | Drop:
            seconds = 0.0
            for name in media_of(example, "audio"):
                facts = self._recording_facts(folder / name)
                if isinstance(facts, tuple):
                    return drop_of(example, facts[0], f"{name[:18]}...: {facts[1]}", step=self.kind)
                seconds += facts.seconds
            prompt_parts = [part for message in example.prompt for part in message.content]
            is_only_audio = len(prompt_parts) == 1 and prompt_parts[0].kind == "audio"
            is_transcript = self.transcripts == "always" or is_only_audio
            if seconds and is_transcript and (fault := self._pace(example.reply, seconds)):
                return drop_of(example, fault[0], fault[1], step=self.kind)
            return example

        return apply

    def _recording_facts(self, file: Path) -> AudioFacts | tuple[str, str]:
        try:
            sound = listen(file, self.max_seconds)
        except MediaError as error:
            return error.reason, error.problem
        if sound.seconds > self.max_seconds:
            return "audio_too_long", f"{sound.seconds:.1f} s or more; at most {self.max_seconds:g}"
        if sound.seconds < self.min_seconds:
            return "audio_too_short", f"{sound.seconds:.3f} s; at least {self.min_seconds:g}"
        if sound.rate < self.min_rate:
            return "low_sample_rate", f"{sound.rate} samples a second; at least {self.min_rate}"
        if sound.loudest_db < self.silence_db:
            return (
                "silent_audio",
                f"its loudest tenth of a second has {sound.loudest_db:.0f} dB; at least {self.silence_db:g}",
            )
        if sound.clipped_fraction > self.max_clipped:
            return (
                "clipped_audio",
                f"{sound.clipped_fraction:.3f} of the samples are clipped; at most {self.max_clipped:g}",
            )
        return sound

    def _pace(self, reply: str, seconds: float) -> tuple[str, str] | None:
        character_count = len(reply.strip())
        if self.max_chars_per_s and character_count > 20 + self.max_chars_per_s * seconds:
            problem = (
                f"{character_count} characters in {seconds:.1f} s; at most 20 and {self.max_chars_per_s:g} a second"
            )
            return "transcript_too_long", problem
        if character_count < self.min_chars_per_s * seconds:
            return (
                "transcript_too_short",
                f"{character_count} characters in {seconds:.1f} s; at least {self.min_chars_per_s:g} a second",
            )
        return None


def listen(file: Path, max_seconds: float) -> AudioFacts:
    """Decode a recording, a second at a time and no further than `max_seconds`.

    Raises MediaError, ExtraError.
    """
    with audio.open_audio(file) as sound:
        rate = int(sound.samplerate)
        if sound.frames > max_seconds * rate:
            return AudioFacts(rate, sound.frames / rate, 0.0, 0.0)
        return _measured(sound, rate, max_seconds)


def _measured(sound: Any, rate: int, max_seconds: float) -> AudioFacts:
    # loudest = max over windows w of mean_{t in w} mean_c x[t, c]^2;  dB = 10 log10(loudest)
    # clipped: |x[t]|, |x[t-1]|, |x[t-2]| >= FULL_SCALE; `before` carries two frames over block edges
    window = max(1, round(rate * WINDOW_S))
    frames, clipped, samples, loudest, before = 0, 0, 0, 0.0, np.zeros((2, sound.channels), bool)
    for block in audio.blocks(sound, max_seconds, window * 10):
        frames, samples = frames + len(block), samples + block.size
        power = block.astype(np.float64) ** 2
        starts = np.arange(0, len(block), window)
        sums = np.add.reduceat(power.mean(1), starts)
        loudest = max(loudest, float((sums / np.minimum(window, len(block) - starts)).max()))
        full = np.concatenate([before, np.abs(block) >= FULL_SCALE])
        clipped += int((full[2:] & full[1:-1] & full[:-2]).sum())
        before = full[-2:]
    db = 10 * math.log10(loudest) if loudest > 0 else -math.inf
    return AudioFacts(rate, frames / rate, db, clipped / max(samples, 1))
