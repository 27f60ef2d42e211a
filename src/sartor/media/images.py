"""Image decoding within limits; sharpness and perceptual hash.

Pillow may use only the six formats that sources accept. Of its other decoders some call external programs (EPS) or are
rarely tested.
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
MOST_PIXELS = 178_956_970  # Pillow's own limit: 2 * PIL.Image.MAX_IMAGE_PIXELS
_REMEDY = "give a whole PNG, JPEG, GIF, WebP, BMP or TIFF file"
_ORIENTATION = 0x0112  # EXIF tag
# value of that tag -> Pillow's name of the transposition that turns the image upright
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_DEPTHS = (8, 10, 12, 14, 16)  # bits of a wider number that cameras and scanners use


def open_image(content: bytes | Path) -> PillowImage.Image:
    """Decode an image to RGB, as it is displayed: upright by its EXIF, first frame, transparency on white.

    Raises MediaError (`unreadable_image`, `image_bomb`); ExtraError without Pillow.
    """
    with open_checked(content) as image:
        return to_rgb(image)


@contextlib.contextmanager
def open_checked(content: bytes | Path) -> Iterator[PillowImage.Image]:
    """Open an image with its header read and its size checked.

    Any error of decoding inside the context becomes a MediaError. Raises ExtraError without Pillow.
    """
    try:
        from PIL import Image
    except ImportError:
        raise missing_package("pillow") from None
    file = content if isinstance(content, Path) else None
    try:
        with warnings.catch_warnings():
            # Pillow warns of large and unusual images; those over the limit are refused below
            warnings.simplefilter("ignore")
            with Image.open(content if isinstance(content, Path) else io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
                if width < 1 or height < 1:
                    problem = f"the picture has {width} x {height} pixels: nothing to see"
                    raise MediaError("unreadable_image", problem, _REMEDY)
                if width * height > MOST_PIXELS:
                    problem = f"{width:,} x {height:,} pixels; the limit is {MOST_PIXELS:,}"
                    raise MediaError("image_bomb", problem, "scale the picture down")
                yield image
    except (SartorError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise MediaError("image_bomb", str(error), "scale the picture down") from None
    except Exception as error:  # decoders raise many types on broken files
        raise MediaError("unreadable_image", decoder_message(error, file), _REMEDY) from None


def to_rgb(image: PillowImage.Image) -> PillowImage.Image:
    """Return the first frame of an open image as RGB, upright, on white. Call it inside `open_checked`."""
    from PIL import Image

    # Load before the orientation is read: Pillow turns a TIFF upright by itself and then drops the tag
    image.load()
    orientation = None
    with contextlib.suppress(Exception):  # with damaged EXIF the image is used as stored
        orientation = image.getexif().get(_ORIENTATION)
    rgb = _in_colour(image)
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return rgb.transpose(Image.Transpose[turn]) if turn else rgb


def _in_colour(image: PillowImage.Image) -> PillowImage.Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bits: `convert` would clip them at 255
        return Image.fromarray(_in_eight_bits(np.asarray(image, np.float64))).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, "white")
        background.alpha_composite(rgba)
        image = background
    return image.convert("RGB")


def _in_eight_bits(values: Any) -> Any:
    """Scale grey values of more than 8 bits to 0..255.

    White is the maximum of the bit depth in use, so that 12-bit values in 16 bits do not become almost black.
    Raises ValueError for NaN and infinities.
    """
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are no numbers")
    maximum = float(values.max())
    white = next((2.0**bits - 1 for bits in _DEPTHS if maximum < 2**bits), maximum)
    if 0 < maximum <= 1 and (values % 1).any():  # floating-point values in 0..1
        white = 1.0
    return (values * (255 / white)).clip(0, 255).round().astype(np.uint8)


def squared(image: PillowImage.Image, side: int, background: tuple[int, int, int]) -> PillowImage.Image:
    """Fit the whole image into a square, centred, with its aspect ratio kept and a border of one colour."""
    from PIL import Image

    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = Image.new("RGB", (side, side), background)
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square


SHARP_SIDE = 512  # limit for the longer side of an image whose sharpness is measured
SIDE = 64  # side of a thumbnail in pixels
BLOCK = 8  # side of a block in pixels: a thumbnail has 8 x 8 blocks
DETAIL = 4.0  # least standard deviation of a block with visible content, in grey levels
FEWEST_BLOCKS = 4
ROUNDING = (
    2 * 20 / 12
)  # Var(Laplacian of rounding errors) = (4^2 + 4) / 12, doubled for the rounding of the blur and of the file

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class GreyImage:
    """Grey image.

    width, height: in pixels, as stored in the file.
    grey: (H, W) values 0..255, scaled down to the requested longer side.
    """

    width: int
    height: int
    grey: F32


def open_picture(file: Path, longest_side: int) -> GreyImage:
    """Decode the first frame of an image as grey values, upright, scaled down to `longest_side`.

    Raises MediaError; ExtraError without Pillow.
    """
    with open_checked(file) as image:
        width, height = image.size
        image.draft("RGB", (longest_side, longest_side))
        grey = to_rgb(image).convert("L")
    from PIL import Image

    grey.thumbnail((longest_side, longest_side), Image.Resampling.BOX)
    return GreyImage(width, height, np.asarray(grey, np.float32))


def sharpness(grey: F32) -> float:
    """Return the variance of the Laplacian of an image, divided by the image's variance.

    grey: (H, W), 0..255. Pech-Pacheco et al. 2000; the division makes it independent of contrast. The part that
    rounding to whole grey values adds is subtracted, since it would dominate in a blurred image. 0 for an image of one
    colour.
    Scale the image first: the measure depends on the size in pixels.
    """
    if min(grey.shape) < 3:
        return 0.0
    # L(y, x) = sum of the 4 neighbours - 4 grey(y, x), shape (H-2, W-2)
    # sharpness = max(0, Var(L) - ROUNDING * P(L != 0)) / Var(grey)
    inner = grey[1:-1, 1:-1]
    edges = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    spread = float(grey.var())
    rounded = ROUNDING * float((edges != 0).mean())  # uniform areas have no rounding errors
    return max(0.0, float(edges.var()) - rounded) / spread if spread > 0 else 0.0


def thumbnail(grey: F32) -> NDArray[np.uint8]:
    """Return grey values of shape (SIDE, SIDE): the whole image, stretched to fit.

    grey: (H, W), 0..255.
    """
    from PIL import Image

    small = Image.fromarray(grey.clip(0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small)


def perceptual_hash(thumb: NDArray[np.uint8]) -> int:
    """Return a 64-bit perceptual hash of a thumbnail of shape (SIDE, SIDE).

    Bits say which of the lowest 8 x 8 DCT coefficients of a 32 x 32 image, without the mean, exceed their median. The
    last bit is 0.
    """
    small = thumb.reshape(32, SIDE // 32, 32, SIDE // 32).mean((1, 3))
    # DCT-II without normalisation: F = C X C^T, C[k, j] = cos(pi / 32 (j + 1/2) k); X, C, F: (32, 32)
    basis = _cosines()
    low = (basis @ small @ basis.T)[:8, :8].ravel()[1:]
    return int(np.packbits(np.append(low > np.median(low), False)).view(">u8")[0])


@cache
def _cosines() -> Any:
    steps = np.arange(32)
    return np.cos(np.pi / 32 * (steps + 0.5) * steps[:, None])


def likeness(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> F32:
    """Return the similarity of P pairs of thumbnails, shape (P,): -1..1, NaN for too little content.

    a, b: (P, SIDE, SIDE). Each block with visible content in either thumbnail is correlated with its counterpart, and
    the 20th percentile is returned. A change of size, compression or brightness and a small mark leave it near 1. Two
    pages of text or two pieces of one cloth, which are alike only as wholes, have a value near 0.
    """
    # per block, with the means removed: corr = mean(l r) / (sqrt(mean(l^2)) sqrt(mean(r^2)) + 1e-3)
    # left, right: (P, blocks, pixels); correlation, has_detail: (P, blocks)
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
