"""Parsing of inbox lines, and gold replies.

The reply of a gold row is right, and its `rejected` is wrong. Another reply to the same question is unknown, unless
both are JSON: then a different value is wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from sartor.core.errors import ConfigError, SourceError
from sartor.core.filesystem import file_digest
from sartor.core.records import Agreed, Example, Feedback, MalformedRow, Origin, canonical, digest
from sartor.curate.sources import row_formats, row_readers
from sartor.curate.sources.safe_paths import open_regular

LinePosition = tuple[int, int]  # number of the file, number of the line


@dataclass(frozen=True, slots=True)
class FeedbackLine:
    """Facts of an inbox line.

    correction, reply: digests; empty if there is none.
    item: digest of the prompt and its reply; empty if the texts are missing.
    known: 1 if the reply is known to be right, -1 if wrong, 0 if unknown.
    """

    position: LinePosition
    receipt: str
    key: str
    user: str
    agent: str
    consent: Agreed
    rating: float | None
    correction: str
    reply: str
    item: str
    known: int

    @property
    def sign(self) -> int:
        """Judgement of the reply: 1 good, -1 bad, 0 none. A correction to another text counts as bad, rated or not."""
        if self.correction:
            if not self.reply:
                return 0
            return 1 if self.correction == self.reply else -1
        if not self.rating:
            return 0
        return 1 if self.rating > 0 else -1

    def merge(self, older: FeedbackLine) -> FeedbackLine:
        """Return the line with gaps filled from an older line of the same key on the same reply."""
        text_source = self if self.item else older
        return replace(
            self,
            user=self.user or older.user,
            rating=older.rating if self.rating is None else self.rating,
            correction=self.correction or older.correction,
            reply=text_source.reply,
            item=text_source.item,
            known=text_source.known,
        )


def merge_feedback(newer: Feedback, older: Feedback) -> Feedback:
    """Return feedback with gaps filled from an older record of the same key on the same reply."""
    text_source = newer if newer.has_words else older
    return replace(
        newer,
        rating=older.rating if newer.rating is None else newer.rating,
        correction=newer.correction or older.correction,
        messages=text_source.messages,
        text=text_source.text,
        reply=text_source.reply,
    )


def line_of(position: LinePosition, feedback: Feedback, known: int) -> FeedbackLine:
    """Return the facts of a line."""
    giver, has_words = feedback.by, feedback.has_words
    item = digest([prompt_key(feedback, with_system=True), feedback.reply])[:32] if has_words else ""
    correction, reply = _text_digest(feedback.correction), _text_digest(feedback.reply) if has_words else ""
    return FeedbackLine(
        position,
        feedback.receipt,
        key=giver.key,
        user=giver.user,
        agent=feedback.agent,
        consent=giver.consent,
        rating=feedback.rating,
        correction=correction,
        reply=reply,
        item=item,
        known=known,
    )


def _text_digest(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "replace")).hexdigest()[:32] if text.strip() else ""


def prompt_key(feedback: Feedback, *, with_system: bool) -> list[list[Any]]:
    """Return the prompt as (role, text) pairs, equal for equal prompts in either form.

    Media stay as they were sent.
    """
    if not feedback.messages:
        return [["user", feedback.text]]
    turns = [(str(message.get("role")), message) for message in feedback.messages]
    return [
        [role, message_text(message)] for role, message in turns if with_system or role not in ("system", "developer")
    ]


def message_text(message: Mapping[str, Any]) -> Any:
    """Return the text of a message in OpenAI format; a list if it holds more than text."""
    content, calls = message.get("content"), message.get("tool_calls")
    if content is None or isinstance(content, str):
        return [content, calls] if calls else content or ""
    parts = content if isinstance(content, Sequence) else []
    if calls or any(part.get("type") != "text" for part in parts):
        return [list(parts), calls]
    return "".join(str(part.get("text", "")) for part in parts)


def read_feedback_lines(
    path: str, size: int, sha256: str, most_bytes: int
) -> Iterator[tuple[int, Feedback | MalformedRow]]:
    """Yield (line number, feedback) of the first `size` bytes of a file.

    A server may be appending to it. Raises MalformedRow if these bytes do not have the digest, OSError if the file
    cannot be read.
    """
    with open_regular(path) as stream:
        if prefix_digest(stream, size) != sha256:
            raise MalformedRow("changed_file", "lines of it were changed after the run began; nothing of it is read")
        stream.seek(0)
        for number, row in row_readers.jsonl(stream, size, 1, most_bytes):
            yield int(number), _feedback(row)


def prefix_digest(stream: Any, size: int) -> str:
    """Return the SHA-256 of the first `size` bytes of an open file, in hex."""
    stream.seek(0)
    hasher = hashlib.sha256()
    while size > 0 and (block := stream.read(min(size, 1 << 20))):
        hasher.update(block)
        size -= len(block)
    return hasher.hexdigest()


def _feedback(row: Any) -> Feedback | MalformedRow:
    if isinstance(row, MalformedRow):
        torn = "the line was cut short by a kill or a full disk"
        return MalformedRow("torn_line", torn) if row.reason == "bad_json" else row
    try:
        feedback = Feedback.from_json(row)
        if not _is_whole(feedback):
            return MalformedRow("not_feedback", "its fields are not those of feedback")
        canonical(feedback.as_json())  # half a surrogate pair has no digest
        return feedback
    except SourceError as error:
        return MalformedRow("newer_schema", error.problem)
    except (UnicodeEncodeError, RecursionError):
        return MalformedRow("not_feedback", "it holds text that no file can hold")
    except (KeyError, TypeError, AttributeError):
        return MalformedRow("not_feedback", "the line is no feedback of a team; its fields are others")


def _is_whole(feedback: Feedback) -> bool:
    texts = (
        feedback.receipt,
        feedback.agent,
        feedback.date,
        feedback.correction,
        feedback.text,
        feedback.reply,
        feedback.by.key,
        feedback.by.user,
        feedback.asker,
    )
    is_rating_valid = feedback.rating is None or (
        isinstance(feedback.rating, int | float) and -1 <= feedback.rating <= 1
    )
    return (
        is_rating_valid
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(message, Mapping) and _is_content(message.get("content")) for message in feedback.messages)
    )


def _is_content(content: Any) -> bool:
    """Return whether a value may be the content of a message: a text, or parts."""
    if isinstance(content, list):
        return all(isinstance(part, Mapping) for part in content)
    return content is None or isinstance(content, str)


_ROW_BYTES = 4 << 20


@dataclass(frozen=True)
class GoldReplies:
    """Right and wrong replies by question."""

    right: Mapping[str, set[str]] = field(default_factory=dict)
    wrong: Mapping[str, set[str]] = field(default_factory=dict)

    def sign(self, feedback: Feedback) -> int:
        """Return 1 for a reply known to be right, -1 for a wrong one, 0 for an unknown one."""
        if not self.right or not feedback.has_words:
            return 0
        question, reply = digest(prompt_key(feedback, with_system=False)), _plain(feedback.reply)
        if reply in self.right.get(question, ()):
            return 1
        if reply in self.wrong.get(question, ()):
            return -1
        values = [item for item in self.right.get(question, ()) if item.startswith("{")]
        return -1 if values and reply.startswith("{") else 0


def gold_replies_digest(path: str) -> str:
    """Return the digest of the file of gold replies; empty if there is none.

    Other gold replies make other rows of an inbox. Raises ConfigError as `read_gold_replies`.
    """
    return file_digest(Path(path).expanduser()) if read_gold_replies(path).right else ""


def read_gold_replies(path: str) -> GoldReplies:
    """Read gold replies from a file in any format that `curate` reads.

    Raises ConfigError for a file that does not exist or holds no gold reply.
    """
    if not path:
        return GoldReplies()
    right: dict[str, set[str]] = {}
    wrong: dict[str, set[str]] = {}
    for _, row in row_readers.read_rows(Path(path).expanduser(), _ROW_BYTES):
        example = _example(row)
        if example is None:
            continue
        turns = [[message.role, message.text] for message in example.prompt if message.role != "system"]
        question = digest(turns)
        right.setdefault(question, set()).add(_plain(example.reply))
        wrong.setdefault(question, set()).update(_plain(message.text) for message in example.rejected)
    if not right:
        raise ConfigError(
            f"inbox.known: {path!r} holds no question with a reply", "rows such as {question: ..., answer: ...}"
        )
    return GoldReplies(right, wrong)


def _example(row: Any) -> Example | None:
    if isinstance(row, MalformedRow) or not isinstance(row, Mapping):
        return None
    form = row_formats.detect_row_format(row)
    if form is None:
        return None
    try:
        return row_formats.parse_row(row, form, Origin("", ""), _no_media)
    except MalformedRow:
        return None


def _no_media(kind: str, value: str) -> NoReturn:
    raise MalformedRow("media", "what is known is known of text alone")


def _plain(reply: str) -> str:
    """Return a reply in a normal form: white space collapsed, a JSON object in canonical form."""
    text = " ".join(reply.split())
    if text.startswith("{"):
        try:
            return canonical(json.loads(text)).decode()
        except (ValueError, RecursionError):
            pass
    return text
