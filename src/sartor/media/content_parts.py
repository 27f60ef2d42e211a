"""Content parts of a request that are no text: OpenAI's forms (`image_url`, `input_audio`) and the short ones. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sartor.core import data_urls
from sartor.core.records import PartKind

MEDIA: Mapping[str, PartKind] = {"image": "image", "image_url": "image", "audio": "audio", "input_audio": "audio"}


def parts_in(messages: Sequence[Any]) -> Iterator[Mapping[str, Any]]:
    """Every media part of messages, in order; what has no form of one is left out."""
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list | tuple) else ():
            if is_media(part):
                yield part


def is_media(part: Any) -> bool:
    """Whether a content part is a picture or a recording."""
    return isinstance(part, Mapping) and isinstance(part.get("type"), str) and part["type"] in MEDIA


def kinds_in(messages: Sequence[Any]) -> tuple[PartKind, ...]:
    """Of `image` and `audio`, those that messages hold.

    >>> kinds_in([{"content": [{"type": "input_audio"}, {"type": "image_url"}, {"type": "image"}]}, {"content": "a"}])
    ('audio', 'image')
    """
    return tuple(sorted({MEDIA[part["type"]] for part in parts_in(messages)}))


def url_in(part: Mapping[str, Any]) -> str:
    """The data URL that a media part holds, "" where it holds none: an address is not followed."""
    value = part.get(part["type"])
    if isinstance(value, Mapping):
        value = (
            value.get("url") if "url" in value else f"{data_urls.SCHEME}audio/{value.get('format')};base64,{value.get('data')}"
        )
    return value if isinstance(value, str) and value.startswith(data_urls.SCHEME) else ""
