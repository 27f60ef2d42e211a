"""Checks that answers stand in the cited spans.

A row cites where its reply is JSON with an answer and one of the fields of QUOTES, where a line of it is `Source:
"..."`, or where `evidence/synthetic.parquet` says which characters of its parent it cites. The span must stand in its
source, which is what the row was asked with or a parent among the seeds, word for word but for space, case and
quotation marks; the answer must hold no number that neither the span nor the question has, and share a part of its
telling words with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from sartor.core.records import Example
from sartor.synthesize.validate.permutation_tests import SHOWN_ROWS, StatisticResult, not_tested
from sartor.synthesize.validate.types import ValidationLimits
from sartor.text.equivalence import TextReading

QUOTES = ("quote", "span", "citation", "cited", "evidence", "source_text", "cited_span")
_ANSWERS = ("answer", "reply", "text", "response")
_LINE = re.compile(r"^\W*(?:source|quote|span|cited|citation|evidence)\W*[:=]\s*(.+)$", re.IGNORECASE | re.MULTILINE)
_SHARED = 0.3  # of the answer's telling words
_FEWEST = 3  # telling words from which that is asked
_QUOTED = str.maketrans("", "", "\"'“”„«»‘’`*_")  # noqa: RUF001


@dataclass(frozen=True)
class Cited:
    """A row's answer, the span that it cites, and the texts in which that may stand: none where nobody has its
    source.
    """

    answer: str
    span: str
    question: str
    sources: tuple[str, ...]


def faults(
    rows: Sequence[Example], seeds: Mapping[str, Example], span_ranges: Mapping[str, tuple[int, int]]
) -> tuple[dict[int, str], int]:
    """(row -> what does not hold, how many rows cite something). span_ranges: id of a row -> characters of its
    parent's text.
    """
    fault_by_row, citing = {}, 0
    for index, row in enumerate(rows):
        if cited := cited_by(row, seeds, span_ranges.get(row.id)):
            citing += 1
            if fault := fault_of(cited):
                fault_by_row[index] = fault
    return fault_by_row, citing


def cited_by(row: Example, seeds: Mapping[str, Example], span_range: tuple[int, int] | None) -> Cited | None:
    """What a row cites, None where it cites nothing, or a place in a parent that is not among the seeds."""
    parents = [seeds[parent] for origin in row.origins for parent in origin.parents if parent in seeds]
    documents = tuple("\n".join(message.text for message in parent.messages) for parent in parents)
    question = row.prompt[-1].text if row.prompt else ""
    for answer, span in _answer_and_span(row.reply):
        # a question of a line has no room for its source
        prompt_texts = tuple(message.text for message in row.prompt if len(message.text) > len(span) + len(answer))
        return Cited(answer, span, question, documents + prompt_texts)
    if span_range is not None and documents:
        start, end = span_range
        return Cited(row.reply, documents[0][start:end], question, documents)
    return None


def _answer_and_span(reply: str) -> Iterator[tuple[str, str]]:
    try:
        data = json.loads(reply) if reply.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict):
        span = next((data[name] for name in QUOTES if isinstance(data.get(name), str)), None)
        answer = next((data[name] for name in _ANSWERS if isinstance(data.get(name), str)), "")
        if span is not None:
            yield answer, span
        return
    if line := _LINE.search(reply):
        yield (reply[: line.start()] + reply[line.end() :]).strip(), line.group(1)


def fault_of(cited: Cited) -> str:
    """What does not hold, empty where all does."""
    span = _plain(cited.span)
    if not span:
        return "it cites an empty span"
    if cited.sources and not any(span in _plain(source) for source in cited.sources):
        return f"the span {cited.span[:80]!r} does not stand in its source"
    answer, known = TextReading.of(cited.answer), [TextReading.of(cited.span), TextReading.of(cited.question)]
    numbers = {number for read in known for number in read.numbers}
    if foreign := [number for number in answer.numbers if number not in numbers]:
        return f"the answer says {foreign[0]}, which the span {cited.span[:80]!r} does not"
    telling = answer.content({})
    stems = {stem for read in known for stem in read.stems}
    shared = sum(stem in stems for stem in telling)
    if len(telling) >= _FEWEST and shared < _SHARED * len(telling):
        return f"{shared} of {len(telling)} telling words of the answer stand in the span {cited.span[:80]!r}"
    return ""


def _plain(text: str) -> str:
    return " ".join(text.translate(_QUOTED).casefold().split()).strip(" .…")


def consistency(
    fault_by_row: Mapping[int, str], citing: int, ids: Sequence[str], limits: ValidationLimits
) -> StatisticResult:
    """More spans that do not hold than the limit: an exact binomial test against it."""
    if not citing:
        return not_tested("span", limits.span, "no row cites a span")
    part = len(fault_by_row) / citing
    p = float(stats.binomtest(len(fault_by_row), citing, min(limits.span, 1.0), alternative="greater").pvalue)
    detail = f"{len(fault_by_row)} of {citing} cited spans do not hold"
    rows = tuple(ids[index] for index in sorted(fault_by_row))[:SHOWN_ROWS]
    return StatisticResult("span", part, part, limits.span, p, detail, rows)
