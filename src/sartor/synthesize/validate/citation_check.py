"""Check that answers are supported by the spans they cite.

A row cites a span in one of three ways: its reply is JSON with an answer and one of the fields of QUOTES, a line of
the reply is `Source: "..."`, or `evidence/synthetic.parquet` states which characters of its parent it cites. The span
must stand in its source up to space, case and quotation marks. The source is the row's prompt or a parent among the
seeds. The answer must contain no number that is in neither span nor question, and must share a part of its content
words with them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from sartor.core.records import Example
from sartor.synthesize.validate.permutation_tests import SHOWN_ROWS, StatisticResult, not_tested
from sartor.synthesize.validate.types import ValidationLimits
from sartor.text.equivalence import TextReading

QUOTES = ("quote", "span", "citation", "cited", "evidence", "source_text", "cited_span")
_ANSWERS = ("answer", "reply", "text", "response")
_LINE = re.compile(r"^\W*(?:source|quote|span|cited|citation|evidence)\W*[:=]\s*(.+)$", re.IGNORECASE | re.MULTILINE)
_SHARED = 0.3  # least fraction of the answer's content words that span or question must share
_FEWEST = 3  # content words from which that is required
_QUOTED = str.maketrans("", "", "\"'“”„«»‘’`*_")  # noqa: RUF001


@dataclass(frozen=True)
class Cited:
    """Answer and cited span of a row.

    sources: texts in which the span may stand; empty if no source is known.
    """

    answer: str
    span: str
    question: str
    sources: tuple[str, ...]


def faults(
    rows: Sequence[Example], seeds: Mapping[str, Example], span_ranges: Mapping[str, tuple[int, int]]
) -> tuple[dict[int, str], int]:
    """Return row index -> fault, and the number of rows that cite a span.

    span_ranges: row id -> cited characters of its parent's text.
    """
    fault_by_row, citing = {}, 0
    for index, row in enumerate(rows):
        if cited := cited_by(row, seeds, span_ranges.get(row.id)):
            citing += 1
            if fault := fault_of(cited):
                fault_by_row[index] = fault
    return fault_by_row, citing


def cited_by(row: Example, seeds: Mapping[str, Example], span_range: tuple[int, int] | None) -> Cited | None:
    """Return the citation of a row, or None.

    None is also returned for a cited position in a parent that is not among the seeds.
    """
    parents = [seeds[parent] for origin in row.origins for parent in origin.parents if parent in seeds]
    documents: tuple[str, ...] = ()
    for parent in parents:
        documents += ("\n".join(message.text for message in parent.messages),)
    question = row.prompt[-1].text if row.prompt else ""
    answer_and_span = _answer_and_span(row.reply)
    if answer_and_span is not None:
        answer, span = answer_and_span
        # a prompt message shorter than span and answer together cannot contain the source
        prompt_texts = tuple(message.text for message in row.prompt if len(message.text) > len(span) + len(answer))
        return Cited(answer, span, question, documents + prompt_texts)
    if span_range is not None and documents:
        start, end = span_range
        return Cited(row.reply, documents[0][start:end], question, documents)
    return None


def _answer_and_span(reply: str) -> tuple[str, str] | None:
    try:
        data = json.loads(reply) if reply.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict):
        span = next((data[name] for name in QUOTES if isinstance(data.get(name), str)), None)
        answer = next((data[name] for name in _ANSWERS if isinstance(data.get(name), str)), "")
        return None if span is None else (answer, span)
    line = _LINE.search(reply)
    if line is None:
        return None
    return (reply[: line.start()] + reply[line.end() :]).strip(), line.group(1)


def fault_of(cited: Cited) -> str:
    """Return the fault of a citation, as a sentence; empty if it holds."""
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
    """Test whether more cited spans fail than the limit allows, by an exact binomial test."""
    if not citing:
        return not_tested("span", limits.span, "no row cites a span")
    part = len(fault_by_row) / citing
    p = float(stats.binomtest(len(fault_by_row), citing, min(limits.span, 1.0), alternative="greater").pvalue)
    detail = f"{len(fault_by_row)} of {citing} cited spans do not hold"
    rows = tuple(ids[index] for index in sorted(fault_by_row))[:SHOWN_ROWS]
    return StatisticResult("span", part, effect=part, limit=limits.span, p=p, detail=detail, rows=rows)
