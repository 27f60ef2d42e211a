"""Frozen records: Example, Message, Part, Origin, Drop, Feedback.

An Example's `id` is the digest of its content alone. Two sources that hold the same row therefore give one Example
with two origins, on every machine and in every run.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from sartor.core.errors import SourceError
from sartor.core.installation import upgrade_command

PartKind = Literal["text", "image", "audio"]
ROLES = ("system", "user", "assistant", "tool")
FEEDBACK_SCHEMA = 2
Agreed = Literal["given", "assumed", "refused"]


# json.dumps would build an encoder for each call
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


def canonical(value: Any) -> bytes:
    """Return JSON bytes that are equal exactly if the values are: sorted keys, no spaces, UTF-8.

    Raises UnicodeEncodeError for text with a lone surrogate, which no file can hold.
    """
    return _CANONICAL(value).encode()


def canonical_text(value: Any) -> str:
    """Return JSON text that any file can hold: for evidence, not for digests."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()


def digest(value: Any) -> str:
    """Return the sha256 of `canonical(value)`, hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


def _sorted_json(text: str) -> str:
    """Return JSON text with sorted keys, so that equal values have one digest; other text unchanged."""
    try:
        return json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False) if text else text
    except (ValueError, RecursionError):
        return text


@dataclass(frozen=True)
class Part:
    """A part of a message's content.

    text: the text of a text part.
    media: path below the Dataset, for image and audio.
    """

    kind: PartKind
    text: str = ""
    media: str = ""

    def plain(self) -> dict[str, str]:
        """Return the OpenAI content part."""
        return {"type": self.kind, self.kind: self.text if self.kind == "text" else self.media}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    tool_calls: JSON text of OpenAI's list; text, since its arguments have no fixed form. Rows read from files have
        them as JSON objects, in the order in which they were written.
    reasoning_content: the assistant's reasoning before its reply, for templates that support it.
    weight: factor of the loss of an assistant's turn, 0 or more; a turn of weight 0 is context alone.
    """

    role: str
    content: tuple[Part, ...]
    name: str = ""
    tool_calls: str = ""
    tool_call_id: str = ""
    reasoning_content: str = ""
    weight: float = 1.0

    @classmethod
    def of(cls, role: str, text: str) -> Message:
        """Return a message with one text part."""
        return cls(role, (Part("text", text),))

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part.text for part in self.content if part.kind == "text")

    @property
    def text_with_reasoning(self) -> str:
        """The reasoning, if there is any, and the text behind it."""
        return f"{self.reasoning_content}\n{self.text}" if self.reasoning_content else self.text

    def plain(self, *, with_weight: bool = False) -> dict[str, Any]:
        """Return the OpenAI message with content parts; empty fields are left out.

        with_weight: whether a weight that is not 1 is a field. Prompts have none.
        """
        fields: dict[str, Any] = {
            "name": self.name,
            "tool_calls": self.tool_calls,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
        }
        fields = {name: value for name, value in fields.items() if value}
        if with_weight and self.weight != 1:
            fields["weight"] = float(self.weight)
        parts = [part.plain() for part in self.content]
        return {"role": self.role, "content": parts, **fields}

    def identity(self) -> dict[str, Any]:
        """Return what the id of an Example covers: `plain`, with sorted keys of calls and a weight that is not 1."""
        fields = self.plain(with_weight=True)
        if self.tool_calls:
            fields["tool_calls"] = _sorted_json(self.tool_calls)
        return fields


@dataclass(frozen=True)
class Origin:
    """Provenance of a row.

    source: the declared path.
    locator: position in it (`faq.jsonl:12`).
    licence: SPDX expression.
    parents: ids of the Examples from which this one was made.
    step: name of the step that made it.
    date: ISO date of the row or of its source; empty if unknown.
    made_by: empty for rows written by people. Otherwise JSON text on the synthesis: way, teacher, digests of prompt
        and answer, seed. It is never removed.
    """

    source: str
    locator: str
    licence: str = "NOASSERTION"
    parents: tuple[str, ...] = ()
    step: str = "read"
    date: str = ""
    made_by: str = ""


@dataclass(frozen=True)
class Example:
    """One training row.

    group: rows of one group are never divided between splits.
    rejected: the worse reply of a preference pair.
    steps: curation steps that changed the content, in order.
    rating: people's rating of the last reply, -1 (bad) to 1 (good); 0 if there is none.
    """

    messages: tuple[Message, ...]
    origins: tuple[Origin, ...]
    group: str = ""
    split: str = ""
    weight: float = 1.0
    rejected: tuple[Message, ...] = ()
    tools: str = ""
    steps: tuple[str, ...] = ()
    rating: float = 0.0

    @cached_property
    def id(self) -> str:
        """First 32 hex digits of the sha256 of messages, rejected, tools and rating, without origins.

        The order of keys in tools and calls, which decides how they are rendered, does not count.
        """
        content: dict[str, Any] = {"messages": [message.identity() for message in self.messages]}
        if self.rejected:
            content["rejected"] = [message.identity() for message in self.rejected]
        if self.tools:
            content["tools"] = _sorted_json(self.tools)
        if self.rating:
            content["rating"] = float(self.rating)
        return digest(content)[:32]

    @property
    def is_document(self) -> bool:
        """Whether it is plain text without a prompt, learnt as it is, outside the chat template."""
        return len(self.messages) == 1 and self.messages[0].role == "assistant"

    @property
    def is_derived(self) -> bool:
        """Whether it was made from other Examples, such as a copy with augmented media."""
        return any(origin.parents for origin in self.origins)

    @property
    def is_synthetic(self) -> bool:
        """Whether a teacher or a rule made every origin; such a row is never held out as real data."""
        return bool(self.origins) and all(origin.made_by for origin in self.origins)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Messages before the last reply."""
        return self.messages[:-1]

    @property
    def reply(self) -> str:
        """Text of the last message."""
        return self.messages[-1].text


@dataclass(frozen=True)
class Drop:
    """A rejected row: the reason, its location and the evidence.

    reason: a stable word.
    detail: a sentence.
    kept: id of the Example kept in its place (duplicates).
    score: similarity to it, 0 to 1.
    method: the measure of similarity.
    text: the raw row, cut to 2,000 characters.
    """

    reason: str
    source: str
    locator: str
    detail: str = ""
    step: str = "read"
    id: str = ""
    kept: str = ""
    text: str = field(default="", repr=False)
    score: float | None = None
    method: str = ""


@dataclass(frozen=True)
class FeedbackAuthor:
    """Author of a feedback entry.

    key: id of the API key; empty if the server has no keys.
    user: keyed digest of the client's user id; empty if none was sent.
    consent: whether the feedback may be stored and learnt from; "assumed" if nobody was asked.
    """

    key: str = ""
    user: str = ""
    consent: Agreed = "assumed"


@dataclass(frozen=True)
class Feedback:
    """A user's feedback on a reply: one line of a team's inbox.

    receipt: id of the reply's receipt.
    agent: exact version that gave the reply.
    date: ISO, UTC.
    rating: -1 (bad) to 1 (good).
    correction: the reply that would have been right.
    messages: the prompt in OpenAI form.
    text: a raw prompt, instead of `messages`. Prompt and `reply` are empty if the server no longer had them; a
        correction can then be stored but not learnt from. Without consent only the rating is stored.
    masked: number of personal values replaced by placeholders, by kind.
    asker: keyed digest of the user whose prompt and reply these are, if that is another one than `by.user`.
    """

    receipt: str
    agent: str
    date: str
    rating: float | None = None
    correction: str = ""
    comment: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    reply: str = ""
    by: FeedbackAuthor = FeedbackAuthor()
    masked: Mapping[str, int] = field(default_factory=dict)
    asker: str = ""

    @property
    def has_words(self) -> bool:
        """Whether the prompt is known."""
        return bool(self.messages or self.text)

    def as_json(self) -> dict[str, Any]:
        """Return the feedback as a line of the inbox, which `from_json` reads."""
        fields = {name: value for name, value in asdict(self).items() if name != "asker" or value}
        return {"schema": FEEDBACK_SCHEMA, **fields}

    def is_of(self, user: str) -> bool:
        """Return whether it holds words of a user, by keyed digest: the author, or the one who got the reply."""
        return user in (self.by.user, self.asker)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Feedback:
        """Return the record that `as_json` wrote, of this schema or the one before.

        Raises SourceError for another schema, KeyError or TypeError for an incomplete record.
        """
        if record.get("schema") not in (FEEDBACK_SCHEMA - 1, FEEDBACK_SCHEMA):
            raise SourceError(
                f"feedback of schema {record.get('schema')!r}; this reads {FEEDBACK_SCHEMA}", upgrade_command()
            )
        fields = {key: value for key, value in record.items() if key != "schema"}
        by = FeedbackAuthor(**fields.pop("by", {}))
        return cls(**{**fields, "messages": tuple(fields["messages"]), "by": by})


def count_values(words: Iterable[str]) -> dict[str, int]:
    """Return the number of occurrences of each word, most frequent first, as manifests store counts."""
    return dict(Counter(words).most_common())


class MalformedRow(Exception):
    """A row or file that cannot be used.

    reason: the word under which it is counted.
    detail: a sentence.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class SkippedRow(MalformedRow):
    """A valid row that its source excludes: a Drop, but not a fault under `--strict`."""


TEXT_KEPT = 2000  # characters of a row stored in a Drop as evidence


def drop_of(example: Example, reason: str, detail: str, *, step: str) -> Drop:
    """Return the Drop of an Example: id, location and detail, with the start of its text as evidence."""
    origin = example.origins[0]
    return Drop(
        reason,
        source=origin.source,
        locator=origin.locator,
        detail=detail,
        step=step,
        id=example.id,
        text=evidence_text(example),
    )


def evidence_text(example: Example) -> str:
    """Return the start of a row as readable text, at most TEXT_KEPT characters."""
    return "\n".join(f"{message.role}: {message.text}" for message in example.messages)[:TEXT_KEPT]
