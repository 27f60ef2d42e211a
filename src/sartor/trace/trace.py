"""Verb trace: rank the training rows behind a reply.

    retrieval   rows that share words with the prompt and the reply: a look-up, shown beside every other method
    gradient    rows whose gradients and hidden states resemble the reply's
    unrolled    predicted rise of the reply's loss if the row is left out of the whole tuning

How far a method can be trusted for one adapter is measured, not assumed: its linear datamodelling score (LDS, Spearman
correlation of predicted and true effects of leaving rows out) is printed, or "not measured". A method whose score is
below LEAST_LDS does not rank; retrieval then does, and the result says so.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sartor.core.artifacts import read_manifest
from sartor.core.errors import ConfigError, SartorError
from sartor.core.filesystem import PRIVATE, check_output_file, write_file_atomic
from sartor.core.html import clipped, escape_control
from sartor.core.lazy_import import import_module
from sartor.core.records import Message, Part
from sartor.trace.attribution import Attribution, Method
from sartor.trace.credit import RowGroup, RowHistory, SourceCredit, rank_groups, read_histories, sum_by_source
from sartor.trace.measured_trust import LEAST_LDS
from sartor.trace.methods import as_method, check_rows, own_lds, scores_of
from sartor.trace.retrieval import RetrievalIndex, RowMatch, prompt_text, reply_text
from sartor.trace.retrieval_store import open_index
from sartor.trace.served_replies import ServedReply, check_served
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery, TrainingRow, open_traced

Notice = Callable[[str], object]
F64 = NDArray[np.float64]
By = Literal["source"] | None

TOP = 10
_CELL = 90  # characters of a text in the table for the terminal


@dataclass(frozen=True)
class Refusal:
    """Method that was asked for and does not rank, with its LDS."""

    method: Method
    lds: float


@dataclass(frozen=True)
class TracedRow:
    """Training row in the result of a trace, with those that are duplicates of it.

    score: that of its group, by the method of the list that it stands in.
    match: what it shares with the query, by retrieval.
    copies: ids of its duplicates and near-duplicates among the training rows.
    """

    row: TrainingRow
    score: float
    match: RowMatch
    history: RowHistory
    copies: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """Text of the user's turns."""
        return prompt_text(self.row.example.messages)

    @property
    def reply(self) -> str:
        """Text of the reply that resembles the query's: the rejected one if that does."""
        example = self.row.example
        return reply_text(example.rejected if self.match.is_rejected else example.messages)

    def as_json(self) -> dict[str, Any]:
        """Return the row's entry in the trace's JSON."""
        example, match = self.row.example, self.match
        origins = [
            {"source": origin.source, "locator": origin.locator, "licence": origin.licence, "step": origin.step}
            for origin in example.origins
        ]
        first = origins[0] if origins else {"source": "", "locator": "", "licence": ""}
        return {
            "id": example.id,
            "score": round(self.score, 6),
            **{name: first[name] for name in ("source", "locator", "licence")},
            "prompt": self.prompt,
            "reply": self.reply,
            "shared": {
                "score": round(match.score, 4),
                "prompt": match.shared_prompt.text,
                "reply": match.shared_reply.text,
                "rows_with_reply_span": match.shared_reply.rows,
                "media": round(match.media, 4),
            },
            "copies": list(self.copies),
            "dropped_duplicates": self.history.dropped,
            "origins": origins,
            "steps": list(example.steps),
            "made_from": sorted({parent for origin in example.origins for parent in origin.parents}),
            "reviewers": list(self.history.reviewers),
            "rehearsal": self.row.is_rehearsal,
            "rejected": match.is_rejected,
        }


@dataclass(frozen=True)
class TraceResult:
    """Training rows behind a reply.

    method: the method that ranks `examples`; retrieval if the one asked for was refused.
    lds: of that method for this adapter; None if it was not measured.
    retrieval: rows by retrieval, where another method ranks; else empty.
    by_source: sums of the method's scores; empty unless asked for.
    base_says_it: whether the base gives the reply a likelihood as high without the adapter; None if not measured.
    likelihood: of the reply, in nats; empty if not measured.
    approximate: reason why the scores are those of another tuning than the one that ran; empty if they are not.
    notes: what else a reader has to know.
    facts: further values of the method.
    rows: number of training rows that were searched.
    seconds: read (the rows), index (opened, or made by the first trace), retrieval, likelihood (by
        base and adapter), the method, and wall.
    """

    traced: TracedAdapter = field(repr=False)
    query: TraceQuery = field(repr=False)
    method: Method
    lds: float | None
    examples: Sequence[TracedRow]
    retrieval: Sequence[TracedRow] = ()
    refused: Refusal | None = None
    by_source: Sequence[SourceCredit] = ()
    base_says_it: bool | None = None
    likelihood: Mapping[str, float] = field(default_factory=dict)
    approximate: str = ""
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    served: ServedReply | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    html: str = ""

    def __repr__(self) -> str:
        best = f", first {self.examples[0].row.example.id[:12]} {self.examples[0].score:.4g}" if self.examples else ""
        lds = "not measured" if self.lds is None else f"{self.lds:.2f}"
        return f"<TraceResult {self.method}, lds {lds}, {len(self.examples)} of {len(self.traced.rows)} rows{best}>"

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        optional: dict[str, Any] = {
            "by_source": [credit.as_json() for credit in self.by_source],
            "retrieval": [row.as_json() for row in self.retrieval],
            "likelihood": dict(self.likelihood),
            "receipt": self.served.as_json() if self.served else None,
            "notes": list(self.notes),
            "facts": dict(self.facts),
            "html": self.html,
        }
        return {
            "method": str(self.method),
            "lds": self.lds,
            "refused": {"method": str(self.refused.method), "lds": self.refused.lds} if self.refused else None,
            "examples": [row.as_json() for row in self.examples],
            "base_says_it": self.base_says_it,
            "approximate": self.approximate or None,
            "target": str(self.traced.artifact.path),
            "dataset": str(self.traced.dataset.path),
            "rows": len(self.traced.rows),
            **{name: value for name, value in optional.items() if value},
            **{f"{name}_s": round(value, 4) for name, value in self.seconds.items()},
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the ranked rows as flat records, best first."""
        flat_rows = []
        for rank, row in enumerate(self.examples, start=1):
            entry = row.as_json()
            shared = entry.pop("shared")
            flat = {name: value for name, value in entry.items() if not isinstance(value, list)}
            counts = {"copies": len(row.copies), "reviewers": ", ".join(row.history.reviewers)}
            spans = {"shared_prompt": shared["prompt"], "shared_reply": shared["reply"]}
            flat_rows.append({"rank": rank, **flat, **counts, "retrieval_score": shared["score"], **spans})
        return flat_rows

    def to_pandas(self) -> Any:
        """Return `to_rows` as a pandas DataFrame. Raises ExtraError without pandas."""
        return import_module("polars").DataFrame(self.to_rows()).to_pandas()

    def table(self) -> list[tuple[str, Any]]:
        """Return the result as a table for the terminal."""
        lines: list[tuple[str, Any]] = [("method", str(self.method)), ("trust", self.trust)]
        if self.refused:
            lines.append(("refused", f"{self.refused.method}: its LDS is {self.refused.lds:.2f}, below {LEAST_LDS}"))
        lines.append(("base says it", self.base_verdict))
        if self.approximate:
            lines.append(("approximate", self.approximate))
        if self.served:
            lines.append(("receipt", f"{self.served.receipt} of {self.served.agent}, {self.served.compared}"))
        if replayed := self.facts.get("replay"):
            losses = (
                f"{replayed['replay_losses'][0]:.3f} nats by the replay, {replayed['adapter_losses'][0]:.3f} by the"
            )
            lines.append(("repeated", f"the reply has {losses} adapter: {replayed['nats']:.4f} apart"))
        lines += [("note", note) for note in self.notes]
        if self.by_source:
            lines.append(("by source", [_cells(credit.as_json()) for credit in self.by_source]))
        lines.append(("rows", [_table_row(row) for row in self.examples] or "none"))
        if self.retrieval:
            lines.append(("by retrieval", [_table_row(row) for row in self.retrieval]))
        if self.html:
            lines.append(("page", self.html))
        lines = [(name, _one_line(value) if isinstance(value, str) else value) for name, value in lines]
        return [*lines, ("took", ", ".join(f"{name} {value:.2f} s" for name, value in self.seconds.items()))]

    @property
    def trust(self) -> str:
        """How far the ranking can be trusted, in a sentence."""
        if self.lds is None:
            meaning = "rows that share words, which need not be causes" if self.method is Method.RETRIEVAL else ""
            measure = f"{self.traced.command} --calibrate measures it"
            parts = [part for part in (meaning, "" if self.traced.unrepeatable else measure) if part]
            return f"not measured ({'; '.join(parts)})" if parts else "not measured"
        return f"LDS {self.lds:.2f}: correlation of its predictions with the effect of leaving rows out"

    @property
    def base_verdict(self) -> str:
        """Comparison of the reply's likelihood with and without the adapter, in a sentence."""
        if self.base_says_it is None:
            return "not measured"
        values = f"{self.likelihood['tuned_nats']:.2f} nats tuned, {self.likelihood['base_nats']:.2f} base"
        if self.base_says_it:
            return f"yes ({values}): the base already says this, so that no row need have taught it"
        return f"no ({values}, {self.likelihood['tokens']} tokens)"


def trace(
    target: Path | str | None = None,
    prompt: str | Sequence[Mapping[str, Any]] | Mapping[str, Any] = "",
    reply: str = "",
    *,
    method: Method | str = Method.RETRIEVAL,
    by: By = None,
    top: int = TOP,
    receipt: Path | str | None = None,
    team: Path | str | None = None,
    system: str | None = None,
    media: Sequence[Part] = (),
    data: Path | str | None = None,
    likelihood: bool = True,
    html: Path | str | None = None,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> TraceResult:
    """Return the training rows behind a reply of an Adapter or Release.

    target: Adapter, Release or personal adapter; None for the one that `receipt` names.
    prompt: text, turns in OpenAI's form, or the body of a request with `messages` and `tools`.
    media: images and recordings before the text.
    by: "source" also sums the scores of each source's rows.
    receipt: file of the receipt of a served reply, whose digests the words are compared with. team: its TEAM.yaml, if
        it did not serve on this machine.
    system: system prompt; None for that of most training rows.
    data: a Dataset whose rows are ranked, by retrieval or gradient, where those of the tuning are not here.
    likelihood: whether to measure the reply's likelihood with and without the adapter, for which the base is opened.
    html: file of a page. replace: whether it may exist.

    `prepare_trace` makes what `gradient` needs beforehand, `calibrate_trace` measures how far each method can be
    trusted for the adapter, and `score_rows` writes the scores of all rows for many replies.

    Raises ArtifactError if the rows of the tuning are not here, ConfigError for options that do not fit together or a
    method that these rows do not allow, RequestError for a reply that exceeds the base's context, and the errors of
    the methods.
    """
    began = time.monotonic()
    chosen = as_method(method)
    if html is not None:
        check_output_file(Path(html), "--html", replace=replace)
    tools, turns = (prompt.get("tools"), prompt.get("messages")) if isinstance(prompt, Mapping) else (None, prompt)
    if turns is None:
        raise ConfigError("the request has no `messages`", '{"messages": [{"role": "user", "content": "..."}]}')
    served = None
    if receipt is not None:
        served = _served(Path(receipt), turns, reply, system=system, media=media, team=Path(team) if team else None)
        target, reply = _same_target(served, target), served.reply
    if target is None:
        raise ConfigError("there is no Release or Adapter to trace", "sartor trace RELEASE --prompt P --reply R")
    start = time.monotonic()
    traced = open_traced(target, data)
    read_s = time.monotonic() - start
    query = traced.query(turns, reply, system=system, media=media, tools=tools)
    options = TraceOptions(method=chosen, by=by, top=top, likelihood=likelihood)
    result = dataclasses.replace(trace_reply(traced, query, options, notice), served=served)
    result = dataclasses.replace(result, seconds={"read": read_s, **result.seconds, "wall": time.monotonic() - began})
    if html is None:
        return result
    result = dataclasses.replace(result, html=str(html))
    page = import_module("sartor.trace.trace_page").render(result)
    write_file_atomic(Path(html), page.encode(), mode=PRIVATE)
    return result


@dataclass(frozen=True)
class TraceOptions:
    """Options of the trace of one reply, as in `trace`. Raises ConfigError for invalid ones."""

    method: Method = Method.RETRIEVAL
    by: By = None
    top: int = TOP
    likelihood: bool = True

    def __post_init__(self) -> None:
        if self.by not in (None, "source"):
            raise ConfigError(f"scores cannot be summed by {self.by!r}", "--by source")
        if self.top < 1:
            raise ConfigError(f"top is {self.top}; it must be 1 or more", f"--top {TOP}")


def trace_reply(traced: TracedAdapter, query: TraceQuery, options: TraceOptions, notice: Notice) -> TraceResult:
    """Return the training rows behind one reply. Raises as `trace`."""
    check_rows(traced, options.method)
    seconds, notes, start = {}, [], time.monotonic()
    index = open_index(traced, notice)
    seconds["index"] = time.monotonic() - start
    start = time.monotonic()
    retrieval = Attribution(Method.RETRIEVAL, index.scores([query]))
    nearest = _rows(traced, query, index, retrieval, options.top)
    seconds["retrieval"] = time.monotonic() - start
    if not traced.is_own:
        notes.append(f"rows of {traced.dataset.path}, which need not be those that the adapter was tuned on")
    elif earlier := traced.start:
        notes.append(
            f"the tuning began from {earlier['path']}, and these rows do not explain what that had learnt: "
            f"sartor trace {shlex.quote(str(earlier['path']))} --prompt P --reply R"
        )
    # before the scores: a reply that does not fit into the base's context ends the command here
    start = time.monotonic()
    measured, problem = _measure_likelihood(traced, query, options, notice)
    seconds["likelihood"] = time.monotonic() - start
    if problem:
        notes.append(f"whether the base says it was not measured: {problem}")
    lds, refused = own_lds(traced), None
    start = time.monotonic()
    attribution, ranked = retrieval, nearest
    if options.method is not Method.RETRIEVAL:
        score = lds.get(options.method)
        if score is not None and score < LEAST_LDS:
            refused = Refusal(options.method, score)
        else:
            attribution = scores_of(traced, [query], options.method, notice)
            ranked = _rows(traced, query, index, attribution, options.top)
            seconds[str(options.method)] = time.monotonic() - start
    used = attribution.method
    if used is Method.RETRIEVAL and lds.get(used, 1.0) < LEAST_LDS:
        notes.append("for this adapter, rows that share words with a reply are hardly those that cause it")
    notes += [*attribution.notes, *sorted({row.history.problem for row in ranked if row.history.problem})]
    return TraceResult(
        traced,
        query,
        method=used,
        lds=lds.get(used),
        examples=ranked,
        retrieval=[] if used is Method.RETRIEVAL else nearest,
        refused=refused,
        by_source=sum_by_source(index.sources, attribution.scores[0]) if options.by else (),
        base_says_it=measured.base_says_it if measured else None,
        likelihood=measured.as_json() if measured else {},
        approximate=attribution.approximate,
        notes=notes,
        facts=attribution.facts,
        seconds=seconds,
    )


def _served(
    receipt: Path,
    prompt: str | Sequence[Mapping[str, Any]],
    reply: str,
    *,
    system: str | None,
    media: Sequence[Part],
    team: Path | None,
) -> ServedReply:
    """Return the served reply of a receipt, after comparing the words with it."""
    if not (prompt or media) or not reply:
        raise ConfigError(
            "a receipt holds digests and no words, and prompt or reply is missing",
            f'--receipt {shlex.quote(str(receipt))} --prompt "the question" --reply "the reply", both as they were',
        )
    if isinstance(prompt, str):
        user = Message("user", (*media, *([Part("text", prompt)] if prompt else [])))
        content: Any = [part.plain() for part in user.content] if media else prompt
        turns: list[Mapping[str, Any]] = [{"role": "user", "content": content}]
    else:
        turns = list(prompt)
    first = [{"role": "system", "content": system}] if system else []
    return check_served(receipt, [*first, *turns], reply, team)


def _same_target(served: ServedReply, target: Path | str | None) -> Path:
    """Return the adapter that gave a served reply. Raises ConfigError if another one was named."""
    if target is not None and Path(target).resolve() != served.path.resolve():
        manifests = [read_manifest(Path(target)), read_manifest(served.path)]
        if manifests[0]["id"] != manifests[1]["id"]:
            raise ConfigError(
                f"the receipt {served.receipt} is of {served.agent} at {served.path}, and {target} was named",
                f"sartor trace {shlex.quote(str(served.path))}, with the same flags; or leave the target out",
            )
    return served.path


def _measure_likelihood(
    traced: TracedAdapter, query: TraceQuery, options: TraceOptions, notice: Notice
) -> tuple[Any, str]:
    """Return the reply's likelihood, or None and the reason.

    Where another method than retrieval has to open the base, its error is raised.
    """
    if not options.likelihood:
        return None, ""
    if "base" not in traced.manifest:
        return None, "the adapter was tuned elsewhere, and its base is not known"
    try:
        return import_module("sartor.trace.base_likelihood").reply_likelihood(traced, query, notice), ""
    except SartorError as error:
        if options.method is not Method.RETRIEVAL:
            raise
        return None, error.problem


def _rows(
    traced: TracedAdapter, query: TraceQuery, index: RetrievalIndex, attribution: Attribution, top: int
) -> list[TracedRow]:
    """Return the rows of the best groups, each with what it shares with the query and where it is from."""
    groups = [group for group in rank_groups(index, attribution.scores[0], attribution.method, top) if group.score > 0]
    first = [traced.rows[group.rows[0]] for group in groups]
    histories = read_histories(first)
    matches = index.matches(query, [group.rows[0] for group in groups])
    return [
        TracedRow(row, group.score, match, histories[row.example.id], _copies(traced, group))
        for row, group, match in zip(first, groups, matches, strict=True)
    ]


def _copies(traced: TracedAdapter, group: RowGroup) -> tuple[str, ...]:
    return tuple(dict.fromkeys(traced.rows[row].example.id for row in group.rows[1:]))


def _table_row(row: TracedRow) -> dict[str, Any]:
    """Return a row's cells for the terminal: one line each, without control characters."""
    entry = row.as_json()
    cells = {
        "score": f"{row.score:.4g}",
        "prompt": row.prompt,
        "reply": row.reply,
        "shared": row.match.shared_reply.text or row.match.shared_prompt.text,
        "where": f"{entry['source']} {entry['locator']}",
        "licence": entry["licence"],
        "copies": len(row.copies) + row.history.dropped,
        "id": entry["id"][:12],
    }
    return _cells(cells)


def _cells(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: clipped(_one_line(value), _CELL) if isinstance(value, str) else value for name, value in values.items()
    }


def _one_line(text: str) -> str:
    return " ".join(escape_control(text).split())
