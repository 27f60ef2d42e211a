"""`images`: rows whose pictures cannot be read, are tiny, blurred, or of an extreme shape go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError, MediaError
from sartor.core.records import Drop, Example, dropped
from sartor.curate.steps.contract import RowFunction
from sartor.media.images import SHARP_SIDE, open_picture, sharpness

# Five photographs in focus: 0.18 to 0.9. With a Gaussian blur of 2 pixels 0.001 to 0.006, of 4 pixels up to 0.0005.
SHARPNESS = 0.001


def media_of(example: Example, kind: str) -> Iterator[str]:
    """The media paths of an Example's parts of a kind."""
    for message in example.messages + example.rejected:
        yield from (part.media for part in message.content if part.kind == kind)


@dataclass(frozen=True)
class Images:
    """Drop rows with a picture that is unreadable, tiny, blurred or of an extreme shape."""

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
            raise ConfigError(f"min_sharpness is {self.min_sharpness}; it must not be negative", "min_sharpness: 0.001")

    def open(self, folder: Path) -> RowFunction:
        """See RowStep."""

        def apply(example: Example) -> Example | Drop:
            for name in media_of(example, "image"):
                if fault := self._fault(folder / name):
                    return dropped(example, fault[0], f"{name[:18]}...: {fault[1]}", step=self.kind)
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
        if self.min_sharpness and (found := sharpness(picture.grey)) < self.min_sharpness:
            return "blurred_image", f"its sharpness is {found:.4f}; at least {self.min_sharpness:g}"
        return None
