"""Pictures as numbers: their sharpness, and a sketch by which two can be held against each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.pictures import opened, shown

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
class Picture:
    """Width and height in pixels as stored; grey values 0..255, scaled down to the longer side that was asked for."""

    width: int
    height: int
    grey: F32


def open_picture(file: Path, longest_side: int) -> Picture:
    """The first frame, upright. Raises MediaError, or ExtraError without Pillow."""
    with opened(file) as image:
        width, height = image.size
        image.draft("RGB", (longest_side, longest_side))
        grey = shown(image).convert("L")
    from PIL import Image

    grey.thumbnail((longest_side, longest_side), Image.Resampling.BOX)
    return Picture(width, height, np.asarray(grey, np.float32))


def sharpness(grey: F32) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000) over the variance of the picture, so that contrast does not matter.

    What rounding to whole grey values adds is taken off: else it would be all that is left of a blurred picture. 0 for a
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
    """64 bits: which of the lowest 8 x 8 frequencies of a 32 x 32 picture (DCT, the mean left out) are above their median."""
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

    Each block in which either shows something is correlated with its counterpart; the 20th percentile counts. A new size, a new
    compression, other brightness, a small mark leave it near 1; two pages of text or two pieces of one cloth, which are alike
    as wholes, have it near 0.
    """
    left, right = (_blocks(side) for side in (a, b))
    spread = np.sqrt((left**2).mean(2)), np.sqrt((right**2).mean(2))
    correlation = (left * right).mean(2) / (spread[0] * spread[1] + 1e-3)
    shown = np.maximum(*spread) >= DETAIL
    blocks = shown.sum(1)
    ordered = np.sort(np.where(shown, correlation, np.inf), axis=1)
    found = np.take_along_axis(ordered, np.maximum(blocks - 1, 0)[:, None] // 5, axis=1)[:, 0]
    return np.where(blocks < FEWEST_BLOCKS, np.nan, found).astype(np.float32)


def _blocks(thumbs: NDArray[np.uint8]) -> NDArray[Any]:
    count, across = len(thumbs), SIDE // BLOCK
    blocks = thumbs.reshape(count, across, BLOCK, across, BLOCK).transpose(0, 1, 3, 2, 4).reshape(count, across**2, BLOCK**2)
    blocks = blocks.astype(np.float32)
    blocks -= blocks.mean(2, keepdims=True)
    return blocks
