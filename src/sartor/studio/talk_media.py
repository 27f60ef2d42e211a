"""Pictures and recordings of a conversation: checked on arrival, shown from the studio's route."""

from __future__ import annotations

import base64
import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import sartor
from sartor.core.errors import ConfigError
from sartor.core.filesystem import PRIVATE, make_private_folder, write_file_atomic
from sartor.serving.http.http_errors import NotFoundError
from sartor.serving.http.request_body import too_large
from sartor.studio.request_guard import MAX_MEDIA_BYTES
from sartor.studio.served_talk import Talk

IMAGE, AUDIO = "image", "audio"
# ending of a stored file -> its MIME type; servers take these kinds alone
TYPES = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "gif": "image/gif",
    "webp": "image/webp",
    "bmp": "image/bmp",
    "tiff": "image/tiff",
    "wav": "audio/wav",
    "mp3": "audio/mpeg",
    "flac": "audio/flac",
    "ogg": "audio/ogg",
}
_NAME = re.compile(rf"[0-9a-f]{{32}}\.({'|'.join(TYPES)})")
_FORMATS = {"wavex": "wav", "mpeg": "mp3"}


def kind_of(name: str) -> str:
    """Return the kind of a stored file: IMAGE or AUDIO."""
    return TYPES[name.rpartition(".")[2]].partition("/")[0]


def store_media(talk: Talk, content: BinaryIO, declared: str) -> str:
    """Check an attached file, store it with the conversation and return its name there.

    declared: MIME type by the browser; it decides only how the file is read, and what was read decides its name.
    Raises TooLargeError, MediaError for a file that is neither a picture nor a recording, ConfigError for a kind that
    no server takes, and ExtraError without the extra that reads media.
    """
    data = content.read(MAX_MEDIA_BYTES + 1)
    if len(data) > MAX_MEDIA_BYTES:
        raise too_large(None, MAX_MEDIA_BYTES)
    kind: Literal["image", "audio"] = "audio" if declared.startswith(("audio/", "video/")) else "image"
    make_private_folder(talk.media)
    with tempfile.TemporaryDirectory(dir=talk.media) as scratch:
        file = Path(scratch) / "media"
        file.write_bytes(data)
        (part,) = sartor.Question.of("", [(kind, file)]).media
    form = part.media.partition(";")[0].rpartition("/")[2]
    form = _FORMATS.get(form, form)
    if form not in TYPES:
        raise ConfigError(f"a file of the kind {form} is not taken", f"send one of {', '.join(TYPES)}")
    name = f"{hashlib.sha256(data).hexdigest()[:32]}.{form}"
    write_file_atomic(talk.media / name, data, mode=PRIVATE)
    return name


def media_file(talk: Talk, name: str) -> tuple[Path, str]:
    """Return a stored file and its MIME type. Raises NotFoundError."""
    if not _NAME.fullmatch(name) or not (talk.media / name).is_file():
        raise NotFoundError("this conversation has no such file", "reload the page")
    return talk.media / name, TYPES[name.rpartition(".")[2]]


def user_message(talk: Talk, prompt: str, media: Sequence[str]) -> dict[str, Any]:
    """Return a user's turn in OpenAI's form, the media before the text. Media that are gone are left out."""
    parts = [_part(talk.media / name) for name in media if (talk.media / name).is_file()]
    if not parts:
        return {"role": "user", "content": prompt}
    text = [{"type": "text", "text": prompt}] if prompt else []
    return {"role": "user", "content": [*parts, *text]}


def _part(file: Path) -> Mapping[str, Any]:
    data, form = base64.b64encode(file.read_bytes()).decode(), file.suffix[1:]
    if kind_of(file.name) == AUDIO:
        return {"type": "input_audio", "input_audio": {"data": data, "format": form}}
    return {"type": "image_url", "image_url": {"url": f"data:{TYPES[form]};base64,{data}"}}
