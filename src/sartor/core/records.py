"""Frozen records: Example, Message, Part, Origin, Drop, Feedback.

An Example's `id` is the digest of its content alone, so two sources that hold the same row make one Example with two
origins, on every machine and in every run.
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


# json.dumps would make an encoder at each call
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


def canonical(value: Any) -> bytes:
    """JSON bytes that are equal exactly when the values are: sorted keys, no spaces, UTF-8.

    Raises UnicodeEncodeError for text with a lone surrogate, which no file can hold.
    """
    return _CANONICAL(value).encode()


def canonical_text(value: Any) -> str:
    """`canonical` as text that any file can hold: for evidence, not for digests."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()


def digest(value: Any) -> str:
    """sha256 of `canonical(value)`, hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


@dataclass(frozen=True)
class Part:
    """A piece of a message. `text` holds words; for image and audio, `media` is a path below the dataset."""

    kind: PartKind
    text: str = ""
    media: str = ""

    def plain(self) -> dict[str, str]:
        """The OpenAI content part."""
        return {"type": self.kind, self.kind: self.text if self.kind == "text" else self.media}


@dataclass(frozen=True)
class Message:
    """One turn. `tool_calls` is the JSON text of OpenAI's list, kept as text since its arguments have no fixed form.

    reasoning_content: what an assistant wrote before its reply, for templates that have a place for it.
    """

    role: str
    content: tuple[Part, ...]
    name: str = ""
    tool_calls: str = ""
    tool_call_id: str = ""
    reasoning_content: str = ""

    @classmethod
    def of(cls, role: str, text: str) -> Message:
        """A message of one text part."""
        return cls(role, (Part("text", text),))

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part.text for part in self.content if part.kind == "text")

    def plain(self) -> dict[str, Any]:
        """The OpenAI message with content parts; empty fields are left out."""
        fields = {
            "name": self.name,
            "tool_calls": self.tool_calls,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
        }
        parts = [part.plain() for part in self.content]
        return {"role": self.role, "content": parts, **{key: value for key, value in fields.items() if value}}


@dataclass(frozen=True)
class Origin:
    """Where a row came from. `source` is the declared path, `locator` the place inside it (`faq.jsonl:12`).

    `licence` is an SPDX expression; `parents` are ids of Examples that this one was made from; `step` names what made
    it;
    `date` is the ISO date of the row, or of its source, where one is known. `made_by` is empty where people wrote the
    row; else it says how it was synthesised, as JSON text: way, teacher, digests of prompt and answer, seed. It stays
    for ever.
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
    """One training row. `group` may never straddle a split; `rejected` holds the worse reply of a preference pair.

    `rating` is what people made of the last reply: -1 (bad) .. 1 (good), 0 where nobody said. `steps` names the
    curation steps that changed the content, in order.
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
        """32 hex digits of the sha256 of the content (messages, rejected, tools, rating): not of where it came
        from.
        """
        content: dict[str, Any] = {"messages": [message.plain() for message in self.messages]}
        if self.rejected:
            content["rejected"] = [message.plain() for message in self.rejected]
        if self.tools:
            content["tools"] = self.tools
        if self.rating:
            content["rating"] = float(self.rating)
        return digest(content)[:32]

    @property
    def is_document(self) -> bool:
        """A text without a question: learnt as it stands, outside the chat template."""
        return len(self.messages) == 1 and self.messages[0].role == "assistant"

    @property
    def is_derived(self) -> bool:
        """Made of other Examples, as copies with changed media are."""
        return any(origin.parents for origin in self.origins)

    @property
    def is_synthetic(self) -> bool:
        """Made by a teacher or a rule and by nobody else: such a row is never held out as if it were reality."""
        return bool(self.origins) and all(origin.made_by for origin in self.origins)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last reply."""
        return self.messages[:-1]

    @property
    def reply(self) -> str:
        """The text of the last message."""
        return self.messages[-1].text


@dataclass(frozen=True)
class Drop:
    """A row that was not kept: why, where it stood, and what shows it. `reason` is a stable word, `detail` a sentence.

    `kept` is the id of the Example that stands in its place (duplicates), `score` (0..1) and `method` say how alike
    they are and by what measure. `text` is the raw row, cut to 2,000 characters.
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
    """Who says something of a reply. key: id of the API key, "" where there are none. user: keyed digest of the id
    that the key
    gave for a person, "" for none. consent: whether what was said may be kept and learnt from; assumed where nobody
    asked.
    """

    key: str = ""
    user: str = ""
    consent: Agreed = "assumed"


@dataclass(frozen=True)
class Feedback:
    """What a person said of a reply: one line of a team's inbox.

    receipt: of the reply. agent: the exact version that gave it. date: ISO, UTC. rating: -1 (bad) .. 1 (good).
    correction: what
    the reply should have been. messages: the prompt in OpenAI form, or `text`, a raw one; with `reply` they are empty
    where the server no longer knew them, so that a correction can be kept but not learnt from. Without consent there
    is the rating alone.
    masked: how many values of personal data have placeholders in their stead, by kind.
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

    @property
    def has_words(self) -> bool:
        """Whether it is known what was asked."""
        return bool(self.messages or self.text)

    def as_json(self) -> dict[str, Any]:
        """A line of the inbox; `from_json` turns it back into an equal record."""
        return {"schema": FEEDBACK_SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Feedback:
        """The record that `as_json` said, of this schema or the one before. Raises SourceError for another, KeyError
        or TypeError for no record.
        """
        if record.get("schema") not in (FEEDBACK_SCHEMA - 1, FEEDBACK_SCHEMA):
            raise SourceError(
                f"feedback of schema {record.get('schema')!r}; this reads {FEEDBACK_SCHEMA}", upgrade_command()
            )
        fields = {key: value for key, value in record.items() if key != "schema"}
        by = FeedbackAuthor(**fields.pop("by", {}))
        return cls(**{**fields, "messages": tuple(fields["messages"]), "by": by})


def count_values(words: Iterable[str]) -> dict[str, int]:
    """How often each word occurs, most frequent first: the form of every count in a manifest."""
    return dict(Counter(words).most_common())


class MalformedRow(Exception):
    """A row or file that cannot be used: the word it is counted under, and a sentence."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class SkippedRow(MalformedRow):
    """A row that is as it should be, and is not used for a reason of its source: a Drop, and no fault under
    `--strict`.
    """


TEXT_KEPT = 2000  # characters of a row that a Drop holds as evidence


def drop_of(example: Example, reason: str, detail: str, *, step: str) -> Drop:
    """The Drop of an Example: id, place and detail, and the start of its text as evidence."""
    origin = example.origins[0]
    return Drop(reason, origin.source, origin.locator, detail, step, example.id, text=evidence_text(example))


def evidence_text(example: Example) -> str:
    """The start of a row as a person reads it."""
    return "\n".join(f"{message.role}: {message.text}" for message in example.messages)[:TEXT_KEPT]
