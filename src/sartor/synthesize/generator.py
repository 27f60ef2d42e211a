"""Protocols of generators (the recipe's `ways`), with and without a teacher.

A `PromptedGenerator` yields requests to the teacher, and makes a row from an answer or states why it cannot. A
`LocalGenerator` needs no teacher. Both process the seeds in order. For each seed that they cannot use they yield the
reason (`Skipped`), so that every seed is accounted for. A generator's random draws depend only on the recipe's seed,
its kind and the number of the row.

To add a generator, write one file with its class and add the class to a union in `generators/__init__.py`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sartor.core.records import Drop, Example, Message, Part, canonical

OPEN, CLOSE = "<<<", ">>>"


class Skipped(NamedTuple):
    """A seed that a generator cannot use. reason: a word."""

    reason: str


class Unusable(NamedTuple):
    """An answer from which no row can be made. reason: a word. detail: a sentence."""

    reason: str
    detail: str


@dataclass(frozen=True)
class TeacherRequest:
    """Request to the teacher.

    number: unique within the generator.
    schema: JSON Schema of the answer.
    note: data that `build_row` needs.
    """

    number: str
    messages: tuple[tuple[str, str], ...]
    schema: Mapping[str, Any]
    parents: tuple[Example, ...] = ()
    note: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GeneratedRow:
    """Content of a new row.

    row: only its messages, rejected reply and tools are used; the verb fills in the rest.
    changes: description of the change.
    span: cited characters (first, last + 1) of the document's text.
    """

    row: Example
    number: str
    parents: tuple[Example, ...] = ()
    group: str = ""
    changes: str = ""
    span: tuple[int, int] | None = None


class PromptedGenerator(Protocol):
    """A generator that asks a teacher."""

    @property
    def kind(self) -> str:
        """Name of the generator in a recipe."""
        ...

    def requests(self, seeds: Sequence[Example], seed: int) -> Iterator[TeacherRequest | Skipped]:
        """Yield the requests to the teacher, in an order that depends only on the arguments and options."""
        ...

    def build_row(self, request: TeacherRequest, value: Mapping[str, Any]) -> GeneratedRow | Unusable:
        """Return the row made from an answer.

        value: JSON of the answer, which fits the schema of the request.
        """
        ...


class LocalGenerator(Protocol):
    """A generator without a teacher."""

    @property
    def kind(self) -> str:
        """Name of the generator in a recipe."""
        ...

    def make(self, seeds: Sequence[Example], seed: int, folder: Path) -> Iterator[GeneratedRow | Drop | Skipped]:
        """Yield the rows. folder: the directory that media paths are relative to."""
        ...


def draw_of(*parts: Any) -> random.Random:
    """Return a random generator that is seeded by `parts` alone."""
    return random.Random(hashlib.sha256(canonical(list(parts))).digest())


def sample_seeds(seeds: Sequence[Example], count: int, *parts: Any) -> list[Example]:
    """Return `count` random seeds in their order; 0 returns all."""
    if not count or count >= len(seeds):
        return list(seeds)
    return [seeds[index] for index in sorted(draw_of(*parts).sample(range(len(seeds)), count))]


def refusal_reason(seed: Example) -> str:
    """Return the reason why a row's question cannot be rewritten; empty if it can."""
    if seed.is_document:
        return "is_document"
    if seed.messages[-1].role != "assistant" or seed.messages[-2].role != "user":
        return "no_question"
    return "" if seed.messages[-2].text.strip() else "no_text"


def quoted(text: str) -> str:
    """Return text between marks that separate it from the instructions of a question."""
    return f"{OPEN}\n{text}\n{CLOSE}"


def conversation_text(seed: Example) -> str:
    """Return a conversation as text for a teacher."""
    return "\n".join(f"{message.role}: {message.text}" for message in seed.messages)


def with_text(message: Message, text: str) -> Message:
    """Return the message with another text; its images and recordings stay."""
    media = tuple(part for part in message.content if part.kind != "text")
    return replace(message, content=(*media, Part("text", text)))


def words(text: str) -> str:
    """Return a text normalized for comparison: without case and extra white space."""
    return " ".join(text.split()).casefold()


def texts(*names: str) -> dict[str, Any]:
    """Return the schema of an object of texts, all required."""
    properties = {name: {"type": "string", "minLength": 1} for name in names}
    return {"type": "object", "properties": properties, "required": list(names), "additionalProperties": False}
