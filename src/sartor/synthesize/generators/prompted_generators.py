"""`questions`: a question about a document, its answer, and the words of the document that say so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Example, Message
from sartor.core.splits import split_group
from sartor.curate.synthesize.contract import Ask, Made, Skipped, Unusable, quoted, some, texts
from sartor.curate.synthesize.ways.rewrites import ROWS, SYSTEM, check_count

_ENDS = re.compile(r"\n\s*\n|(?<=[.!?])\s")


@dataclass(frozen=True)
class Questions:
    """Question and answer from documents. The cited span must stand in the document, character by character (runs of white
    space count as one), or the answer is dropped: a teacher that makes its source up is found out here.
    """

    per_document: int = option(2, "questions of each document, about its pieces in turn")
    rows: int = option(0, ROWS)
    piece_chars: int = option(3000, "longest piece that is shown to the teacher, cut at the end of a paragraph or sentence")
    least_span_chars: int = option(10, "shortest span that shows anything")
    with_passage: bool = option(False, "put the piece before the question, so that the model learns to read it")
    kind: Literal["questions"] = "questions"

    def __post_init__(self) -> None:
        check_count(self.per_document, self.rows)
        if self.piece_chars < 200 or self.least_span_chars < 1:
            problem = f"piece_chars is {self.piece_chars}, least_span_chars {self.least_span_chars}; at least 200, and 1"
            raise ConfigError(problem, "piece_chars: 3000")

    def asks(self, seeds: Sequence[Example], seed: int) -> Iterator[Ask | Skipped]:
        """See AskingWay."""
        for document in some(seeds, self.rows, seed, self.kind):
            if not document.is_document:
                yield Skipped("no_document")
                continue
            cut = pieces(document.reply, self.piece_chars)
            if not cut:
                yield Skipped("no_text")
                continue
            for number in range(1, self.per_document + 1):
                start, end = cut[(number - 1) % len(cut)]
                shown = document.reply[start:end]
                text = (
                    f"A text:\n{quoted(shown)}\nWrite a question that this text answers, the answer, and copy the words of "
                    f"the text that say so, exactly as they stand there. Question {number}."
                    '\nAnswer with {"question": "...", "answer": "...", "span": "..."}.'
                )
                place = f"{document.id[:16]}.{number}"
                note = {"start": start, "end": end}
                yield Ask(place, (("system", SYSTEM), ("user", text)), texts("question", "answer", "span"), (document,), note)

    def made(self, ask: Ask, value: Mapping[str, Any]) -> Made | Unusable:
        """See AskingWay."""
        (document,) = ask.parents
        question, answer = value["question"].strip(), value["answer"].strip()
        if not question or not answer:
            return Unusable("empty_answer", "the question or the answer is empty")
        shown = document.reply[ask.note["start"] : ask.note["end"]]
        if len(value["span"].strip()) < self.least_span_chars:
            return Unusable("span_too_short", f"the cited words are {value['span'].strip()!r}")
        place = found(value["span"], shown)
        if place is None:
            return Unusable("span_not_found", f"the document does not say {value['span'].strip()[:120]!r}")
        asked = f"{shown}\n\n{question}" if self.with_passage else question
        row = Example((Message.of("user", asked), Message.of("assistant", answer)), document.origins)
        span = place[0] + ask.note["start"], place[1] + ask.note["start"]
        return Made(row, ask.number, ask.parents, split_group(document), "asked of the document", span)


def pieces(text: str, most: int) -> list[tuple[int, int]]:
    """(first, last + 1) of pieces of at most `most` characters, cut at ends of paragraphs or sentences where there is one."""
    cut, start = [], 0
    while start < len(text):
        end = min(start + most, len(text))
        if end < len(text):
            ends = [match.end() for match in _ENDS.finditer(text, start + most // 2, end)]
            end = ends[-1] if ends else end
        if text[start:end].strip():
            cut.append((start, end))
        start = end
    return cut


def found(span: str, text: str) -> tuple[int, int] | None:
    """Where a span stands in a text: as it is, but for runs of white space."""
    words = span.split()
    match = re.search(r"\s+".join(map(re.escape, words)), text) if words else None
    return match.span() if match else None
