"""Data URLs (RFC 2397) of media: what they hold, and one of a file's bytes. Only the base64 form, strictly."""

from __future__ import annotations

import base64
import binascii

from sartor.core.errors import SourceError

SCHEME = "data:"


def bytes_of(url: str, what: str = "media file") -> bytes:
    """What a data URL holds; its type is not looked at. Raises SourceError where that is no base64."""
    head, _, body = url.partition(",")
    if head.endswith(";base64"):
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError):
            pass
    raise SourceError(f"the {what}'s data URL is not base64", "data:image/png;base64,... without line ends")


def url_of(content: bytes, mime: str) -> str:
    """A data URL. mime: `image/png`, say."""
    return f"{SCHEME}{mime};base64,{base64.b64encode(content).decode()}"
