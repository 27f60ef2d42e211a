"""Prompt and reply of the verb ask."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sartor.core.artifacts import Artifact
from sartor.core.errors import ConfigError, MediaError, RequestError
from sartor.core.lineage import ancestry
from sartor.core.records import Message, Part, PartKind
from sartor.media import audio as sounds
from sartor.media import content_parts
from sartor.media import images as pictures
from sartor.trace.retrieval import prompt_text
from sartor.trace.retrieval_store import nearest_rows
from sartor.trace.traced_adapter import TraceQuery

STDIN = "-"
_REMEDIES = {
    "image": "give a picture, or --audio FILE for a recording",
    "audio": "give a recording, or --image FILE for a picture",
}


@dataclass(frozen=True)
class AskPrompt:
    """Text with the media before it, in their order, as data URLs."""

    text: str
    media: tuple[Part, ...] = ()

    @classmethod
    def of(
        cls,
        text: str,
        media: Sequence[tuple[PartKind, Path | str]] = (),
        *,
        images: Iterable[Path | str] = (),
        audio: Iterable[Path | str] = (),
    ) -> AskPrompt:
        """Return the prompt with media from files; `-` is standard input.

        media: (kind, file) in any order; images and audio follow.
        Raises MediaError for a file that is absent or is no image or recording, ConfigError if `-` occurs twice.
        """
        files = [*media, *(("image", file) for file in images), *(("audio", file) for file in audio)]
        if sum(str(file) == STDIN for _, file in files) > 1:
            raise ConfigError(
                "standard input is named twice, and can be read once",
                "--image FILE or --audio FILE in place of one `-`",
            )
        return cls(text, tuple(read_media("image" if kind == "image" else "audio", file) for kind, file in files))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of media, `image` and `audio`, in the prompt."""
        return tuple(sorted({part.kind for part in self.media}))

    @property
    def message(self) -> Message:
        """User message of the prompt."""
        return Message("user", (*self.media, *([Part("text", self.text)] if self.text else [])))

    def plain(self) -> dict[str, Any]:
        """Return the message of a request; its content is a string if there is no media."""
        return self.message.plain() if self.media else {"role": "user", "content": self.text}

    def media_digests(self) -> list[dict[str, str]]:
        """Return kind and sha256 of each media part, for the reply's JSON."""
        return [
            {"kind": part.kind, "sha256": hashlib.sha256(content_parts.bytes_of(part.media)).hexdigest()}
            for part in self.media
        ]

    def check(self, reads: Iterable[str], agent: str) -> None:
        """Raise ConfigError for an empty prompt, RequestError for media that the agent cannot read.

        reads: the kinds that `agent` reads besides text.
        """
        if not self.text.strip() and not self.media:
            raise ConfigError("the prompt is empty", 'sartor ask RELEASE "a question"')
        if unreadable := [kind for kind in self.kinds if kind not in set(reads)]:
            raise RequestError(
                f"{agent} reads {', '.join(['text', *reads])}, and the question holds {' and '.join(unreadable)}",
                "ask without, or ask one that was tuned with a tower for it",
            )


def as_prompt(prompt: str | AskPrompt) -> AskPrompt:
    """Return a prompt as an AskPrompt."""
    return prompt if isinstance(prompt, AskPrompt) else AskPrompt(prompt)


def read_media(kind: PartKind, file: Path | str) -> Part:
    """Return a file as a part that holds its bytes, after a check of its header. Raises MediaError."""
    if str(file) == STDIN:
        content = sys.stdin.buffer.read()
    else:
        try:
            content = Path(file).expanduser().read_bytes()
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise MediaError("missing_media", f"{str(file)[:200]!r} cannot be read: {reason}", "give a file") from None
    try:
        mime = mime_of(kind, content)
    except MediaError as error:
        remedy = error.remedy if error.reason not in ("unreadable_image", "unreadable_audio") else _REMEDIES[kind]
        raise MediaError(
            error.reason, f"{str(file)[:200]!r} cannot be read as {kind}: {error.problem}", remedy
        ) from None
    return Part(kind, media=content_parts.url_of(content, mime))


def mime_of(kind: str, content: bytes) -> str:
    """Return the MIME type of a media file by its header. Raises MediaError for another kind."""
    if kind == "image":
        with pictures.open_checked(content) as image:
            return f"image/{str(image.format).lower()}"
    with sounds.open_audio(content) as sound:
        sounds.check_length(sound, sounds.MOST_SECONDS)
        return f"audio/{str(sound.format).lower()}"


@dataclass(frozen=True)
class SpokenFile:
    """Reply as speech.

    text: its spoken form.
    left_out: counts by kind of what was written and is not spoken as it stands.
    """

    file: str
    text: str
    seconds: float
    voice: str
    left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class AskReply:
    """Reply to one prompt.

    nearest: training Examples like the prompt.
    nearest_note: the reason if there are none.
    receipt: id of the receipt, if one is stored.
    spoken: the audio file, if the reply was spoken.
    media: kind and sha256 of the media in the prompt.
    is_released: false for an Adapter, which no gate has passed.
    """

    prompt: str
    reply: str
    finish: str
    agent: str
    reason: str
    nearest: list[dict[str, Any]]
    nearest_note: str = ""
    receipt: str | None = None
    spoken: SpokenFile | None = None
    media: list[dict[str, str]] = field(default_factory=list)
    is_released: bool = True

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        fields = {"prompt": self.prompt, "reply": self.reply, "finish": self.finish, "agent": self.agent}
        note = {"nearest_note": self.nearest_note} if self.nearest_note else {}
        spoken = {"spoken": asdict(self.spoken)} if self.spoken else {}
        media = {"media": self.media} if self.media else {}
        unreleased = {} if self.is_released else {"unreleased": True}
        said = {**fields, "reason": self.reason, "receipt": self.receipt, "nearest": self.nearest}
        return {**said, **note, **spoken, **media, **unreleased}


def nearest_examples(
    release: Artifact, prompt: str, reply: str, top: int, media: Sequence[Part] = ()
) -> tuple[list[dict[str, Any]], str]:
    """Return the training Examples that share most words with a prompt and its reply, and a note if there are none.

    media: images and recordings in the prompt. Scores are in 0..1 (trace/retrieval.py). This is a look-up and not
    attribution: it shows what the model saw that resembles question and reply, not what caused the reply.
    """
    dataset = ancestry.find_parent(release, "dataset")
    if dataset is None:
        return [], "the Dataset is not on this machine, or was changed; `sartor index DIR` finds a moved one"
    query = TraceQuery((AskPrompt(prompt, tuple(media)).message,), reply)
    nearest = nearest_rows(release, dataset, query, top)
    if not nearest:
        return [], "no training row shares a word with the question or the reply"
    return [
        {
            "id": example.id,
            "score": round(score, 4),
            "prompt": prompt_text(example.messages) or example.reply,
            "reply": example.reply,
            "source": example.origins[0].source,
            "locator": example.origins[0].locator,
            "licence": example.origins[0].licence,
        }
        for score, example in nearest
    ], ""
