"""Size and header checks of request media.

The server process reads only headers, in its own threads; a worker decodes the media. A file that the worker cannot
decode is an error of the request too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from sartor.core.errors import BusyError, MediaError, SourceError
from sartor.media import audio, content_parts, images
from sartor.media.content_parts import MEDIA, is_media, url_in
from sartor.serving.http.http_errors import MediaFaultError
from sartor.serving.http.request_body import TooLargeError, too_large
from sartor.serving.team_config import MediaLimits, RequestLimits

# Total of the media (base64) of all requests whose reply has not begun
MOST_HELD_BYTES = 256 << 20
_HEADS = {"image": "data:image/png;base64,...", "audio": "data:audio/wav;base64,..."}
_threads = ThreadPoolExecutor(2, "sartor-media")


class MediaChecker:
    """Checks and counts the media of all requests in progress.

    held_bytes: size of the media that are counted now, as base64.
    """

    def __init__(self, limits: RequestLimits, media: MediaLimits, max_bytes: int = MOST_HELD_BYTES) -> None:
        self._limits, self._media, self._max_bytes = limits, media, max_bytes
        self.held_bytes = 0

    @asynccontextmanager
    async def looked_at(
        self, messages: Sequence[Mapping[str, Any]], body_bytes: int, choices: int = 1
    ) -> AsyncIterator[None]:
        """Check the media of `messages` and count them as held while the context is open.

        body_bytes: size of the request body. choices: number of replies; the media are counted once for each.
        Raises TooLargeError, BusyError (too many bytes held together), and MediaFaultError with the path of the part.
        """
        parts: list[tuple[str, str, str]] = []  # field path, kind, data URL
        for turn_index, message in enumerate(messages):
            content = message.get("content")
            for index, part in enumerate(content if isinstance(content, list | tuple) else ()):
                if is_media(part):
                    parts.append((f"messages[{turn_index}].content[{index}]", MEDIA[part["type"]], url_in(part)))
        size = sum(len(url) for _, _, url in parts)
        self._check_size(len(parts), size, body_bytes, choices)
        size *= choices
        if self.held_bytes + size > self._max_bytes and parts:
            problem = (
                f"the media of requests that are being answered hold {self.held_bytes} bytes; {self._max_bytes} are "
                "allowed"
            )
            raise BusyError(problem, "send it again after the seconds of Retry-After")
        self.held_bytes += size
        try:
            if parts:
                await asyncio.get_running_loop().run_in_executor(_threads, self._check_parts, parts)
            yield
        finally:
            self.held_bytes -= size

    def _check_size(self, count: int, size: int, body_bytes: int, choices: int) -> None:
        if body_bytes - size > self._limits.body_bytes:
            raise too_large(body_bytes - size, self._limits.body_bytes)
        if count > self._media.parts:
            problem = f"the request holds {count} pictures and recordings; the limit is {self._media.parts}"
            raise MediaFaultError(
                problem, "send fewer, or raise media.parts in TEAM.yaml", "messages", "too_many_media"
            )
        if (decoded_bytes := size * 3 // 4 * choices) > self._media.bytes:
            times = f", {choices} times," if choices > 1 else ""
            raise TooLargeError(
                f"the media of the request{times} have about {decoded_bytes} bytes; the limit is {self._media.bytes}",
                "send smaller ones, or raise media.bytes in TEAM.yaml",
            )

    def _check_parts(self, parts: Sequence[tuple[str, str, str]]) -> None:
        for param, kind, url in parts:
            try:
                content = content_parts.bytes_of(url, kind)
                if kind == "image":
                    self._check_picture(content)
                else:
                    self._check_sound(content)
            except MediaError as error:
                raise MediaFaultError(f"{param}: {error.problem}", error.remedy, param, error.reason) from None
            except SourceError as error:
                raise MediaFaultError(f"{param}: {error.problem}", error.remedy, param, f"unreadable_{kind}") from None

    def _check_picture(self, content: bytes) -> None:
        with images.open_checked(content) as image:
            if (count := image.width * image.height) > self._media.pixels:
                problem = (
                    f"the picture has {image.width} x {image.height} = {count} pixels; the limit is "
                    f"{self._media.pixels}"
                )
                raise MediaError("image_bomb", problem, "scale the picture down")

    def _check_sound(self, content: bytes) -> None:
        with audio.open_audio(content) as sound:
            if not sound.frames:
                raise MediaError("unreadable_audio", "it holds no samples", "send a recording of something")
            if (seconds := sound.frames / sound.samplerate) > self._media.seconds:
                problem = f"the recording has {seconds:.1f} s; the limit is {self._media.seconds:g}"
                raise MediaError("audio_too_long", problem, "cut it into pieces, or raise media.seconds in TEAM.yaml")
            audio.check_length(sound, self._media.seconds)


def data_url(url: str, kind: str, param: str) -> str:
    """Return `url` with a lower-case scheme if it is a base64 data URL of that kind.

    kind: `image` or `audio`. param: path of the field, for the error.
    Raises MediaFaultError otherwise. The server never fetches an address.
    """
    scheme, colon, _ = url[:80].partition(":")
    if not colon or scheme.lower() != "data":
        actual = f"an address ({scheme[:16].lower()}:)" if colon and scheme.isalnum() else "no data URL"
        problem = f"{param} is {actual}; this server fetches nothing"
        raise MediaFaultError(problem, f"send the bytes as a data URL: {_HEADS[kind]}", param, "no_data_url")
    head = url[:80].partition(",")[0].lower()
    if not (head.startswith(f"data:{kind}/") and head.endswith(";base64")):
        problem = f"{param} begins with {url[:40].partition(',')[0]!a}, and is to hold base64 of type {kind}/..."
        raise MediaFaultError(problem, f"{_HEADS[kind]}", param, f"unreadable_{kind}")
    return url if url.startswith(content_parts.SCHEME) else content_parts.SCHEME + url[len(content_parts.SCHEME) :]
