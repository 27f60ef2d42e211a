"""OpenAI content parts and data URLs of media."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sartor.core.errors import SourceError
from sartor.core.records import PartKind

SCHEME = "data:"


def bytes_of(url: str, label: str = "media file") -> bytes:
    """Return the content of a data URL, whatever its type.

    Raises SourceError if it is not base64.
    """
    head, _, body = url.partition(",")
    if head.endswith(";base64"):
        try:
            return base64.b64decode(body, validate=True)
        except (binascii.Error, ValueError):
            pass
    raise SourceError(f"the {label}'s data URL is not base64", "data:image/png;base64,... without line ends")


def url_of(content: bytes, mime: str) -> str:
    """Return a data URL. mime: for example `image/png`."""
    return f"{SCHEME}{mime};base64,{base64.b64encode(content).decode()}"


MEDIA: Mapping[str, PartKind] = {"image": "image", "image_url": "image", "audio": "audio", "input_audio": "audio"}


def media_parts(messages: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the media parts of messages, in order. Content in any other form is skipped."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list | tuple) else ():
            if is_media(part):
                yield part


def is_media(part: Any) -> bool:
    """Return whether a content part is an image or a recording."""
    return isinstance(part, Mapping) and isinstance(part.get("type"), str) and part["type"] in MEDIA


def kinds_in(messages: Sequence[Any]) -> tuple[PartKind, ...]:
    """Return those of `image` and `audio` that messages contain.

    >>> kinds_in([{"content": [{"type": "input_audio"}, {"type": "image_url"}, {"type": "image"}]}, {"content": "a"}])
    ('audio', 'image')
    """
    return tuple(sorted({MEDIA[part["type"]] for part in media_parts(messages)}))


def url_in(part: Mapping[str, Any]) -> str:
    """Return the data URL of a media part; "" if it has none. Other addresses are ignored."""
    value = part.get(part["type"])
    if isinstance(value, Mapping):
        value = (
            value.get("url") if "url" in value else f"{SCHEME}audio/{value.get('format')};base64,{value.get('data')}"
        )
    return value if isinstance(value, str) and value.startswith(SCHEME) else ""
