"""Protocols of generators with and without a teacher.

An `AskingWay` says what is to be asked of the teacher, and makes a row of an answer or says why it cannot. A
`MakingWay` needs no teacher. Both go through the seeds in order and say of each seed that they can do nothing with why
(`Skipped`), so that every seed is accounted for. A way draws from nothing but (recipe's seed, its kind, the number of
what it makes).

A new way is one new file with its class, and its name in a union of `generators/__init__.py`.
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
    """A seed of which a way makes nothing, and why: a word."""

    reason: str


class Unusable(NamedTuple):
    """An answer of which no row can be made: a word and a sentence."""

    reason: str
    detail: str


@dataclass(frozen=True)
class TeacherRequest:
    """Something for the teacher. number: unique in its way. schema: of the JSON that is wanted. note: what `build_row`
    needs.
    """

    number: str
    messages: tuple[tuple[str, str], ...]
    schema: Mapping[str, Any]
    parents: tuple[Example, ...] = ()
    note: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GeneratedRow:
    """Content of a new row: messages, rejected and tools of `row` count, the rest is filled in by the verb.

    changes: in words. span: what is cited, (first, last + 1) in characters of the document's text.
    """

    row: Example
    number: str
    parents: tuple[Example, ...] = ()
    group: str = ""
    changes: str = ""
    span: tuple[int, int] | None = None


class PromptedGenerator(Protocol):
    """A way that asks a teacher."""

    @property
    def kind(self) -> str:
        """Its name in a recipe."""
        ...

    def requests(self, seeds: Sequence[Example], seed: int) -> Iterator[TeacherRequest | Skipped]:
        """What is to be asked, in an order that depends on nothing else."""
        ...

    def build_row(self, request: TeacherRequest, value: Mapping[str, Any]) -> GeneratedRow | Unusable:
        """The row in an answer, whose JSON fits the ask's schema."""
        ...


class LocalGenerator(Protocol):
    """A way without a teacher. `folder` is what media paths are relative to."""

    @property
    def kind(self) -> str:
        """Its name in a recipe."""
        ...

    def make(self, seeds: Sequence[Example], seed: int, folder: Path) -> Iterator[GeneratedRow | Drop | Skipped]:
        """The rows."""
        ...


def draw_of(*parts: Any) -> random.Random:
    """What is drawn with, by nothing but `parts`."""
    return random.Random(hashlib.sha256(canonical(list(parts))).digest())


def sample_seeds(seeds: Sequence[Example], count: int, *parts: Any) -> list[Example]:
    """That many of the seeds, drawn, in their order; 0 is all."""
    if not count or count >= len(seeds):
        return list(seeds)
    return [seeds[index] for index in sorted(draw_of(*parts).sample(range(len(seeds)), count))]


def refusal_reason(seed: Example) -> str:
    """Why a row cannot be asked otherwise; empty where it can."""
    if seed.is_document:
        return "is_document"
    if seed.messages[-1].role != "assistant" or seed.messages[-2].role != "user":
        return "no_question"
    return "" if seed.messages[-2].text.strip() else "no_text"


def quoted(text: str) -> str:
    """Material in a question, marked off from what is asked of it."""
    return f"{OPEN}\n{text}\n{CLOSE}"


def conversation_text(seed: Example) -> str:
    """A conversation as a teacher reads it."""
    return "\n".join(f"{message.role}: {message.text}" for message in seed.messages)


def with_text(message: Message, text: str) -> Message:
    """The message with other words; its pictures and recordings stay."""
    media = tuple(part for part in message.content if part.kind != "text")
    return replace(message, content=(*media, Part("text", text)))


def words(text: str) -> str:
    """For a comparison: case and white space apart."""
    return " ".join(text.split()).casefold()


def texts(*names: str) -> dict[str, Any]:
    """The schema of an object of texts, all required."""
    properties = {name: {"type": "string", "minLength": 1} for name in names}
    return {"type": "object", "properties": properties, "required": list(names), "additionalProperties": False}
