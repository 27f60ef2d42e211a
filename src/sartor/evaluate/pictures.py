"""Small pictures of rows, for the Report's page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable

from sartor.core.errors import SartorError
from sartor.core.records import Part
from sartor.evaluate.ablation import media_of
from sartor.evaluate.held_out import HeldOut
from sartor.media.images import open_image
from sartor.models.media_tokens import content_of

PIXELS = 96


def thumbnails(asked: HeldOut, places: Iterable[int]) -> dict[int, str]:
    """Data URLs of JPEGs of at most PIXELS each way: of these rows the first picture, where one can be decoded."""
    found = {}
    for place in places:
        pictures = [part for part in media_of(asked.examples[place]) if part.kind == "image"]
        if pictures and (url := _thumbnail(pictures[0], asked)):
            found[place] = url
    return found


def _thumbnail(part: Part, asked: HeldOut) -> str:
    try:
        image = open_image(content_of(part, asked.folder))
    except SartorError:  # the page is whole without it
        return ""
    image.thumbnail((PIXELS, PIXELS))
    written = io.BytesIO()
    image.save(written, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()
