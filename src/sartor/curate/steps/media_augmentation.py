"""Steps augment_images and augment_audio.

What is drawn follows from (step, seed, id of the row, number of the copy) and from nothing else, so copies are the
same bytes in whatever process and order they are made. All media of a row are drawn for alike: of two pictures that
are compared both are turned by one angle.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from sartor.core.config import option
from sartor.core.errors import ConfigError, MediaError
from sartor.core.records import Drop, Example, Message, PartKind, canonical, drop_of
from sartor.curate.sources import media_files
from sartor.curate.step import AugmentedRow, CopyFunction
from sartor.curate.steps.media_filters import media_of
from sartor.media import audio
from sartor.media.images import open_image

if TYPE_CHECKING:
    from PIL.Image import Image


MOST_COPIES = 100
T = TypeVar("T")


class AugmentedFile(NamedTuple):
    """A changed medium as a file: its bytes, its suffix, and in words what was changed."""

    content: bytes
    suffix: str
    changes: list[str]


class Changing(Protocol, Generic[T]):
    """A step as it is seen here: how its media are decoded, and how one is changed."""

    @property
    def kind(self) -> str:
        """Its name in a recipe."""
        ...

    @property
    def copies(self) -> int:
        """Further rows for each row."""
        ...

    @property
    def seed(self) -> int:
        """Of what is drawn."""
        ...

    def decoded(self, file: Path) -> T:
        """Raises MediaError."""
        ...

    def changed(self, medium: T, file: Path, draw: np.random.Generator) -> AugmentedFile:
        """The medium with changes by `draw`, whose first values do not depend on the medium. `file` is where it
        was.
        """
        ...


def copying(step: Changing[T], part: PartKind, folder: Path) -> CopyFunction:
    """The function of a CopyStep that changes the media of one kind of part."""

    def copies(example: Example) -> Iterator[AugmentedRow | Drop]:
        names = list(dict.fromkeys(media_of(example, part)))
        decoded: dict[str, T] = {}
        for number in range(1, step.copies + 1) if names else ():
            try:
                decoded = decoded or {name: step.decoded(folder / name) for name in names}
                augmented_files = {
                    name: step.changed(medium, folder / name, _draw(step.kind, step.seed, example.id, number))
                    for name, medium in decoded.items()
                }
            except MediaError as error:
                yield _failed(example, step.kind, number, error)
                continue
            row = _copy(
                example, step.kind, {name: _stored(augmented, folder) for name, augmented in augmented_files.items()}
            )
            yield AugmentedRow(row, f"copy {number}: {', '.join(augmented_files[names[0]].changes) or 'nothing'}")

    return copies


def _draw(kind: str, seed: int, row: str, number: int) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(canonical([kind, seed, row, number])).digest(), "big"))


def _stored(augmented: AugmentedFile, folder: Path) -> str:
    return media_files.copy(io.BytesIO(augmented.content), f"copy{augmented.suffix}", folder / "media")


def _copy(example: Example, kind: str, new_media: dict[str, str]) -> Example:
    """The row with other media. Its origins say what it was made from, so that revoking the row or its source reaches
    it.
    """
    return replace(
        example,
        messages=_with_media(example.messages, new_media),
        rejected=_with_media(example.rejected, new_media),
        origins=tuple(replace(origin, parents=(example.id,), step=kind) for origin in example.origins),
        steps=(*example.steps, kind),
    )


def _with_media(messages: tuple[Message, ...], new_media: dict[str, str]) -> tuple[Message, ...]:
    return tuple(
        replace(
            message,
            content=tuple(replace(part, media=new_media.get(part.media, part.media)) for part in message.content),
        )
        for message in messages
    )


def _failed(example: Example, kind: str, number: int, error: MediaError) -> Drop:
    """The Drop of one copy. It has no id: the row itself is kept under it."""
    drop = drop_of(example, f"{kind}:{error.reason}", f"copy {number} of {example.id}: {error.problem}", step=kind)
    return replace(drop, id="")


def check_copies(copies: int, *, is_idle: bool) -> None:
    """Raises ConfigError for a number of copies that cannot be, or where no change is asked for."""
    if not 1 <= copies <= MOST_COPIES:
        raise ConfigError(f"copies is {copies}; it must be from 1 to {MOST_COPIES}", "copies: 2")
    if is_idle:
        raise ConfigError(
            "every change is off, and a copy would be the row itself", "leave the options out for the defaults"
        )


def check_between(name: str, value: float, minimum: float, maximum: float, remedy: object) -> None:
    """Raises ConfigError for an option outside of its bounds."""
    if not minimum <= value <= maximum:
        raise ConfigError(f"{name} is {value:g}; it must be from {minimum:g} to {maximum:g}", f"{name}: {remedy}")


JPEG = (".jpg", ".jpeg")
JPEG_QUALITY = 95  # of a copy of a JPEG whose compression is not to be changed
JPEG_SIDE = 65_500  # pixels; the format knows no longer side


@dataclass(frozen=True)
class Light:
    """How far brightness, contrast and colour go from what they are: 0.2 is a factor of 0.8 to 1.2."""

    brightness: float = option(0.2, "of the brightness, at most 0.9")
    contrast: float = option(0.2, "of the contrast, at most 0.9")
    colour: float = option(0.1, "of the colour, from grey to gaudy, at most 1")

    def __post_init__(self) -> None:
        for name, maximum in (("brightness", 0.9), ("contrast", 0.9), ("colour", 1.0)):
            check_between(name, getattr(self, name), 0, maximum, 0.2)


@dataclass(frozen=True)
class AugmentImages:
    """Add copies of each training row that has pictures, with the pictures changed at random and the reply kept.

    No copy is made of a held-out row. A change must not make the reply untrue: flips are off, since they mirror
    writing and turn left into right; leave `colour` at 0 where the answer is a colour, and `crop` at 1 where what is
    asked for may lie at the rim. A copy is an RGB picture, upright, of the first frame: JPEG where the picture was one
    or `jpeg_quality` asks, else PNG.
    """

    copies: int = option(2, "further rows for each row, 1 to 100")
    flip: tuple[Literal["horizontal", "vertical"], ...] = option(
        (), "mirror half of the copies: horizontal, vertical or both"
    )
    rotation_degrees: float = option(
        5.0, "turned by up to this either way, 0 to 180; what is then seen of the rim is mirrored"
    )
    crop: float = option(0.9, "smallest fraction of the area that is left, of the same shape, 0.1 to 1")
    light: Light = option(Light(), "factors of brightness, contrast and colour")
    blur: float = option(0.0, "largest radius of a Gaussian blur, in thousandths of the longer side, 0 to 20")
    noise: float = option(0.0, "largest standard deviation of Gaussian noise, in grey levels of 255, 0 to 64")
    jpeg_quality: int = option(
        0, "lowest quality of JPEG, 5 to 95, drawn from there to 95; 0 leaves the compression alone"
    )
    rehearsal: bool = option(False, "copy rows of rehearsal sources too")
    seed: int = option(0, "of what is drawn")
    kind: Literal["augment_images"] = "augment_images"

    def __post_init__(self) -> None:
        check_between("rotation_degrees", self.rotation_degrees, 0, 180, 5)
        check_between("crop", self.crop, 0.1, 1, 0.9)
        check_between("blur", self.blur, 0, 20, 2)
        check_between("noise", self.noise, 0, 64, 8)
        if self.jpeg_quality and not 5 <= self.jpeg_quality <= 95:
            raise ConfigError(
                f"jpeg_quality is {self.jpeg_quality}; it must be 0, or from 5 to 95", "jpeg_quality: 40"
            )
        light = self.light.brightness or self.light.contrast or self.light.colour
        changes = (self.flip, self.rotation_degrees, self.crop < 1, light, self.blur, self.noise, self.jpeg_quality)
        check_copies(self.copies, is_idle=not any(changes))

    def open(self, folder: Path) -> CopyFunction:
        """See CopyStep."""
        return copying(self, "image", folder)

    def decoded(self, file: Path) -> Image:
        """Raises MediaError, or ExtraError without Pillow."""
        return open_image(file)

    def changed(self, medium: Image, file: Path, draw: np.random.Generator) -> AugmentedFile:
        """The picture changed: its place first, then its light, then what a lens, a sensor and a file add."""
        changes: list[str] = []
        picture = self._placed(medium, draw, changes)
        picture = self._lit(picture, draw, changes)
        quality = int(draw.integers(self.jpeg_quality, 96)) if self.jpeg_quality else 0
        picture = self._degraded(picture, draw, changes)
        is_jpeg = (bool(quality) or file.suffix in JPEG) and max(picture.size) <= JPEG_SIDE
        if quality and is_jpeg:
            changes.append(f"JPEG of quality {quality}")
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=quality or JPEG_QUALITY) if is_jpeg else picture.save(out, "PNG")
        return AugmentedFile(out.getvalue(), ".jpg" if is_jpeg else ".png", changes)

    def _placed(self, picture: Image, draw: np.random.Generator, changes: list[str]) -> Image:
        from PIL import Image

        for name, turn in (("horizontal", "FLIP_LEFT_RIGHT"), ("vertical", "FLIP_TOP_BOTTOM")):
            if name in self.flip and draw.random() < 0.5:
                picture = picture.transpose(Image.Transpose[turn])
                changes.append(f"flipped {name}ly")
        if self.rotation_degrees:
            angle = draw.uniform(-self.rotation_degrees, self.rotation_degrees)
            picture = rotated(picture, angle)
            changes.append(f"rotated by {angle:.1f} degrees")
        if self.crop < 1:
            area, across, down = draw.uniform(self.crop, 1), draw.random(), draw.random()
            picture = cropped(picture, area, across, down)
            changes.append(f"cropped to {area:.3f} of its area")
        return picture

    def _lit(self, picture: Image, draw: np.random.Generator, changes: list[str]) -> Image:
        from PIL import ImageEnhance

        for name, enhance in (("brightness", "Brightness"), ("contrast", "Contrast"), ("colour", "Color")):
            if maximum := getattr(self.light, name):
                factor = draw.uniform(1 - maximum, 1 + maximum)
                picture = getattr(ImageEnhance, enhance)(picture).enhance(factor)
                changes.append(f"{name} times {factor:.3f}")
        return picture

    def _degraded(self, picture: Image, draw: np.random.Generator, changes: list[str]) -> Image:
        from PIL import Image, ImageFilter

        if self.blur:
            radius = draw.uniform(0, self.blur)
            picture = picture.filter(ImageFilter.GaussianBlur(radius / 1000 * max(picture.size)))
            changes.append(f"blurred by {radius:.2f} thousandths")
        if self.noise:
            spread = draw.uniform(0, self.noise)
            grains = draw.standard_normal((picture.height, picture.width, 3), np.float32) * np.float32(spread)
            picture = Image.fromarray((np.asarray(picture) + grains).clip(0, 255).round().astype(np.uint8))
            changes.append(f"noise of {spread:.1f} levels")
        return picture


def rotated(picture: Image, angle: float) -> Image:
    """The picture turned by degrees counter-clockwise, of the same size; beyond its rim it is taken to be mirrored.

    Corners of one colour would be edges that no such picture has, and a model may well learn to look for those.
    """
    from PIL import Image

    width, height = picture.size
    sine, cosine = abs(math.sin(math.radians(angle))), abs(math.cos(math.radians(angle)))
    across = math.ceil(max(0.0, width * cosine + height * sine - width) / 2) + 2
    down = math.ceil(max(0.0, width * sine + height * cosine - height) / 2) + 2
    wide = np.pad(np.asarray(picture), ((down, down), (across, across), (0, 0)), mode="symmetric")
    turned = Image.fromarray(wide).rotate(angle, Image.Resampling.BICUBIC)
    return turned.crop((across, down, across + width, down + height))


def cropped(picture: Image, area: float, across: float, down: float) -> Image:
    """A piece of the picture in its shape. area: its fraction. across, down: 0..1, where in the room that is left it
    lies.
    """
    width, height = (max(1, round(length * math.sqrt(area))) for length in picture.size)
    left, top = round(across * (picture.width - width)), round(down * (picture.height - height))
    return picture.crop((left, top, left + width, top + height))


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

    No copy is made of a held-out row. Speed goes with pitch, as of a tape (Ko et al. 2015). `time_mask_s` silences a
    piece (Park et al. 2019): leave it at 0 where the reply says again what was heard. A copy is FLAC, one channel of
    16 bits, at the rate of the recording (96,000 at most); one that would be clipped is turned down.
    """

    copies: int = option(2, "further rows for each row, 1 to 100")
    speed: float = option(0.1, "faster or slower by up to this fraction, 0 to 0.5: 0.1 is a speed of 0.9 to 1.1")
    gain_db: float = option(6.0, "louder or quieter by up to this, 0 to 40")
    noise_db: float = option(
        0.0, "white noise: the lowest ratio of signal to noise, 5 to 40, drawn from there to 40; 0 adds none"
    )
    shift_s: float = option(0.1, "longest silence put before the recording, in seconds, 0 to 10")
    telephone: float = option(0.0, "fraction of the copies that go through 8,000 samples a second and back, 0 to 1")
    time_mask_s: float = option(
        0.0, "longest piece that is silenced, in seconds, 0 to 10, and never over a tenth of it all"
    )
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
        for name, (maximum, default) in bounds.items():
            check_between(name, getattr(self, name), 0, maximum, default)
        if self.noise_db and not 5 <= self.noise_db <= QUIETEST_NOISE_DB:
            raise ConfigError(f"noise_db is {self.noise_db:g}; it must be 0, or from 5 to 40", "noise_db: 15")
        check_copies(self.copies, is_idle=not any([self.noise_db, *(getattr(self, name) for name in bounds)]))

    def open(self, folder: Path) -> CopyFunction:
        """See CopyStep."""
        return copying(self, "audio", folder)

    def decoded(self, file: Path) -> Recording:
        """Raises MediaError, or ExtraError without soundfile or soxr."""
        with audio.open_audio(file) as sound:
            rate = min(int(sound.samplerate), MOST_RATE)
        max_seconds = min(audio.MOST_SECONDS, MOST_SAMPLES / rate)
        return Recording(audio.read_sound(file, rate, max_seconds), rate)

    def changed(self, medium: Recording, file: Path, draw: np.random.Generator) -> AugmentedFile:
        """The recording changed: its time first, then its band, what is added, and how loud it is."""
        mono, rate = medium
        changes: list[str] = []
        mono = self._timed(mono, rate, draw, changes)
        if self.telephone and draw.random() < self.telephone and rate > TELEPHONE:
            mono = fitted(audio.resampled(audio.resampled(mono, rate, TELEPHONE), TELEPHONE, rate), len(mono))
            changes.append(f"through {TELEPHONE:,} samples a second")
        mono = self._loud(mono, draw, changes)
        return AugmentedFile(flac(mono, rate), ".flac", changes)

    def _timed(self, mono: audio.F32, rate: int, draw: np.random.Generator, changes: list[str]) -> audio.F32:
        if self.speed:
            factor = draw.uniform(1 - self.speed, 1 + self.speed)
            mono = audio.resampled(mono, rate * factor, rate)
            changes.append(f"speed times {factor:.3f}")
        if self.time_mask_s:
            length, start_fraction = draw.uniform(0, self.time_mask_s), draw.random()
            masked = min(round(length * rate), len(mono) // 10)
            start = round(start_fraction * (len(mono) - masked))
            mono = mono.copy()
            mono[start : start + masked] = 0
            changes.append(f"{masked / rate:.3f} s silenced from {start / rate:.3f} s on")
        if self.shift_s:
            delay_s = draw.uniform(0, self.shift_s)
            mono = np.concatenate([np.zeros(round(delay_s * rate), np.float32), mono])
            changes.append(f"{delay_s:.3f} s of silence before")
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
