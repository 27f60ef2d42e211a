"""Decodes images within limits; sharpness and perceptual hash.

Pillow is given the six formats that sources take and no other: of the rest some call programs (EPS) or are rarely
tested.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sartor.core.errors import MediaError, SartorError, decoder_message, missing_package

if TYPE_CHECKING:
    from PIL import Image as PillowImage

from dataclasses import dataclass
from functools import cache

from numpy.typing import NDArray

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")
MOST_PIXELS = 178_956_970  # where Pillow refuses: 2 * PIL.Image.MAX_IMAGE_PIXELS
_REMEDY = "give a whole PNG, JPEG, GIF, WebP, BMP or TIFF file"
_ORIENTATION = 0x0112  # the tag of EXIF
# that tag's values -> Pillow's names of what turns the picture upright
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners use of a wider number


def open_image(content: bytes | Path) -> PillowImage.Image:
    """A picture as it is seen: RGB, upright as its EXIF says, the first frame of several, on white where it is
    transparent.

    Raises MediaError (`unreadable_image`, `image_bomb`); ExtraError without Pillow.
    """
    with open_checked(content) as image:
        return to_rgb(image)


@contextlib.contextmanager
def open_checked(content: bytes | Path) -> Iterator[PillowImage.Image]:
    """The picture with its header read, its size within the limits. Whatever decoding raises inside is a
    MediaError.
    """
    try:
        from PIL import Image
    except ImportError:
        raise missing_package("pillow") from None
    file = content if isinstance(content, Path) else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow warns of large and odd pictures; those over the limit are refused below
            with Image.open(content if isinstance(content, Path) else io.BytesIO(content), formats=FORMATS) as image:
                _check_size(*image.size)
                yield image
    except (SartorError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise MediaError("image_bomb", str(error), "scale the picture down") from None
    except Exception as error:  # decoders raise many kinds on broken files
        raise MediaError("unreadable_image", decoder_message(error, file), _REMEDY) from None


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise MediaError("unreadable_image", f"the picture has {width} x {height} pixels: nothing to see", _REMEDY)
    if width * height > MOST_PIXELS:
        problem = f"{width:,} x {height:,} pixels; the limit is {MOST_PIXELS:,}"
        raise MediaError("image_bomb", problem, "scale the picture down")


def to_rgb(image: PillowImage.Image) -> PillowImage.Image:
    """The first frame of an open picture as RGB, upright, on white. Call it inside `opened`."""
    from PIL import Image

    # before the orientation is looked at: Pillow turns a TIFF upright by itself, and then forgets the tag
    image.load()
    orientation = None
    with contextlib.suppress(Exception):  # a picture whose EXIF is damaged is seen as it is stored
        orientation = image.getexif().get(_ORIENTATION)
    rgb = _in_colour(image)
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return rgb.transpose(Image.Transpose[turn]) if turn else rgb


def _in_colour(image: PillowImage.Image) -> PillowImage.Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bits: `convert` would cut them off at 255
        return Image.fromarray(_in_eight_bits(np.asarray(image, np.float64))).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, "white")
        background.alpha_composite(rgba)
        image = background
    return image.convert("RGB")


def _in_eight_bits(values: Any) -> Any:
    """Grey values of more than 8 bits, from black to the white of the depth in use: 12 bits in 16 are not all but
    black.
    """
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are no numbers")
    maximum = float(values.max())
    white = next((2.0**bits - 1 for bits in _DEPTHS if maximum < 2**bits), maximum)
    if 0 < maximum <= 1 and (values % 1).any():  # fractions, as floating point has them
        white = 1.0
    return (values * (255 / white)).clip(0, 255).round().astype(np.uint8)


def squared(image: PillowImage.Image, side: int, background: tuple[int, int, int]) -> PillowImage.Image:
    """The whole picture in a square, its shape kept, the rest of the square of one colour. Nothing at the rim is
    lost.
    """
    from PIL import Image

    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square


SHARP_SIDE = 512  # sharpness is measured on a picture whose longer side is at most this
SIDE = 64  # of the thumbnail of a sketch
BLOCK = 8  # of the thumbnail: 8 x 8 blocks of 8 x 8 pixels
DETAIL = 4.0  # grey levels of standard deviation from which a block shows something
FEWEST_BLOCKS = 4
ROUNDING = (
    2 * 20 / 12
)  # variance of the Laplacian of rounding errors: 4**2 + 4 of 1/12 each, rounded by the blur and by the file

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class GreyImage:
    """Width and height in pixels as stored; grey values 0..255, scaled down to the longer side that was asked for."""

    width: int
    height: int
    grey: F32


def open_picture(file: Path, longest_side: int) -> GreyImage:
    """The first frame, upright. Raises MediaError, or ExtraError without Pillow."""
    with open_checked(file) as image:
        width, height = image.size
        image.draft("RGB", (longest_side, longest_side))
        grey = to_rgb(image).convert("L")
    from PIL import Image

    grey.thumbnail((longest_side, longest_side), Image.Resampling.BOX)
    return GreyImage(width, height, np.asarray(grey, np.float32))


def sharpness(grey: F32) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000) over the variance of the picture, so that contrast does not
    matter.

    What rounding to whole grey values adds is taken off: else it would be all that is left of a blurred picture. 0 for
    a
    picture of one colour. Scale it first: the measure depends on the size in pixels.
    """
    if min(grey.shape) < 3:
        return 0.0
    inner = grey[1:-1, 1:-1]
    edges = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    spread = float(grey.var())
    rounded = ROUNDING * float((edges != 0).mean())  # an even area has nothing to round
    return max(0.0, float(edges.var()) - rounded) / spread if spread > 0 else 0.0


def thumbnail(grey: F32) -> NDArray[np.uint8]:
    """(SIDE, SIDE) grey values of the whole picture, its sides stretched to fit."""
    from PIL import Image

    small = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small)


def perceptual_hash(thumb: NDArray[np.uint8]) -> int:
    """64 bits: which of the lowest 8 x 8 frequencies of a 32 x 32 picture (DCT, the mean left out) are above their
    median.
    """
    small = thumb.reshape(32, SIDE // 32, 32, SIDE // 32).mean((1, 3))
    basis = _cosines()
    low = (basis @ small @ basis.T)[:8, :8].ravel()[1:]
    return int(np.packbits(np.append(low > np.median(low), False)).view(">u8")[0])


@cache
def _cosines() -> Any:
    steps = np.arange(32)
    return np.cos(np.pi / 32 * (steps + 0.5) * steps[:, None])


def likeness(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> F32:
    """(P,) how alike P pairs of thumbnails (P, SIDE, SIDE) are: -1..1, NaN where there is too little to see.

    Each block in which either shows something is correlated with its counterpart; the 20th percentile counts. A new
    size, a new compression, other brightness, a small mark leave it near 1; two pages of text or two pieces of one
    cloth, which are alike as wholes, have it near 0.
    """
    left, right = (_blocks(side) for side in (a, b))
    spread = np.sqrt((left**2).mean(2)), np.sqrt((right**2).mean(2))
    correlation = (left * right).mean(2) / (spread[0] * spread[1] + 1e-3)
    has_detail = np.maximum(*spread) >= DETAIL
    blocks = has_detail.sum(1)
    ordered = np.sort(np.where(has_detail, correlation, np.inf), axis=1)
    percentile = np.take_along_axis(ordered, np.maximum(blocks - 1, 0)[:, None] // 5, axis=1)[:, 0]
    return np.where(blocks < FEWEST_BLOCKS, np.nan, percentile).astype(np.float32)


def _blocks(thumbs: NDArray[np.uint8]) -> NDArray[Any]:
    count, across = len(thumbs), SIDE // BLOCK
    blocks = (
        thumbs.reshape(count, across, BLOCK, across, BLOCK)
        .transpose(0, 1, 3, 2, 4)
        .reshape(count, across**2, BLOCK**2)
    )
    blocks = blocks.astype(np.float32)
    blocks -= blocks.mean(2, keepdims=True)
    return blocks
