"""Steps augment_images and augment_audio.

Random draws depend only on (step, seed, id of the row, number of the copy). Copies therefore have the same bytes in
any process and any order. All media of a row get the same draws: two images that are compared are rotated by the same
angle.
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
    """Changed medium as a file.

    content: bytes of the file.
    suffix: its extension.
    changes: descriptions of the changes.
    """

    content: bytes
    suffix: str
    changes: list[str]


class Changing(Protocol, Generic[T]):
    """Step as this module sees it: decoding of its media, and their random changes."""

    @property
    def kind(self) -> str:
        """Name in a recipe."""
        ...

    @property
    def copies(self) -> int:
        """Number of copies for each row."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the random draws."""
        ...

    def decoded(self, file: Path) -> T:
        """Decode a media file.

        Raises MediaError.
        """
        ...

    def changed(self, medium: T, file: Path, draw: np.random.Generator) -> AugmentedFile:
        """Return the medium with random changes.

        file: file that the medium was read from.
        draw: generator; its first values do not depend on the medium.
        """
        ...


def copying(step: Changing[T], part: PartKind, folder: Path) -> CopyFunction:
    """Return the function of an AugmentStep that changes the media of one kind of part."""

    def copies(example: Example) -> Iterator[AugmentedRow | Drop]:
        names = list(dict.fromkeys(media_of(example, part)))
        if not names:
            return
        decoded: dict[str, T] = {}
        for number in range(1, step.copies + 1):
            key = canonical([step.kind, step.seed, example.id, number])
            random_seed = int.from_bytes(hashlib.sha256(key).digest(), "big")
            augmented_files = {}
            try:
                decoded = decoded or {name: step.decoded(folder / name) for name in names}
                for name, medium in decoded.items():
                    augmented_files[name] = step.changed(medium, folder / name, np.random.default_rng(random_seed))
            except MediaError as error:
                problem = f"copy {number} of {example.id}: {error.problem}"
                drop = drop_of(example, f"{step.kind}:{error.reason}", problem, step=step.kind)
                # the Drop of a copy has no id, since the row itself stays under that id
                yield replace(drop, id="")
                continue
            new_media = {}
            for name, augmented in augmented_files.items():
                content = io.BytesIO(augmented.content)
                new_media[name] = media_files.copy(content, f"copy{augmented.suffix}", folder / "media")
            changes = ", ".join(augmented_files[names[0]].changes) or "nothing"
            yield AugmentedRow(_copy(example, step.kind, new_media), f"copy {number}: {changes}")

    return copies


def _copy(example: Example, kind: str, new_media: dict[str, str]) -> Example:
    """Return the row with other media.

    Its origins name the row as parent, so that a revocation of the row or its source reaches the copy.
    """
    return replace(
        example,
        messages=_with_media(example.messages, new_media),
        rejected=_with_media(example.rejected, new_media),
        origins=tuple(replace(origin, parents=(example.id,), step=kind) for origin in example.origins),
        steps=(*example.steps, kind),
    )


def _with_media(messages: tuple[Message, ...], new_media: dict[str, str]) -> tuple[Message, ...]:
    changed_messages = []
    for message in messages:
        content = tuple(replace(part, media=new_media.get(part.media, part.media)) for part in message.content)
        changed_messages.append(replace(message, content=content))
    return tuple(changed_messages)


def check_copies(copies: int, *, is_idle: bool) -> None:
    """Raise ConfigError for an invalid number of copies, or if no change is enabled."""
    if not 1 <= copies <= MOST_COPIES:
        raise ConfigError(f"copies is {copies}; it must be from 1 to {MOST_COPIES}", "copies: 2")
    if is_idle:
        raise ConfigError(
            "every change is off, and a copy would be the row itself", "leave the options out for the defaults"
        )


def check_between(name: str, value: float, minimum: float, maximum: float, remedy: object) -> None:
    """Raise ConfigError for an option outside its bounds."""
    if not minimum <= value <= maximum:
        raise ConfigError(f"{name} is {value:g}; it must be from {minimum:g} to {maximum:g}", f"{name}: {remedy}")


JPEG = (".jpg", ".jpeg")
JPEG_QUALITY = 95  # of a copy of a JPEG if the compression stays unchanged
JPEG_SIDE = 65_500  # pixels; longest side that the format allows


@dataclass(frozen=True)
class Light:
    """Largest relative changes of brightness, contrast and colour: 0.2 is a factor of 0.8 to 1.2."""

    brightness: float = option(0.2, "of the brightness, at most 0.9")
    contrast: float = option(0.2, "of the contrast, at most 0.9")
    colour: float = option(0.1, "of the colour, from grey to gaudy, at most 1")

    def __post_init__(self) -> None:
        for name, maximum in (("brightness", 0.9), ("contrast", 0.9), ("colour", 1.0)):
            check_between(name, getattr(self, name), minimum=0, maximum=maximum, remedy=0.2)


@dataclass(frozen=True)
class AugmentImages:
    """Add copies of training rows with images; the images are changed at random, the reply is kept.

    Held-out rows are not copied. A change must not make the reply wrong: flips are off, since they mirror writing and
    swap left and right. Set `colour` to 0 if answers name colours, and `crop` to 1 if the answer may be at the edge of
    the image. A copy is an upright RGB image of the first frame: JPEG if the image was a JPEG or `jpeg_quality` is
    set, else PNG.
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
        check_between("rotation_degrees", self.rotation_degrees, minimum=0, maximum=180, remedy=5)
        check_between("crop", self.crop, minimum=0.1, maximum=1, remedy=0.9)
        check_between("blur", self.blur, minimum=0, maximum=20, remedy=2)
        check_between("noise", self.noise, minimum=0, maximum=64, remedy=8)
        if self.jpeg_quality and not 5 <= self.jpeg_quality <= 95:
            raise ConfigError(
                f"jpeg_quality is {self.jpeg_quality}; it must be 0, or from 5 to 95", "jpeg_quality: 40"
            )
        light = self.light.brightness or self.light.contrast or self.light.colour
        changes = (self.flip, self.rotation_degrees, self.crop < 1, light, self.blur, self.noise, self.jpeg_quality)
        check_copies(self.copies, is_idle=not any(changes))

    def open(self, folder: Path) -> CopyFunction:
        """Return the function that yields the copies of a row."""
        return copying(self, "image", folder)

    def decoded(self, file: Path) -> Image:
        """Open an image.

        Raises MediaError, or ExtraError without Pillow.
        """
        return open_image(file)

    def changed(self, medium: Image, file: Path, draw: np.random.Generator) -> AugmentedFile:
        """Return the changed image as a file: geometry first, then light, then blur, noise and compression."""
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
    """Rotate an image counter-clockwise by `angle` degrees; the size stays, the edges are mirrored.

    Corners of one colour would create edges that no original image has, and a model may learn to look for them.
    """
    from PIL import Image

    # bounding box of the rotated image: (w |cos a| + h |sin a|, w |sin a| + h |cos a|); pad by half of the excess
    width, height = picture.size
    sine, cosine = abs(math.sin(math.radians(angle))), abs(math.cos(math.radians(angle)))
    across = math.ceil(max(0.0, width * cosine + height * sine - width) / 2) + 2
    down = math.ceil(max(0.0, width * sine + height * cosine - height) / 2) + 2
    wide = np.pad(np.asarray(picture), ((down, down), (across, across), (0, 0)), mode="symmetric")
    turned = Image.fromarray(wide).rotate(angle, Image.Resampling.BICUBIC)
    return turned.crop((across, down, across + width, down + height))


def cropped(picture: Image, area: float, across: float, down: float) -> Image:
    """Return a piece of the image with the same aspect ratio.

    area: fraction of the image's area.
    across, down: position of the piece in the remaining space, 0..1 each.
    """
    width, height = (max(1, round(length * math.sqrt(area))) for length in picture.size)
    left, top = round(across * (picture.width - width)), round(down * (picture.height - height))
    return picture.crop((left, top, left + width, top + height))


TELEPHONE = 8000  # samples a second
MOST_RATE = 96_000  # samples a second of a copy; FLAC allows at most 655,350
MOST_SAMPLES = 3600 * 16_000  # of a recording that is changed; memory holds several copies of it
QUIETEST_NOISE_DB = 40.0
LOUDEST = 0.999  # fraction of full scale; higher peaks would be clipped


class Recording(NamedTuple):
    """Recording with its channels averaged.

    mono: (samples,).
    rate: samples per second.
    """

    mono: audio.F32
    rate: int


@dataclass(frozen=True)
class AugmentAudio:
    """Add copies of training rows with recordings; these are changed at random, the reply is kept.

    Held-out rows are not copied. Speed changes the pitch too, as on a tape (Ko et al. 2015). `time_mask_s` silences a
    piece (Park et al. 2019); leave it at 0 if the reply repeats what is heard. A copy is FLAC, one channel of 16 bits,
    at the rate of the recording (at most 96,000); a copy that would be clipped is made quieter.
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
            check_between(name, getattr(self, name), minimum=0, maximum=maximum, remedy=default)
        if self.noise_db and not 5 <= self.noise_db <= QUIETEST_NOISE_DB:
            raise ConfigError(f"noise_db is {self.noise_db:g}; it must be 0, or from 5 to 40", "noise_db: 15")
        check_copies(self.copies, is_idle=not any([self.noise_db, *(getattr(self, name) for name in bounds)]))

    def open(self, folder: Path) -> CopyFunction:
        """Return the function that yields the copies of a row."""
        return copying(self, "audio", folder)

    def decoded(self, file: Path) -> Recording:
        """Decode a recording to one channel.

        Raises MediaError, or ExtraError without soundfile or soxr.
        """
        with audio.open_audio(file) as sound:
            rate = min(int(sound.samplerate), MOST_RATE)
        max_seconds = min(audio.MOST_SECONDS, MOST_SAMPLES / rate)
        return Recording(audio.read_sound(file, rate, max_seconds), rate)

    def changed(self, medium: Recording, file: Path, draw: np.random.Generator) -> AugmentedFile:
        """Return the changed recording as a file.

        The order is: timing, bandwidth, gain, noise, limit on the peak.
        """
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
            # noise variance for a ratio of r dB: sigma^2 = mean(x^2) / 10^(r / 10)
            power = float(np.mean(np.square(mono, dtype=np.float64)))
            spread = np.float32((power / 10 ** (ratio / 10)) ** 0.5)
            mono = mono + spread * draw.standard_normal(len(mono), np.float32)
            changes.append(f"noise at {ratio:.1f} dB")
        peak = float(np.abs(mono).max())
        return mono * np.float32(LOUDEST / peak) if peak > LOUDEST else mono


def fitted(mono: audio.F32, samples: int) -> audio.F32:
    """Cut a recording, or pad it with silence, to its length before resampling.

    mono: (N,). Returns (samples,).
    """
    return np.pad(mono[:samples], (0, max(0, samples - len(mono))))


def flac(mono: audio.F32, rate: int) -> bytes:
    """Encode a recording as FLAC of 16 bits.

    mono: (samples,), -1..1.
    """
    import soundfile

    out = io.BytesIO()
    soundfile.write(out, mono, rate, format="FLAC", subtype="PCM_16")
    return out.getvalue()
