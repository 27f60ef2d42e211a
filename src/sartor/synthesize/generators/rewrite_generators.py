"""Generators that rewrite rows with a teacher: vary, persona, extend, harder, preference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Example, Message
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
    with_text,
    words,
)

SYSTEM = "You write training data. You answer with the JSON object that is asked for, and nothing else."
PER_ROW, ROWS = "rows made of each row", "make them of that many rows, drawn by the seed; 0 is all"
MOST_PER_ROW = 100


def check_count(per_row: int, rows: int, option: str = "per_row") -> None:
    """Raise ConfigError for invalid counts. option: name of the first one."""
    if not 1 <= per_row <= MOST_PER_ROW or rows < 0:
        problem = f"{option} is {per_row}, rows {rows}; they must be from 1 to {MOST_PER_ROW}, and 0 or more"
        raise ConfigError(problem, "rows: 0" if 1 <= per_row <= MOST_PER_ROW else f"{option}: 2")


def teacher_requests(
    kind: str, counts: tuple[int, int], seeds: Sequence[Example], seed: int, text: Any, schema: Mapping[str, Any]
) -> Iterator[TeacherRequest | Skipped]:
    """Yield the requests for all variants of each drawn seed, or why a seed is skipped.

    counts: (per_row, rows).
    text: (row, number of the variant, random generator) -> the prompt.
    """
    per_row, rows = counts
    for row in sample_seeds(seeds, rows, seed, kind):
        if reason := refusal_reason(row):
            yield Skipped(reason)
            continue
        for number in range(1, per_row + 1):
            request_id = f"{row.id[:16]}.{number}"
            prompt = text(row, number, draw_of(seed, kind, request_id))
            yield TeacherRequest(request_id, (("system", SYSTEM), ("user", prompt)), schema, (row,))


def rewritten(request: TeacherRequest, question: str, reply: str | None, changes: str) -> GeneratedRow | Unusable:
    """Return the parent with another last question, and another reply unless `reply` is None.

    An empty text, or a question equal to the parent's, is unusable.
    """
    (parent,) = request.parents
    question = question.strip()
    if not question or (reply is not None and not reply.strip()):
        return Unusable("empty_answer", "the question or the reply is empty")
    question_message = parent.messages[-2]
    if words(question) == words(question_message.text):
        return Unusable("same_as_seed", "the question is the seed's own")
    last = parent.messages[-1] if reply is None else Message.of("assistant", reply.strip())
    row = replace(parent, messages=(*parent.messages[:-2], with_text(question_message, question), last))
    return GeneratedRow(row, request.number, parents=request.parents, group=split_group(parent), changes=changes)


@dataclass(frozen=True)
class Vary:
    """The same question in other words; the reply is kept word for word."""

    per_row: int = option(1, PER_ROW)
    rows: int = option(0, ROWS)
    kind: Literal["vary"] = "vary"

    def __post_init__(self) -> None:
        check_count(self.per_row, self.rows)

    def requests(self, seeds: Sequence[Example], seed: int) -> Iterator[TeacherRequest | Skipped]:
        """Yield the requests to reword the last question."""

        def text(row: Example, number: int, draw: Any) -> str:
            style = draw.choice(("shorter", "longer", "more formal", "more casual", "as a request", "as spoken"))
            return (
                f"Somebody said:\n{quoted(row.messages[-2].text)}\nSay the same in other words, {style}, so that the "
                "same "
                f"answer is right. Keep names, numbers and codes as they are. Variant {number}."
                '\nAnswer with {"question": "..."}.'
            )

        yield from teacher_requests(
            self.kind, (self.per_row, self.rows), seeds=seeds, seed=seed, text=text, schema=texts("question")
        )

    def build_row(self, request: TeacherRequest, value: Mapping[str, Any]) -> GeneratedRow | Unusable:
        """Return the seed with the new question."""
        return rewritten(request, value["question"], None, "in other words")


@dataclass(frozen=True)
class Persona:
    """The same question as another person would ask it; the reply is kept."""

    personas: tuple[str, ...] = option(
        (
            "a hurried customer",
            "somebody to whom all this is new",
            "an expert of the field",
            "somebody who writes in a second language",
        ),
        "who asks",
    )
    per_row: int = option(1, PER_ROW)
    rows: int = option(0, ROWS)
    kind: Literal["persona"] = "persona"

    def __post_init__(self) -> None:
        check_count(self.per_row, self.rows)
        if not self.personas:
            raise ConfigError("personas is empty", "personas: [a hurried customer]")

    def requests(self, seeds: Sequence[Example], seed: int) -> Iterator[TeacherRequest | Skipped]:
        """Yield the requests to reword the last question for a persona."""

        def text(row: Example, number: int, draw: Any) -> str:
            return (
                f"Somebody said:\n{quoted(row.messages[-2].text)}\nSay it as {self._persona(row, number)} would, so "
                "that the "
                'same answer is right. Keep names, numbers and codes as they are.\nAnswer with {"question": "..."}.'
            )

        yield from teacher_requests(
            self.kind, (self.per_row, self.rows), seeds=seeds, seed=seed, text=text, schema=texts("question")
        )

    def _persona(self, row: Example, number: int) -> str:
        """Return the persona of a variant: in turn, starting with a different one for each row."""
        return self.personas[(int(row.id[:8], 16) + number) % len(self.personas)]

    def build_row(self, request: TeacherRequest, value: Mapping[str, Any]) -> GeneratedRow | Unusable:
        """Return the seed with the new question."""
        number = int(request.number.rpartition(".")[2])
        return rewritten(request, value["question"], None, f"as {self._persona(request.parents[0], number)}")


@dataclass(frozen=True)
class Extend:
    """A question that asks for more than the row's, and a reply; the teacher writes both."""

    per_row: int = option(1, PER_ROW)
    rows: int = option(0, ROWS)
    kind: Literal["extend"] = "extend"

    def __post_init__(self) -> None:
        check_count(self.per_row, self.rows)

    def requests(self, seeds: Sequence[Example], seed: int) -> Iterator[TeacherRequest | Skipped]:
        """Yield the requests for a question that asks for one thing more."""
        yield from teacher_requests(
            self.kind,
            (self.per_row, self.rows),
            seeds=seeds,
            seed=seed,
            text=_grown("asks for one thing more"),
            schema=texts(*_BOTH),
        )

    def build_row(self, request: TeacherRequest, value: Mapping[str, Any]) -> GeneratedRow | Unusable:
        """Return the seed with the new question and reply."""
        return rewritten(request, value["question"], value["answer"], "asks for more")


@dataclass(frozen=True)
class Harder:
    """A harder question on the same subject, and a reply; the teacher writes both."""

    per_row: int = option(1, PER_ROW)
    rows: int = option(0, ROWS)
    kind: Literal["harder"] = "harder"

    def __post_init__(self) -> None:
        check_count(self.per_row, self.rows)

    def requests(self, seeds: Sequence[Example], seed: int) -> Iterator[TeacherRequest | Skipped]:
        """Yield the requests for a harder question."""
        grown = _grown("is harder to answer: it needs another step of thought, or has a condition that matters")
        yield from teacher_requests(
            self.kind, (self.per_row, self.rows), seeds=seeds, seed=seed, text=grown, schema=texts(*_BOTH)
        )

    def build_row(self, request: TeacherRequest, value: Mapping[str, Any]) -> GeneratedRow | Unusable:
        """Return the seed with the new question and reply."""
        return rewritten(request, value["question"], value["answer"], "harder")


_BOTH = ("question", "answer")


def _grown(condition: str) -> Any:
    def text(row: Example, number: int, draw: Any) -> str:
        return (
            f"A conversation:\n{quoted(conversation_text(row))}\n"
            f"Write another last question of the same subject that {condition}, and a right "
            f'answer in the style of the one above. Variant {number}.\nAnswer with {{"question": "...", "answer": '
            f'"..."}}.'
        )

    return text


FLAWS = (
    "states one fact wrongly",
    "leaves out what matters most",
    "answers another question than the one that was asked",
    "is vague where the good reply is exact",
    "is unfriendly",
)


@dataclass(frozen=True)
class Preference:
    """Preference pairs for DPO: the row's reply is the preferred one, and the teacher writes a flawed one."""

    flaws: tuple[str, ...] = option(FLAWS, "what a flawed reply does, one for each pair in turn")
    per_row: int = option(1, PER_ROW)
    rows: int = option(0, ROWS)
    kind: Literal["preference"] = "preference"

    def __post_init__(self) -> None:
        check_count(self.per_row, self.rows)
        if not self.flaws:
            raise ConfigError("flaws is empty", f"flaws: [{FLAWS[0]}]")

    def _flaw(self, row: Example, number: int) -> str:
        return self.flaws[(int(row.id[:8], 16) + number) % len(self.flaws)]

    def requests(self, seeds: Sequence[Example], seed: int) -> Iterator[TeacherRequest | Skipped]:
        """Yield the requests for a flawed reply."""

        def text(row: Example, number: int, draw: Any) -> str:
            return (
                f"A conversation whose last reply is good:\n{quoted(conversation_text(row))}\n"
                f"Write a last reply of about the same length "
                f'that {self._flaw(row, number)}. It teaches to tell good from bad.\nAnswer with {{"reply": "..."}}.'
            )

        yield from teacher_requests(
            self.kind, (self.per_row, self.rows), seeds=seeds, seed=seed, text=text, schema=texts("reply")
        )

    def build_row(self, request: TeacherRequest, value: Mapping[str, Any]) -> GeneratedRow | Unusable:
        """Return the seed with the flawed reply as the rejected one."""
        (parent,) = request.parents
        flawed = value["reply"].strip()
        if not flawed:
            return Unusable("empty_answer", "the flawed reply is empty")
        if words(flawed) == words(parent.reply):
            return Unusable("same_as_seed", "the flawed reply is the good one")
        flaw = self._flaw(parent, int(request.number.rpartition(".")[2]))
        return GeneratedRow(
            replace(parent, rejected=(Message.of("assistant", flawed),)),
            request.number,
            parents=request.parents,
            group=split_group(parent),
            changes=flaw,
        )
