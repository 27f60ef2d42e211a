"""Result of a trace as one HTML page: each training row beside the reply."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sartor.core.errors import ExtraError
from sartor.core.html import render_template
from sartor.core.lazy_import import import_module
from sartor.core.records import Example, Message
from sartor.trace.attribution import Method
from sartor.trace.retrieval import media_of, prompt_text, shared_pieces
from sartor.trace.trace import TracedRow, TraceResult

# characters of a text that are shown
_LONGEST = 1_500
Pieces = Sequence[tuple[bool, str]]


@dataclass(frozen=True)
class RowBeside:
    """Training row beside the query, each text in pieces with whether its words are shared.

    pictures: (of the query, of the row) data URLs of small pictures; empty where there is none.
    scores: (name, value) by method.
    facts: (name, text) of where the row is from.
    """

    traced: TracedRow
    query_prompt: Pieces
    query_reply: Pieces
    prompt: Pieces
    reply: Pieces
    pictures: tuple[str, str]
    scores: Sequence[tuple[str, str]]
    facts: Sequence[tuple[str, str]]


def render(result: TraceResult) -> str:
    """Return the page as HTML."""
    query_picture = _picture(result.query.prompt, result.traced.dataset.path)
    beside = [_beside(result, row, result.method, query_picture) for row in result.examples]
    by_retrieval = [_beside(result, row, Method.RETRIEVAL, query_picture) for row in result.retrieval]
    return render_template(
        "trace/trace.html.j2",
        title="Why did it say that?",
        result=result,
        prompt=_clipped([(False, prompt_text(result.query.prompt))]),
        reply=_clipped([(False, result.query.reply)]),
        media=[(part.kind, part.media[:40]) for part in media_of(result.query.prompt)],
        picture=query_picture,
        main_numbers=_main_numbers(result),
        beside=beside,
        by_retrieval=by_retrieval,
        most_credit=max((abs(credit.score) for credit in result.by_source), default=0.0) or 1.0,
    )


def _main_numbers(result: TraceResult) -> list[tuple[str, str]]:
    says = {None: "not measured", True: "yes", False: "no"}[result.base_says_it]
    return [
        (str(result.method), "method that ranks the rows"),
        ("not measured" if result.lds is None else f"{result.lds:.2f}", "LDS: how far it can be trusted"),
        (says, "the base alone says it"),
        (f"{len(result.traced.rows):,}", "training rows searched"),
    ]


def _beside(result: TraceResult, row: TracedRow, method: Method, query_picture: str) -> RowBeside:
    query_prompt, prompt = shared_pieces(prompt_text(result.query.prompt), row.prompt)
    query_reply, reply = shared_pieces(result.query.reply, row.reply)
    match = row.match
    likenesses = [("prompt", match.prompt), ("reply", match.reply), ("runs", match.spans), ("media", match.media)]
    scores = [(str(method), f"{row.score:.4g}")] if method is not Method.RETRIEVAL else []
    scores += [("retrieval", f"{match.score:.3f}")]
    scores += [(f"alike in {name}", f"{value:.3f}") for name, value in likenesses if value]
    example = row.row.example
    pictures = (query_picture, _picture(example.messages, row.row.dataset.path))
    return RowBeside(
        row,
        query_prompt=_clipped(query_prompt),
        query_reply=_clipped(query_reply),
        prompt=_clipped(prompt),
        reply=_clipped(reply),
        pictures=pictures,
        scores=scores,
        facts=_facts(row),
    )


def _facts(row: TracedRow) -> list[tuple[str, str]]:
    """Return where a row is from, without empty entries."""
    example, span = row.row.example, row.match.shared_reply
    facts = [("row", example.id)]
    for origin in example.origins:
        facts.append(("source", f"{origin.source}, {origin.locator}, licence {origin.licence}, step {origin.step}"))
        if origin.parents:
            facts.append(("made from", ", ".join(origin.parents)))
    shared = f"{span.words} words of the reply" if span.words > 1 else ""
    if span.rows:
        shared += f", a run that stands in {span.rows:,} {'row' if span.rows == 1 else 'rows'}"
    copies = f"{len(row.copies)} rows alike share its credit: {', '.join(row.copies[:5])}" if row.copies else ""
    dropped = f"{row.history.dropped} duplicates were dropped in curation" if row.history.dropped else ""
    facts += [
        ("longest shared run", shared),
        ("changed by", ", ".join(example.steps)),
        ("reviewed by", ", ".join(row.history.reviewers)),
        ("duplicates", "; ".join(text for text in (copies, dropped) if text)),
        ("rehearsal", "a row against forgetting, not of the task" if row.row.is_rehearsal else ""),
        ("pair", "the rejected reply of a preference pair resembles the reply" if row.match.is_rejected else ""),
    ]
    return [(name, text) for name, text in facts if text]


def _clipped(pieces: Pieces) -> list[tuple[bool, str]]:
    """Return the pieces up to _LONGEST characters; the number of those left out ends them."""
    result: list[tuple[bool, str]] = []
    room = _LONGEST
    for is_shared, text in pieces:
        if room > 0:
            result.append((is_shared, text[:room]))
        room -= len(text)
    return [*result, (False, f"… (+{-room:,} characters)")] if room < 0 else result


def _picture(messages: Sequence[Message], folder: Path) -> str:
    """Return the first image of messages as a small data URL; empty without one, or without the extra to decode it."""
    if not any(part.kind == "image" for part in media_of(messages)):
        return ""
    with suppress(ExtraError):
        held_out = import_module("sartor.evaluate.predictions").HeldOut([Example(tuple(messages), ())], folder)
        pictures: dict[int, str] = import_module("sartor.evaluate.report_page").thumbnails(held_out, [0])
        return pictures.get(0, "")
    return ""
