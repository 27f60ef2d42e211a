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
import io
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sartor.core import records
from sartor.core.artifacts import read_manifest
from sartor.core.errors import ConfigError, SartorError, one_of
from sartor.core.filesystem import make_parent, write_file_atomic
from sartor.core.html import clipped, escape_control
from sartor.core.lazy_import import import_module
from sartor.core.records import Message, Part
from sartor.trace.attribution import Attribution, Method
from sartor.trace.credit import RowGroup, RowHistory, SourceCredit, rank_groups, read_histories, sum_by_source
from sartor.trace.measured_trust import LEAST_LDS, measured_lds
from sartor.trace.retrieval import RetrievalIndex, RowMatch, prompt_text, reply_text
from sartor.trace.retrieval_store import open_index, retrieval_scores
from sartor.trace.served_replies import ServedReply, check_served
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery, TrainingRow, open_traced, read_queries

Notice = Callable[[str], object]
F64 = NDArray[np.float64]
By = Literal["source"] | None

TOP = 10
# module and function of each method but retrieval; they import torch, which a look-up does without
_SCORERS = {
    Method.GRADIENT: ("sartor.trace.ensemble", "ensemble_scores"),
    Method.UNROLLED: ("sartor.trace.unrolling", "unrolled_scores"),
}
_CELL = 90  # characters of a text in the table for the terminal
_PRIVATE = 0o600  # a page and a matrix are computed from rows


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


@dataclass(frozen=True)
class ScoreMatrix:
    """Scores of all training rows for many queries, in a file.

    shape: (queries, training rows).
    ids: file with the ids of the rows, a JSON list in the order of the columns.
    """

    file: str
    ids: str
    shape: tuple[int, int]
    method: Method
    lds: float | None
    approximate: str
    wall_s: float

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        return {
            "shape": list(self.shape),
            "scores": self.file,
            "ids": self.ids,
            "method": str(self.method),
            "lds": self.lds,
            "approximate": self.approximate or None,
            "wall_s": round(self.wall_s, 4),
        }


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
    queries: Path | str | None = None,
    scores: Path | str | None = None,
    prepare: bool = False,
    calibrate: bool = False,
    runs: int = 30,
    likelihood: bool = True,
    html: Path | str | None = None,
    replace: bool = False,
    notice: Notice = lambda line: None,
) -> Any:
    """Return the training rows behind a reply of an Adapter or Release, as a TraceResult.

    target: Adapter, Release or personal adapter; None for the one that `receipt` names.
    prompt: text, turns in OpenAI's form, or the body of a request with `messages` and `tools`.
    media: images and recordings before the text.
    by: "source" also sums the scores of each source's rows.
    receipt: file of the receipt of a served reply, whose digests the words are compared with. team: its TEAM.yaml, if
        it did not serve on this machine.
    system: system prompt; None for that of most training rows.
    data: a Dataset whose rows are ranked, by retrieval or gradient, where those of the tuning are not here.
    scores, queries: write the scores of all rows for each line of `queries` to `scores`, and return a ScoreMatrix.
    prepare: make what `gradient` needs, and return what was made. calibrate: measure the LDS of each method by
        `runs` retrains that leave rows out, on `queries` or held-out rows, and return it.
    likelihood: whether to measure the reply's likelihood with and without the adapter, for which the base is opened.
    html: file of a page. replace: whether `html` and `scores` may exist.

    Raises ArtifactError if the rows of the tuning are not here, ConfigError for options that do not fit together or a
    method that these rows do not allow, RequestError for a reply that exceeds the base's context, and the errors of
    the methods.
    """
    began = time.monotonic()
    chosen = _method(method)
    tools, turns = (prompt.get("tools"), prompt["messages"]) if isinstance(prompt, Mapping) else (None, prompt)
    _check_outputs(queries, scores, html, prepare=prepare, calibrate=calibrate, replace=replace)
    if scores is not None or prepare or calibrate:
        _check_no_reply({"--prompt": turns, "--reply": reply, "--image or --audio": media, "--by": by})
    served = None
    if receipt is not None:
        served = _served(Path(receipt), turns, reply, system=system, media=media, team=Path(team) if team else None)
        target, reply = _same_target(served, target), served.reply
    if target is None:
        raise ConfigError("there is no Release or Adapter to trace", "sartor trace RELEASE --prompt P --reply R")
    start = time.monotonic()
    traced = open_traced(target, data)
    read_s = time.monotonic() - start
    if prepare or calibrate:
        return _prepared(traced, queries, runs=runs, is_calibration=calibrate, notice=notice)
    if scores is not None and queries is not None:
        return _write_scores(traced, Path(queries), Path(scores), chosen, notice)
    query = traced.query(turns, reply, system=system, media=media, tools=tools)
    options = TraceOptions(method=chosen, by=by, top=top, likelihood=likelihood)
    result = dataclasses.replace(trace_reply(traced, query, options, notice), served=served)
    result = dataclasses.replace(result, seconds={"read": read_s, **result.seconds, "wall": time.monotonic() - began})
    if html is None:
        return result
    result = dataclasses.replace(result, html=str(html))
    page = import_module("sartor.trace.trace_page").render(result)
    write_file_atomic(Path(html), page.encode(), mode=_PRIVATE)
    return result


def _check_no_reply(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for options of the trace of one reply. given: value by flag."""
    for flag, value in given.items():
        if value:
            raise ConfigError(
                f"{flag} is of the trace of one reply, and --scores, --prepare and --calibrate end without one",
                f"leave {flag} out; or the same command without --scores, --prepare and --calibrate",
            )


def _check_outputs(
    queries: Path | str | None,
    scores: Path | str | None,
    html: Path | str | None,
    *,
    prepare: bool,
    calibrate: bool,
    replace: bool,
) -> None:
    """Raise ConfigError for outputs that exist or that do not fit together."""
    outputs = [(html, "--html"), (scores, "--scores"), (_ids_file(Path(scores)) if scores else None, "--scores")]
    for file, flag in outputs:
        if file is None:
            continue
        if Path(file).is_dir():
            raise ConfigError(f"the output {file} is a directory", f"{flag} {shlex.quote(f'{file}/trace')}, a file")
        if Path(file).exists() and not replace:
            raise ConfigError(f"the output {file} exists", f"choose another {flag}, or add --replace")
        make_parent(Path(file))
    if prepare and calibrate:
        raise ConfigError("a call prepares or calibrates", "--prepare, then the same command with --calibrate")
    if (prepare or calibrate) and (html is not None or scores is not None):
        flag = "--prepare" if prepare else "--calibrate"
        raise ConfigError(f"{flag} ends without a page or a matrix", f"leave out {'--html' if html else '--scores'}")
    if scores is not None and (queries is None or html is not None):
        raise ConfigError(
            "a matrix of scores needs queries, and has no page", "--queries FILE.jsonl --scores FILE.npy alone"
        )
    if queries is not None and scores is None and not calibrate:
        raise ConfigError(
            "queries are for a matrix or a calibration", f"--queries {shlex.quote(str(queries))} --scores FILE.npy"
        )


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
    _check_rows(traced, options.method)
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
    lds, refused = _measured_lds(traced), None
    start = time.monotonic()
    attribution, ranked = retrieval, nearest
    if options.method is not Method.RETRIEVAL:
        score = lds.get(options.method)
        if score is not None and score < LEAST_LDS:
            refused = Refusal(options.method, score)
        else:
            attribution = _scores(traced, [query], options.method, notice)
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


def _method(method: Method | str) -> Method:
    try:
        return Method(method)
    except ValueError:
        raise ConfigError(f"there is no method {method!r}", one_of("--method", Method)) from None


def _check_rows(traced: TracedAdapter, method: Method) -> None:
    """Raise ConfigError if a method needs the tuning's own rows and another Dataset's were named."""
    if method is not Method.RETRIEVAL and "base" not in traced.manifest:
        raise ConfigError(
            f"{traced.artifact.path} was tuned elsewhere, and {method} computes with a base and states that are not "
            "known",
            "--method retrieval, which needs rows alone",
        )
    if method is Method.UNROLLED and not traced.is_own:
        raise ConfigError(
            f"{method} needs the rows of the tuning in their order, and those of {traced.dataset.path} were named",
            "--method retrieval or --method gradient, which work for any rows" + _own_rows_remedy(traced),
        )


def _own_rows_remedy(traced: TracedAdapter) -> str:
    """Return what else helps where another Dataset was named: nothing if the tuning's own rows are not known."""
    return "" if traced.known_recipe is None else "; or leave --data out, for the rows of the tuning"


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


def _prepared(
    traced: TracedAdapter, queries: Path | str | None, *, runs: int, is_calibration: bool, notice: Notice
) -> Any:
    """Make what the method gradient needs, or measure the LDS of each method."""
    _check_rows(traced, Method.GRADIENT)
    if not is_calibration:
        open_index(traced, notice)
        return import_module("sartor.trace.prepare").prepare(traced, notice=notice)
    if not traced.is_own:
        raise ConfigError(
            f"a calibration repeats the tuning on its own rows, and those of {traced.dataset.path} were named",
            "retrieval and gradient rank rows of any Dataset without a calibration" + _own_rows_remedy(traced),
        )
    asked = read_queries(Path(queries), traced) if queries is not None else None
    return import_module("sartor.trace.calibration").calibrate(traced, asked, runs=runs, notice=notice)


def _scores(traced: TracedAdapter, queries: Sequence[TraceQuery], method: Method, notice: Notice) -> Attribution:
    if method is Method.RETRIEVAL:
        return retrieval_scores(traced, queries, notice)
    module, name = _SCORERS[method]
    attribution: Attribution = getattr(import_module(module), name)(traced, queries, notice=notice)
    return attribution


def _measured_lds(traced: TracedAdapter) -> dict[Method, float]:
    """Return the LDS of each method that was calibrated for this adapter on the rows of its tuning."""
    return measured_lds(traced) if traced.is_own else {}


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


def _write_scores(traced: TracedAdapter, queries: Path, file: Path, method: Method, notice: Notice) -> ScoreMatrix:
    """Write the scores of all rows for the queries of a file, and the ids of the rows beside them."""
    _check_rows(traced, method)
    start = time.monotonic()
    attribution = _scores(traced, read_queries(queries, traced), method, notice)
    for note in attribution.notes:
        notice(note)
    lds = _measured_lds(traced).get(method)
    if lds is not None and lds < LEAST_LDS:
        notice(f"{method} has an LDS of {lds:.2f} for this adapter, below {LEAST_LDS}: its scores rank nothing")
    ids = _ids_file(file)
    buffer = io.BytesIO()
    np.save(buffer, attribution.scores, allow_pickle=False)
    write_file_atomic(file, buffer.getvalue(), mode=_PRIVATE)
    write_file_atomic(ids, records.canonical(traced.ids), mode=_PRIVATE)
    return ScoreMatrix(
        str(file),
        ids=str(ids),
        shape=(attribution.scores.shape[0], attribution.scores.shape[1]),
        method=method,
        lds=lds,
        approximate=attribution.approximate,
        wall_s=time.monotonic() - start,
    )


def _ids_file(scores: Path) -> Path:
    """Return the file of the ids beside a matrix of scores."""
    return scores.with_suffix(".ids.json")


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
