"""`augment_images`: further training rows whose pictures are turned, cropped, lit or blurred otherwise, the reply kept."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.curate.steps.augment import Written, check_between, check_copies, copying
from sartor.curate.steps.contract import CopyFunction
from sartor.media.images import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

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
        for name, most in (("brightness", 0.9), ("contrast", 0.9), ("colour", 1.0)):
            check_between(name, getattr(self, name), 0, most, 0.2)


@dataclass(frozen=True)
class AugmentImages:
    """Add copies of each training row that has pictures, with the pictures changed at random and the reply kept.

    No copy is made of a held-out row. A change must not make the reply untrue: flips are off, since they mirror writing and
    turn left into right; leave `colour` at 0 where the answer is a colour, and `crop` at 1 where what is asked for may lie at
    the rim. A copy is an RGB picture, upright, of the first frame: JPEG where the picture was one or `jpeg_quality` asks, else
    PNG.
    """

    copies: int = option(2, "further rows for each row, 1 to 100")
    flip: tuple[Literal["horizontal", "vertical"], ...] = option((), "mirror half of the copies: horizontal, vertical or both")
    rotation_degrees: float = option(5.0, "turned by up to this either way, 0 to 180; what is then seen of the rim is mirrored")
    crop: float = option(0.9, "smallest fraction of the area that is left, of the same shape, 0.1 to 1")
    light: Light = option(Light(), "factors of brightness, contrast and colour")
    blur: float = option(0.0, "largest radius of a Gaussian blur, in thousandths of the longer side, 0 to 20")
    noise: float = option(0.0, "largest standard deviation of Gaussian noise, in grey levels of 255, 0 to 64")
    jpeg_quality: int = option(0, "lowest quality of JPEG, 5 to 95, drawn from there to 95; 0 leaves the compression alone")
    rehearsal: bool = option(False, "copy rows of rehearsal sources too")
    seed: int = option(0, "of what is drawn")
    kind: Literal["augment_images"] = "augment_images"

    def __post_init__(self) -> None:
        check_between("rotation_degrees", self.rotation_degrees, 0, 180, 5)
        check_between("crop", self.crop, 0.1, 1, 0.9)
        check_between("blur", self.blur, 0, 20, 2)
        check_between("noise", self.noise, 0, 64, 8)
        if self.jpeg_quality and not 5 <= self.jpeg_quality <= 95:
            raise ConfigError(f"jpeg_quality is {self.jpeg_quality}; it must be 0, or from 5 to 95", "jpeg_quality: 40")
        light = self.light.brightness or self.light.contrast or self.light.colour
        changes = (self.flip, self.rotation_degrees, self.crop < 1, light, self.blur, self.noise, self.jpeg_quality)
        check_copies(self.copies, is_idle=not any(changes))

    def open(self, folder: Path) -> CopyFunction:
        """See CopyStep."""
        return copying(self, "image", folder)

    def decoded(self, file: Path) -> Image:
        """Raises MediaError, or ExtraError without Pillow."""
        return open_image(file)

    def changed(self, medium: Image, file: Path, draw: np.random.Generator) -> Written:
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
        return Written(out.getvalue(), ".jpg" if is_jpeg else ".png", changes)

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
            if most := getattr(self.light, name):
                factor = draw.uniform(1 - most, 1 + most)
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
    """A piece of the picture in its shape. area: its fraction. across, down: 0..1, where in the room that is left it lies."""
    width, height = (max(1, round(length * math.sqrt(area))) for length in picture.size)
    left, top = round(across * (picture.width - width)), round(down * (picture.height - height))
    return picture.crop((left, top, left + width, top + height))
