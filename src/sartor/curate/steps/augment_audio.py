"""`augment_audio`: further training rows whose recordings are faster, louder, noisier or of a telephone, the reply kept."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.curate.steps.augment import Written, check_between, check_copies, copying
from sartor.curate.steps.contract import CopyFunction
from sartor.media import audio

TELEPHONE = 8000  # samples a second
MOST_RATE = 96_000  # of a copy: FLAC knows none above 655,350
MOST_SAMPLES = 3600 * 16_000  # of a recording that is changed: it is held whole, several times over
QUIETEST_NOISE_DB = 40.0
LOUDEST = 0.999  # of full scale: above it is clipped


class Recording(NamedTuple):
    """(samples,) the mean of a recording's channels at its own rate."""

    mono: audio.F32
    rate: int


@dataclass(frozen=True)
class AugmentAudio:
    """Add copies of each training row that has recordings, with the recordings changed at random and the reply kept.

    No copy is made of a held-out row. Speed goes with pitch, as of a tape (Ko et al. 2015). `time_mask_s` silences a piece
    (Park et al. 2019): leave it at 0 where the reply says again what was heard. A copy is FLAC, one channel of 16 bits, at the
    rate of the recording (96,000 at most); one that would be clipped is turned down.
    """

    copies: int = option(2, "further rows for each row, 1 to 100")
    speed: float = option(0.1, "faster or slower by up to this fraction, 0 to 0.5: 0.1 is a speed of 0.9 to 1.1")
    gain_db: float = option(6.0, "louder or quieter by up to this, 0 to 40")
    noise_db: float = option(
        0.0, "white noise: the lowest ratio of signal to noise, 5 to 40, drawn from there to 40; 0 adds none"
    )
    shift_s: float = option(0.1, "longest silence put before the recording, in seconds, 0 to 10")
    telephone: float = option(0.0, "fraction of the copies that go through 8,000 samples a second and back, 0 to 1")
    time_mask_s: float = option(0.0, "longest piece that is silenced, in seconds, 0 to 10, and never over a tenth of it all")
    rehearsal: bool = option(False, "copy rows of rehearsal sources too")
    seed: int = option(0, "of what is drawn")
    kind: Literal["augment_audio"] = "augment_audio"

    def __post_init__(self) -> None:
        bounds = {
            "speed": (0.5, 0.1),
            "gain_db": (40, 6),
            "shift_s": (10, 0.1),
            "telephone": (1, 0.5),
            "time_mask_s": (10, 0.2),
        }
        for name, (most, usual) in bounds.items():
            check_between(name, getattr(self, name), 0, most, usual)
        if self.noise_db and not 5 <= self.noise_db <= QUIETEST_NOISE_DB:
            raise ConfigError(f"noise_db is {self.noise_db:g}; it must be 0, or from 5 to 40", "noise_db: 15")
        check_copies(self.copies, is_idle=not any([self.noise_db, *(getattr(self, name) for name in bounds)]))

    def open(self, folder: Path) -> CopyFunction:
        """See CopyStep."""
        return copying(self, "audio", folder)

    def decoded(self, file: Path) -> Recording:
        """Raises MediaError, or ExtraError without soundfile or soxr."""
        with audio.opened(file) as sound:
            rate = min(int(sound.samplerate), MOST_RATE)
        max_seconds = min(audio.MOST_SECONDS, MOST_SAMPLES / rate)
        return Recording(audio.read_sound(file, rate, max_seconds), rate)

    def changed(self, medium: Recording, file: Path, draw: np.random.Generator) -> Written:
        """The recording changed: its time first, then its band, what is added, and how loud it is."""
        mono, rate = medium
        changes: list[str] = []
        mono = self._timed(mono, rate, draw, changes)
        if self.telephone and draw.random() < self.telephone and rate > TELEPHONE:
            mono = fitted(audio.resampled(audio.resampled(mono, rate, TELEPHONE), TELEPHONE, rate), len(mono))
            changes.append(f"through {TELEPHONE:,} samples a second")
        mono = self._loud(mono, draw, changes)
        return Written(flac(mono, rate), ".flac", changes)

    def _timed(self, mono: audio.F32, rate: int, draw: np.random.Generator, changes: list[str]) -> audio.F32:
        if self.speed:
            factor = draw.uniform(1 - self.speed, 1 + self.speed)
            mono = audio.resampled(mono, rate * factor, rate)
            changes.append(f"speed times {factor:.3f}")
        if self.time_mask_s:
            length, place = draw.uniform(0, self.time_mask_s), draw.random()
            masked = min(round(length * rate), len(mono) // 10)
            start = round(place * (len(mono) - masked))
            mono = mono.copy()
            mono[start : start + masked] = 0
            changes.append(f"{masked / rate:.3f} s silenced from {start / rate:.3f} s on")
        if self.shift_s:
            late = draw.uniform(0, self.shift_s)
            mono = np.concatenate([np.zeros(round(late * rate), np.float32), mono])
            changes.append(f"{late:.3f} s of silence before")
        return mono

    def _loud(self, mono: audio.F32, draw: np.random.Generator, changes: list[str]) -> audio.F32:
        if self.gain_db:
            gain = draw.uniform(-self.gain_db, self.gain_db)
            mono = mono * np.float32(10 ** (gain / 20))
            changes.append(f"{gain:+.1f} dB")
        if self.noise_db:
            ratio = draw.uniform(self.noise_db, QUIETEST_NOISE_DB)
            power = float(np.mean(np.square(mono, dtype=np.float64)))
            spread = np.float32((power / 10 ** (ratio / 10)) ** 0.5)
            mono = mono + spread * draw.standard_normal(len(mono), np.float32)
            changes.append(f"noise at {ratio:.1f} dB")
        peak = float(np.abs(mono).max())
        return mono * np.float32(LOUDEST / peak) if peak > LOUDEST else mono


def fitted(mono: audio.F32, samples: int) -> audio.F32:
    """Cut, or with silence at its end, so long as it was before it was resampled."""
    return np.pad(mono[:samples], (0, max(0, samples - len(mono))))


def flac(mono: audio.F32, rate: int) -> bytes:
    """(samples,) -1..1 as a file of 16 bits."""
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, mono, rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()
