"""Generators in which a teacher writes questions, dialogues and structured output."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import Example, Message, digest
from sartor.core.splits import split_group
from sartor.synthesize.generator import (
    GeneratedRow,
    Skipped,
    TeacherRequest,
    Unusable,
    conversation_text,
    draw_of,
    quoted,
    refusal_reason,
    sample_seeds,
    texts,
)
from sartor.synthesize.generators.rewrite_generators import ROWS, SYSTEM, check_count
from sartor.text.json_schema import check_schema

_ENDS = re.compile(r"\n\s*\n|(?<=[.!?])\s")


@dataclass(frozen=True)
class Questions:
    """Questions and answers about documents.

    The cited span must stand in the document, character by character (runs of white space count as one), or the answer
    is dropped. This detects a teacher that invents its source.
    """

    per_document: int = option(2, "questions of each document, about its pieces in turn")
    rows: int = option(0, ROWS)
    piece_chars: int = option(
        3000, "longest piece that is shown to the teacher, cut at the end of a paragraph or sentence"
    )
    least_span_chars: int = option(10, "shortest span that shows anything")
    with_passage: bool = option(False, "put the piece before the question, so that the model learns to read it")
    kind: Literal["questions"] = "questions"

    def __post_init__(self) -> None:
        check_count(self.per_document, self.rows, "per_document")
        if self.piece_chars < 200 or self.least_span_chars < 1:
            problem = (
                f"piece_chars is {self.piece_chars}, least_span_chars {self.least_span_chars}; at least 200, and 1"
            )
            raise ConfigError(problem, "piece_chars: 3000" if self.piece_chars < 200 else "least_span_chars: 10")

    def requests(self, seeds: Sequence[Example], seed: int) -> Iterator[TeacherRequest | Skipped]:
        """Yield the requests for questions on the pieces of each document in turn."""
        for document in sample_seeds(seeds, self.rows, seed, self.kind):
            if not document.is_document:
                yield Skipped("no_document")
                continue
            cut = pieces(document.reply, self.piece_chars)
            if not cut:
                yield Skipped("no_text")
                continue
            for number in range(1, self.per_document + 1):
                start, end = cut[(number - 1) % len(cut)]
                piece = document.reply[start:end]
                text = (
                    f"A text:\n{quoted(piece)}\nWrite a question that this text answers, the answer, and copy the "
                    "words of "
                    f"the text that say so, exactly as they stand there. Question {number}."
                    '\nAnswer with {"question": "...", "answer": "...", "span": "..."}.'
                )
                request_id = f"{document.id[:16]}.{number}"
                note = {"start": start, "end": end}
                yield TeacherRequest(
                    request_id,
                    (("system", SYSTEM), ("user", text)),
                    schema=texts("question", "answer", "span"),
                    parents=(document,),
                    note=note,
                )

    def build_row(self, request: TeacherRequest, value: Mapping[str, Any]) -> GeneratedRow | Unusable:
        """Return the question and answer as a row, if the cited span stands in the piece."""
        (document,) = request.parents
        question, answer = value["question"].strip(), value["answer"].strip()
        if not question or not answer:
            return Unusable("empty_answer", "the question or the answer is empty")
        piece = document.reply[request.note["start"] : request.note["end"]]
        if len(value["span"].strip()) < self.least_span_chars:
            return Unusable("span_too_short", f"the cited words are {value['span'].strip()!r}")
        local_span = find_span(value["span"], piece)
        if local_span is None:
            return Unusable("span_not_found", f"the document does not say {value['span'].strip()[:120]!r}")
        user_text = f"{piece}\n\n{question}" if self.with_passage else question
        row = Example((Message.of("user", user_text), Message.of("assistant", answer)), document.origins)
        span = local_span[0] + request.note["start"], local_span[1] + request.note["start"]
        return GeneratedRow(
            row,
            request.number,
            parents=request.parents,
            group=split_group(document),
            changes="asked of the document",
            span=span,
        )


def pieces(text: str, max_chars: int) -> list[tuple[int, int]]:
    """Return (first, last + 1) of the pieces of a text, of at most `max_chars` characters each.

    They end at the end of a paragraph or sentence if their second half has one.
    """
    cut, start = [], 0
    while start < len(text):
        end = min(start + max_chars, len(text))
        if end < len(text):
            ends = [match.end() for match in _ENDS.finditer(text, start + max_chars // 2, end)]
            end = ends[-1] if ends else end
        if text[start:end].strip():
            cut.append((start, end))
        start = end
    return cut


def find_span(span: str, text: str) -> tuple[int, int] | None:
    """Return the position of a span in a text, up to runs of white space; None if it is not there."""
    words = span.split()
    match = re.search(r"\s+".join(map(re.escape, words)), text) if words else None
    return match.span() if match else None


MOST_TURNS = 20


@dataclass(frozen=True)
class Scenarios:
    """Conversations for every persona with every intent and every edge case.

    Rows of the sources, if any, show the style.
    """

    personas: tuple[str, ...] = option(REQUIRED, "who asks")
    intents: tuple[str, ...] = option(REQUIRED, "what they want")
    edge_cases: tuple[str, ...] = option(("nothing out of the ordinary",), "what is odd about it")
    per_cell: int = option(1, "conversations of each cell of the grid")
    turns: int = option(2, f"questions with their replies in a conversation, 1 to {MOST_TURNS}")
    system: str = option("", "system prompt of the rows")
    kind: Literal["scenarios"] = "scenarios"

    def __post_init__(self) -> None:
        if not (self.personas and self.intents and self.edge_cases):
            raise ConfigError("a side of the grid is empty", "personas: [...], intents: [...], edge_cases: [...]")
        if self.per_cell < 1 or not 1 <= self.turns <= MOST_TURNS:
            problem = f"per_cell is {self.per_cell}, turns {self.turns}; at least 1, and 1 to {MOST_TURNS}"
            raise ConfigError(problem, "per_cell: 1" if self.per_cell < 1 else "turns: 2")

    def requests(self, seeds: Sequence[Example], seed: int) -> Iterator[TeacherRequest | Skipped]:
        """Yield the requests for every cell of the grid."""
        turns = {"type": "array", "items": texts("user", "assistant"), "minItems": self.turns, "maxItems": self.turns}
        schema = {
            "type": "object",
            "properties": {"turns": turns},
            "required": ["turns"],
            "additionalProperties": False,
        }
        style_rows = [row for row in seeds if not refusal_reason(row)]
        for cell in itertools.product(self.personas, self.intents, self.edge_cases):
            for number in range(1, self.per_cell + 1):
                request_id = f"{digest(cell)[:12]}.{number}"
                examples = draw_of(seed, self.kind, request_id).sample(style_rows, min(1, len(style_rows)))
                style = "".join(
                    f"A conversation in the wanted style:\n{quoted(conversation_text(row))}\n" for row in examples
                )
                text = (
                    f"{style}Write a conversation between {cell[0]} and an assistant. What is wanted: {cell[1]}. What "
                    "is "
                    f"special: {cell[2]}. {self.turns} questions, each with its reply. Conversation {number}."
                    '\nAnswer with {"turns": [{"user": "...", "assistant": "..."}]}.'
                )
                note = {"cell": "; ".join(cell), "group": f"scenario:{digest(cell)[:16]}"}
                yield TeacherRequest(
                    request_id,
                    (("system", SYSTEM), ("user", text)),
                    schema=schema,
                    parents=tuple(examples),
                    note=note,
                )

    def build_row(self, request: TeacherRequest, value: Mapping[str, Any]) -> GeneratedRow | Unusable:
        """Return the conversation as a row. All rows of a cell form one group."""
        messages = [Message.of("system", self.system)] if self.system else []
        for turn in value["turns"]:
            question, reply = turn["user"].strip(), turn["assistant"].strip()
            if not question or not reply:
                return Unusable("empty_answer", "a turn is empty")
            messages += [Message.of("user", question), Message.of("assistant", reply)]
        return GeneratedRow(
            Example(tuple(messages), ()),
            request.number,
            parents=request.parents,
            group=request.note["group"],
            changes=request.note["cell"],
        )


MODELS = 2


@dataclass(frozen=True)
class Structured:
    """Rows whose reply is JSON of a schema.

    A reply that does not fit is sent back to the teacher with the fault, as often as the recipe's `repairs` allows,
    and then dropped. Rows of the sources, if any, show the style.
    """

    schema_: Any = option(REQUIRED, "the JSON Schema of a reply: a mapping, or the path of a JSON file")
    task: str = option(REQUIRED, "what is asked for, in a sentence: the system prompt of the rows")
    count: int = option(10, "rows to make")
    kind: Literal["schema"] = "schema"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"count is {self.count}; it must be at least 1", "count: 10")
        check_schema(self.reply_schema())

    def reply_schema(self) -> dict[str, Any]:
        """Return the schema of a reply. Raises ConfigError if it cannot be read or is not a mapping."""
        schema = self.schema_
        if isinstance(schema, str):
            try:
                schema = json.loads(Path(schema).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise ConfigError(f"the schema {schema} cannot be read: {error}", "schema: FILE.json") from None
        if not isinstance(schema, Mapping):
            raise ConfigError(f"the schema is {schema!r}, no mapping", "schema: {type: object, properties: {...}}")
        return {str(name): value for name, value in schema.items()}

    def requests(self, seeds: Sequence[Example], seed: int) -> Iterator[TeacherRequest | Skipped]:
        """Yield `count` requests for a question with a reply of the schema."""
        inner = self.reply_schema()
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {"question": {"type": "string", "minLength": 1}, "reply": inner},
            "required": ["question", "reply"],
            "additionalProperties": False,
            **{
                name: inner[name] for name in ("$defs", "definitions") if name in inner
            },  # `#/$defs/x` is resolved from the root
        }
        style_rows = [row for row in seeds if not refusal_reason(row)]
        for number in range(1, self.count + 1):
            examples = draw_of(seed, self.kind, number).sample(style_rows, min(MODELS, len(style_rows)))
            style = "".join(f"An example:\n{quoted(conversation_text(row))}\n" for row in examples)
            text = (
                f"{style}The task: {self.task}\nWrite a new text that somebody could send for this task, and the "
                "right reply "
                f"as JSON of this schema: {json.dumps(inner)}\nText {number} of {self.count}."
                '\nAnswer with {"question": "...", "reply": {...}}.'
            )
            yield TeacherRequest(str(number), (("system", SYSTEM), ("user", text)), schema, tuple(examples))

    def build_row(self, request: TeacherRequest, value: Mapping[str, Any]) -> GeneratedRow | Unusable:
        """Return the question with the reply as compact JSON."""
        question = value["question"].strip()
        if not question:
            return Unusable("empty_answer", "the question is empty")
        reply = json.dumps(value["reply"], ensure_ascii=False, separators=(",", ":"))
        messages = Message.of("system", self.task), Message.of("user", question), Message.of("assistant", reply)
        return GeneratedRow(Example(messages, ()), request.number, request.parents, changes="by the schema")
