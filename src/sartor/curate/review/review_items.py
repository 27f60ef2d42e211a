"""ReviewItem, Decision, and the state of an item that follows from its decisions.

    {"what": "finding", "kind": "label", "examples": ["3f..."], "reason": "suspicious_label", "detail": "...",
     "evidence": {...}, "suggestion": {"reply": "No."}, "origin": "suspicious_labels"}
    {"what": "decision", "item": "9a...", "verdict": "reject", "by": "Ada", "at": "2026-11-26T05:00:00.000000Z"}

The id of a finding is a digest of the problem and its rows. The same finding is therefore one item even in a Dataset
that was curated again. Of personal data only kind and span are stored; a finding that holds more is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

from sartor.core import parquet_io, records
from sartor.core.errors import SourceError
from sartor.core.installation import upgrade_command
from sartor.core.records import Example

SCHEMA = 1
Kind = Literal["label", "bias", "validation", "personal", "synthetic", "sample"]
Verdict = Literal["accept", "edit", "reject"]
KINDS: tuple[str, ...] = get_args(Kind)
VERDICTS: tuple[str, ...] = get_args(Verdict)
# keys of an edit: text of the last reply, of the last question, or of turns by number; a label's value in a JSON
# reply; the row's weight; or whether personal data is masked
CHANGES = ("reply", "prompt", "turns", "label", "value", "weight", "mask")
SPAN = {"entity", "place", "start", "end", "score"}


@dataclass(frozen=True)
class ReviewItem:
    """One finding.

    examples: ids of the rows; if `row` is set, the id of that row, which is not in the Dataset and would join it.
    slice: description of a finding about many rows ("group=women").
    reason: stable identifier of the problem.
    detail: sentence for people.
    evidence: numbers and names that support the finding.
    suggestion: change (keys from CHANGES) that an edit may take over.
    origin: step or command that reported the finding.
    of: digest of the Dataset that a finding without examples belongs to.
    """

    kind: str
    examples: tuple[str, ...] = ()
    slice: str = ""
    reason: str = ""
    detail: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    suggestion: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    row: Mapping[str, Any] | None = None
    of: str = ""

    @cached_property
    def id(self) -> str:
        """First 16 hex digits of the digest of kind, rows, slice, reason and suggestion.

        For personal data the evidence counts too, and without rows the digest `of` the Dataset. The sentence in
        `detail`, the origin and the time do not count.
        """
        content: dict[str, Any] = {"kind": self.kind, "examples": sorted(self.examples), "slice": self.slice}
        content |= {"reason": self.reason, "suggestion": self.suggestion}
        if self.kind == "personal":
            content["evidence"] = self.evidence
        if not self.examples:
            content["of"] = self.of
        return records.digest(content)[:16]

    @property
    def proposed(self) -> Example | None:
        """The row that would join the Dataset; None if the finding proposes none."""
        return None if self.row is None else parquet_io.example_of(dict(self.row))

    def as_json(self) -> dict[str, Any]:
        """Return the line of `review.jsonl`; `item_of` parses it."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__} | {"examples": list(self.examples)}
        filled = {name: value for name, value in fields.items() if value not in ("", None, [], {})}
        return {"schema": SCHEMA, "what": "finding", "id": self.id, **filled}


@dataclass(frozen=True)
class Decision:
    """Verdict of a person on an item: accept (keep the row), edit (change it) or reject (drop it).

    at: UTC, with microseconds.
    settles: whether it ends a disagreement.
    signature: signature of `document`; {} if unsigned.
    """

    item: str
    verdict: str
    by: str
    at: str
    reason: str = ""
    change: Mapping[str, Any] = field(default_factory=dict)
    settles: bool = False
    signature: Mapping[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> tuple[str, bytes]:
        """Verdict and change, for comparison; two edits agree if their changes are equal."""
        return self.verdict, records.canonical(self.change)

    @property
    def document(self) -> bytes:
        """Bytes that are signed: all fields but the signature."""
        return records.canonical({name: value for name, value in self.as_json().items() if name != "signature"})

    def as_json(self) -> dict[str, Any]:
        """Return the line of `review.jsonl`; `decision_of` parses it."""
        fields = {name: value for name, value in vars(self).items() if value not in ("", {}, False)}
        return {"schema": SCHEMA, "what": "decision", **fields}


def item_of(fields: Mapping[str, Any], *, content_digest: str = "") -> ReviewItem:
    """Parse a finding; `example` may replace `examples` of length one.

    Raises SourceError for a line that is no finding.
    """
    _check_schema(fields)
    kind = fields.get("kind")
    if kind not in KINDS:
        raise SourceError(f"a finding's kind is {kind!r}", f"one of {', '.join(KINDS)}")
    examples = fields.get("examples") or ([fields["example"]] if fields.get("example") else [])
    row = fields.get("row")
    for name in ("evidence", "suggestion", "row"):
        if not isinstance(fields.get(name) or {}, Mapping):
            raise SourceError(f"a finding's {name} is a {type(fields[name]).__name__}", f"{name}: a mapping")
    if not isinstance(examples, list):
        raise SourceError(f"a finding's examples are a {type(examples).__name__}", "examples: a list of ids")
    texts = {name: str(fields.get(name) or "") for name in ("slice", "reason", "detail", "origin")}
    item = ReviewItem(
        kind,
        tuple(map(str, examples)),
        evidence=fields.get("evidence") or {},
        suggestion=fields.get("suggestion") or {},
        row=row,
        of=str(fields.get("of") or content_digest),
        **texts,
    )
    item = _with_row_id(item)
    if not item.examples and not item.slice:
        raise SourceError("a finding names neither rows nor a slice", "examples: [id], or slice: in words")
    if item.kind == "personal":
        _check_personal(item)
    return item


def decision_of(fields: Mapping[str, Any]) -> Decision:
    """Parse a decision.

    Raises SourceError for a line that is no decision.
    """
    _check_schema(fields)
    texts = {name: str(fields.get(name) or "") for name in ("item", "verdict", "by", "at", "reason")}
    if texts["verdict"] not in VERDICTS or not (texts["item"] and texts["by"].strip() and texts["at"]):
        missing = next((name for name in ("item", "by", "at") if not texts[name].strip()), "verdict")
        raise SourceError(
            f"a decision's {missing} is {fields.get(missing)!r}", f"item, verdict ({', '.join(VERDICTS)}), by and at"
        )
    mappings = {name: fields.get(name) or {} for name in ("change", "signature")}
    if wrong := next((name for name, value in mappings.items() if not isinstance(value, Mapping)), ""):
        raise SourceError(f"a decision's {wrong} is no mapping", f"{wrong}: {{...}}")
    return Decision(
        texts["item"],
        texts["verdict"],
        by=texts["by"],
        at=texts["at"],
        reason=texts["reason"],
        change=mappings["change"],
        settles=bool(fields.get("settles")),
        signature=mappings["signature"],
    )


def check_change(change: Mapping[str, Any]) -> None:
    """Raise SourceError for a change without keys, with keys other than CHANGES, or with values of another type."""
    if not change or set(change) - set(CHANGES):
        problem = f"an edit says {', '.join(change) or 'nothing'}"
        raise SourceError(problem, f"what it may say: {', '.join(CHANGES)}")
    for name in ("reply", "prompt", "value", "label"):
        if name in change and not isinstance(change[name], str):
            raise SourceError(f"the {name} of an edit is {change[name]!r:.40} and no text", f'"{name}": "..."')
    turns = change.get("turns") or {}
    if not isinstance(turns, Mapping) or not all(isinstance(text, str) for text in turns.values()):
        raise SourceError(
            f"the turns of an edit are {turns!r:.80}", '"turns": {"0": "...", "2": "..."}, text by number'
        )


def _check_schema(fields: Mapping[str, Any]) -> None:
    if fields.get("schema", SCHEMA) != SCHEMA:
        raise SourceError(f"a line of schema {fields.get('schema')!r}; this reads {SCHEMA}", upgrade_command())


def _with_row_id(item: ReviewItem) -> ReviewItem:
    """Replace the ids of a proposed row by the id of its content.

    Raises SourceError if the row cannot be parsed.
    """
    try:
        proposed = item.proposed
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(
            f"a finding's row is no row of examples/*.parquet: {error!r}",
            '"proposed": {"messages": [{"role": "user", "content": "..."}, ...]}, as parquet_io.example_row(example) '
            "gives it",
        ) from None
    if proposed is None:
        return item
    return replace(item, examples=(proposed.id,))


def _check_personal(item: ReviewItem) -> None:
    """Raise SourceError if a finding of personal data holds more than kinds and spans."""
    spans = item.evidence.get("spans", [])
    are_spans = isinstance(spans, list) and all(isinstance(span, Mapping) and set(span) <= SPAN for span in spans)
    extra = [
        *sorted(set(item.evidence) - {"spans"}),
        *(["detail"] if item.detail else []),
        *(["row"] if item.row else []),
        *(["slice"] if item.slice else []),
        *sorted(set(item.suggestion) - {"mask"}),
    ]
    if extra or not are_spans:
        problem = ", ".join(extra) or "spans of another form"
        remedy = f"evidence: {{spans: [{{{', '.join(sorted(SPAN))}}}]}}, suggestion: {{mask: true}}"
        raise SourceError(f"a finding of personal data holds {problem}; only id, kind and span may be written", remedy)


State = Literal["open", "conflict", "decided"]


@dataclass(frozen=True)
class ItemState:
    """State that follows from an item's decisions.

    decision: the decision in force; None unless the state is "decided".
    by: people behind the decision in force.
    """

    state: State
    decision: Decision | None = None
    by: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """accept, edit or reject; empty until the item is decided."""
        return self.decision.verdict if self.decision else ""


def newest(decisions: Sequence[Decision]) -> dict[str, Decision]:
    """Return the latest decision of each person."""
    return {decision.by: decision for decision in sorted(decisions, key=lambda decision: decision.at)}


def first_opinions(decisions: Sequence[Decision]) -> dict[str, Decision]:
    """Return the first decision of each person that settles nothing; agreement is measured on these."""
    opinions = sorted(
        (decision for decision in decisions if not decision.settles), key=lambda decision: decision.at, reverse=True
    )
    return {decision.by: decision for decision in opinions}


def item_state(decisions: Sequence[Decision], reviewers: int = 1) -> ItemState:
    """Return the state of an item after its decisions.

    Open until `reviewers` people have decided; in conflict while their outcomes differ, until a settling decision. A
    settled item changes only by another settling decision.
    """
    ordered = sorted(decisions, key=lambda decision: decision.at)
    settled = [item for item in ordered if item.settles]
    if settled:
        return ItemState("decided", settled[-1], (settled[-1].by,))
    current = newest(ordered)
    if len({decision.outcome for decision in current.values()}) > 1:
        return ItemState("conflict")
    if len(current) < max(1, reviewers):
        return ItemState("open")
    return ItemState("decided", max(current.values(), key=lambda decision: decision.at), tuple(sorted(current)))
