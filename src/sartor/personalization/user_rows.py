"""One row of a user: prompt, reply, rating, correction."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from sartor.core import records
from sartor.core.errors import SourceError
from sartor.core.records import Example, Feedback, MalformedRow, Message, Origin
from sartor.curate.sources import row_formats

SOURCE = "this device"


@dataclass(frozen=True)
class UserRow:
    """One row of a user.

    id: random, so that it reveals nothing of the content.
    date: ISO, UTC.
    rating: -1 (bad) .. 1 (good).
    correction: the reply that would have been right.
    """

    id: str
    date: str
    example: Example
    rating: float | None = None
    correction: str = ""

    @property
    def group(self) -> str:
        """Digest of the prompt: rows with the same prompt are trained on together, or held out together."""
        return records.digest([message.plain() for message in self.example.prompt])[:32]

    @property
    def text(self) -> str:
        """All texts of the row, for a search."""
        return "\n".join([*(message.text_with_reasoning for message in self.example.messages), self.correction])

    @property
    def learnt(self) -> Example | None:
        """Example that a tuning learns: the correction, or the reply unless it was rated bad; else None."""
        if self.correction:
            return replace(self.example, messages=(*self.example.prompt, Message.of("assistant", self.correction)))
        rating = self.example.rating if self.rating is None else self.rating
        return self.example if rating >= 0 else None

    def is_held_out(self, fraction: float) -> bool:
        """Return whether the row is never trained on.

        The prompt's digest alone decides, so that no later row changes it.
        """
        return int(hashlib.sha256(self.group.encode()).hexdigest()[:8], 16) < fraction * (1 << 32)

    def as_json(self) -> dict[str, Any]:
        """Return the fields for `from_json`."""
        fields: dict[str, Any] = {
            "date": self.date,
            "messages": [message.plain(with_weight=True) for message in self.example.messages],
        }
        optional = {"tools": self.example.tools, "correction": self.correction}
        fields |= {name: value for name, value in optional.items() if value}
        if self.rating is not None:
            fields["rating"] = self.rating
        return fields

    @classmethod
    def from_json(cls, id: str, fields: Mapping[str, Any]) -> UserRow:
        """Return the row with the fields of `as_json`. Raises SourceError, KeyError or TypeError for others."""
        return cls(
            id,
            date=str(fields["date"]),
            example=example_of(fields),
            rating=fields.get("rating"),
            correction=str(fields.get("correction", "")),
        )


def now() -> str:
    """Return the present time, ISO, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def example_of(row: Mapping[str, Any] | Example) -> Example:
    """Return the Example of a row in any form that `curate` reads, as {messages: [...]}.

    Raises SourceError, also for rows with media: a device's tuner reads text alone.
    """
    if isinstance(row, Example):
        if any(part.kind != "text" for message in row.messages for part in message.content):
            _refuse_media("", "")
        return row
    form = row_formats.detect_row_format(row)
    try:
        if form is None:
            raise MalformedRow("unknown_form", f"no known form has the fields {sorted(map(str, row))[:8]}")
        example = row_formats.parse_row(row, form, Origin(SOURCE, ""), _refuse_media)
        return replace(example, rating=0.0) if row.get("rating") is not None else example  # UserRow has it
    except MalformedRow as error:
        remedy = "{messages: [{role: user, ...}, {role: assistant, ...}]}"
        raise SourceError(f"the row cannot be read: {error.detail}", remedy) from None


def canary_examples(manifest: Mapping[str, Any]) -> list[Example]:
    """Return held-out prompts of a Release, by its manifest, with the replies that it was signed with."""
    return [
        example_of({"messages": [*item["messages"], {"role": "assistant", "content": item["reply"]}]})
        for item in manifest.get("canaries", [])
    ]


def of_feedback(feedback: Feedback) -> Example:
    """Return the Example of a person's feedback on a reply.

    Feedback without the conversation gives its text and reply alone. Raises SourceError if the server no longer knew
    the prompt, or the row cannot be read.
    """
    if feedback.messages:
        return example_of(
            {"messages": [*feedback.messages, {"role": "assistant", "content": feedback.reply or feedback.correction}]}
        )
    return example_of({"prompt": feedback.text, "completion": feedback.reply or feedback.correction})


def _refuse_media(kind: str, value: str) -> NoReturn:
    """Raise SourceError for a row with media."""
    raise SourceError(
        "the row holds a picture or a recording, and a device learns from text alone",
        'a row with "prompt" and "completion" alone, without parts of the kinds image and audio',
    )
