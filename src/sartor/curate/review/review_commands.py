"""Verbs of review: list, decide, sample, export, apply.

The command line calls them, and a page may call them too. Each takes paths and strings and returns plain values.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sartor.core import signing
from sartor.core.artifacts import check_output_free, kind_of
from sartor.core.errors import ConfigError, ConflictError
from sartor.core.home import home
from sartor.curate.review import quality_control, review_file
from sartor.curate.review.apply_decisions import apply
from sartor.curate.review.quality_control import agreements
from sartor.curate.review.review_items import KINDS, VERDICTS, Decision, ReviewItem, check_change, newest
from sartor.curate.review.review_store import ReviewEntry, ReviewPolicy, View, open_review, signer
from sartor.curate.review.row_edits import apply_edit, everywhere_masked, masked_text, rows_of

KEY = "keys/review"  # below SARTOR_HOME: default signing key, used if it exists
MOST_NAME = 200


@dataclass(frozen=True)
class Opinion:
    """Verdict of a person on an item: accept (keep the row), edit (change it) or reject (drop it).

    change: the edit, with keys from `review_items.CHANGES`; the item's suggestion if None.
    settles: whether the verdict ends a disagreement.
    key: private key that signs the decision; by default that of SARTOR_HOME/keys/review, if there is one.
    """

    verdict: str
    by: str
    reason: str = ""
    change: Mapping[str, Any] | None = None
    settles: bool = False
    key: Path | None = None

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ConfigError(f"there is no verdict {self.verdict!r}", f"one of {', '.join(VERDICTS)}")
        if not self.by.strip():
            raise ConfigError("a decision has a person's name", "--by 'Ada Lovelace'")
        if not self.by.isprintable() or len(self.by) > MOST_NAME:
            raise ConfigError(f"{self.by[:40]!a} is no name", "--by 'Ada Lovelace'")


def decide(view: View, key: str, opinion: Opinion) -> tuple[ReviewEntry, bool]:
    """Store a person's decision; return the item as it stands afterwards, and whether the decision is new.

    The same decision of the same person about the same item is stored once. Raises ConfigError for a decision that the
    item cannot have, ConflictError if there is nothing to settle.
    """
    assert view.queue is not None
    entry = view.entry(key)
    item = entry.item
    change = _change(view, item, opinion)
    if opinion.settles and entry.standing.state != "conflict" and not any(other.settles for other in entry.decisions):
        people = ", ".join(sorted({other.by for other in entry.decisions})) or "nobody"
        raise ConflictError(
            f"there is nothing to settle about {item.id}: {people} decided, none differs", "without --settle"
        )
    reason = masked_text(opinion.reason) if item.kind == "personal" else opinion.reason
    decision = Decision(
        item.id,
        opinion.verdict,
        by=opinion.by.strip(),
        at=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        reason=reason,
        change=change,
        settles=opinion.settles,
    )
    earlier = newest([other for other in entry.decisions if other.settles == opinion.settles]).get(decision.by)
    if earlier is not None and replace(earlier, at="", signature={}) == replace(decision, at=""):
        return entry, False
    private_key = opinion.key
    if not private_key and (home() / KEY).is_dir():
        private_key = home() / KEY
    if private_key:
        signature = signing.signature_of(decision.document, signing.open_private(private_key, "review"), "review")
        decision = replace(decision, signature=signature)
    view.queue.add(view.dataset.id, [item], [decision])
    decisions = (*entry.decisions, decision)
    return ReviewEntry(item, decisions, view.state_of(list(decisions))), True


def _change(view: View, item: ReviewItem, opinion: Opinion) -> dict[str, Any]:
    """Return the fields of an edit after a trial on the row; an empty dict for other verdicts."""
    if opinion.verdict != "edit":
        if opinion.verdict == "reject" and not item.examples:
            raise ConfigError(
                f"{item.id} is about {item.slice!r} and names no row that could go",
                "mend the data (sources, steps, weights) and curate again; or accept it with a reason",
            )
        return {}
    if len(item.examples) != 1:
        raise ConfigError(
            f"{item.id} is about {len(item.examples)} rows; an edit is of one",
            f"sartor review reject {view.dataset.path} {item.id} --by NAME, or accept in place of reject",
        )
    fields = dict(item.suggestion if opinion.change is None else opinion.change)
    if not fields:
        raise ConfigError(
            f"{item.id} suggests no change", "say what is to stand there: --reply TEXT, or --prompt TEXT"
        )
    check_change(fields)
    example = item.proposed or rows_of(view.dataset, item.examples).get(item.examples[0])
    if example is None:
        raise ConfigError(f"row {item.examples[0]} is not in {view.dataset.path.name}", "sartor review list DATASET")
    apply_edit(example, fields)
    return fields


DRAWN = "drawn"


def review_counts(dataset: Path | str, queue: str = "", *, reviewers: int = 1, signed: bool = False) -> dict[str, int]:
    """Count the items of a Dataset: open, in conflict (a part of the open ones), and decided, by verdict."""
    with open_review(dataset, queue, ReviewPolicy(reviewers, signed)) as view:
        return _counts(view.entries())


def review_list(
    dataset: Path | str,
    queue: str = "",
    *,
    kind: str = "",
    state: str = "open",
    by: str = "",
    most: int = 50,
    rule: ReviewPolicy | None = None,
) -> dict[str, Any]:
    """List up to `most` items of a Dataset, with the counts of all items.

    state: open (includes conflicts), conflict, decided or all.
    by: list only items that this person has not decided, without the decisions of others. A second reviewer should not
    know them.
    Raises ConfigError for an unknown kind or state.
    """
    if kind and kind not in KINDS:
        raise ConfigError(f"there is no kind {kind!r}", f"one of {', '.join(KINDS)}")
    if state not in ("open", "conflict", "decided", "all"):
        raise ConfigError(
            f"there is no state {state!r}", "--state open, --state conflict, --state decided or --state all"
        )
    with open_review(dataset, queue, rule) as view:
        entries = view.entries()
        matches = [entry for entry in entries if not kind or entry.item.kind == kind]
        if by:
            matches = [entry for entry in matches if by not in newest(entry.decisions)]
        elif state == "open":
            matches = [entry for entry in matches if entry.is_open]
        elif state != "all":
            matches = [entry for entry in matches if entry.standing.state == state]
        lines = [_line(entry, blind=bool(by)) for entry in matches[:most]]
        return {**_counts(entries), "listed": len(lines), "more": len(matches) - len(lines), "items": lines}


def review_show(dataset: Path | str, item: str, queue: str = "", *, reveal: bool = False) -> dict[str, Any]:
    """Show one item: the finding, its rows, what each verdict would do, and the decisions so far.

    Rows of a finding of personal data are masked unless `reveal`.
    """
    with open_review(dataset, queue) as view:
        entry = view.entry(item)
        masked = entry.item.kind == "personal" and not reveal
        proposed = entry.item.proposed
        rows = rows_of(view.dataset, entry.item.examples)
        shown_rows = [*rows.values(), *([proposed] if proposed is not None and proposed.id not in rows else [])]
        fields = entry.item.as_json()
        fields.pop("row", None)
        return {
            **{name: value for name, value in fields.items() if name not in ("schema", "what")},
            "state": entry.standing.state,
            "rows": [_row(everywhere_masked(row) if masked else row, row.id) for row in shown_rows],
            "would": _would(entry.item, proposed is not None),
            "decisions": [_decision(decision) for decision in entry.decisions],
        }


def review_decide(dataset: Path | str, items: Sequence[str], opinion: Opinion, queue: str = "") -> dict[str, Any]:
    """Store a person's decisions about several items beside those of others; return them with the new counts.

    Each decision is stored separately, in the order of the items. If one is refused, the earlier ones stay. Raises
    ConfigError, ConflictError, BusyError.
    """
    if not items:
        raise ConfigError("no item is named", "sartor review list DATASET has their ids")
    with open_review(dataset, queue, make=True) as view:
        results = []
        for item in items:
            entry, is_new = decide(view, item, opinion)
            results.append(
                {
                    "item": entry.item.id,
                    "verdict": opinion.verdict,
                    "by": opinion.by.strip(),
                    "new": is_new,
                    "signed": is_new and bool(entry.decisions[-1].signature),
                    "state": entry.standing.state,
                    "holds": entry.standing.verdict,
                }
            )
        return {"decisions": results, **_counts(view.entries())}


def review_sample(
    dataset: Path | str,
    queue: str = "",
    *,
    error: float = 0.01,
    confidence: float = 0.95,
    allow: int = 0,
    split: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """Draw a sample large enough for a bound on the fraction of bad rows; return the result so far.

    The sampled rows are put into the queue. The same arguments draw the same rows again, so decisions made in the
    meantime count. `upper` is the upper bound on the fraction of bad rows at `confidence`. A row without a decision
    counts as bad.
    """
    with open_review(dataset, queue, make=True) as view:
        assert view.queue is not None
        ids = view.ids_of(split) if split else sorted(view.ids)
        count = quality_control.size(len(ids), error, confidence, allow)
        rows = quality_control.draw_ids(ids, count, seed)
        items = [ReviewItem("sample", (row,), reason=DRAWN, origin="review sample") for row in rows]
        plan = {
            "error": error,
            "confidence": confidence,
            "allow": allow,
            "split": split,
            "seed": seed,
            "population": len(ids),
            "size": count,
        }
        view.queue.sample(view.dataset.id, {**plan, "rows": rows}, items)
        decisions = view.queue.decisions(item.id for item in items)
        verdicts = Counter(view.state_of(decisions.get(item.id, [])).verdict for item in items)
        bad, waiting = verdicts["edit"] + verdicts["reject"], verdicts[""]
        upper = quality_control.most_bad(len(ids), count, bad + waiting, confidence)
        next_ones = [item.id for item in items if not view.state_of(decisions.get(item.id, [])).verdict]
        return {
            **plan,
            "good": verdicts["accept"],
            "bad": bad,
            "waiting": waiting,
            "upper": upper / len(ids),
            "upper_rows": upper,
            "holds": waiting == 0 and upper / len(ids) <= error,
            "next": next_ones[:10],
        }


def review_agreement(dataset: Path | str, queue: str = "", *, kind: str = "") -> dict[str, Any]:
    """Measure the agreement of each pair of reviewers on first verdicts, and list the items in conflict."""
    with open_review(dataset, queue) as view:
        entries = [entry for entry in view.all_entries() if not kind or entry.item.kind == kind]
    conflicts = [_line(entry) for entry in entries if entry.standing.state == "conflict"]
    pairs = agreements([entry.decisions for entry in entries])
    return {"pairs": [pair.as_json() for pair in pairs], "conflicts": conflicts}


def review_apply(
    dataset: Path | str,
    out: Path | str,
    queue: str = "",
    *,
    replace: bool = False,
    keep_derived: bool = False,
    rule: ReviewPolicy | None = None,
) -> dict[str, Any]:
    """Write a new Dataset with the decisions applied; the old one stays.

    Raises as `apply_decisions.apply`.
    """
    check_output_free(Path(out).absolute(), replace=replace)
    with open_review(dataset, queue, rule) as view:
        artifact, summary = apply(view, Path(out), replace=replace, keep_derived=keep_derived)
    return {"dataset": str(artifact.path), **summary, "kept": artifact.manifest["counts"]["kept"]}


def review_add(dataset: Path | str, found: Iterable[Mapping[str, Any]], queue: str = "") -> dict[str, Any]:
    """Add findings, each a mapping in the form of a line of `review.jsonl`, to the queue of a Dataset.

    A finding that is already there changes nothing. A program that writes the Dataset itself may write its findings
    into the Dataset's `review.jsonl` instead. Raises SourceError.
    """
    with open_review(dataset, queue, make=True) as view:
        lines = review_file.Lines()
        for finding in found:
            lines.add(finding, review_file.content_of(view.dataset))
        return _import_lines(view, lines, "what was given")


def review_import(dataset: Path | str, source: Path | str, queue: str = "") -> dict[str, Any]:
    """Import findings and decisions into the queue of a Dataset.

    source: a `review.jsonl` or another Dataset.
    Raises SourceError for a line that cannot be read, SignatureError for a decision whose signature by a trusted key
    does not match. If a decision is about an item that neither side has, nothing is imported.
    """
    source = Path(source)
    with open_review(dataset, queue, make=True) as view:
        if kind_of(source) == "dataset":
            with open_review(source, queue) as other:
                lines = review_file.Lines(
                    dict(other.items), [decision for entry in other.all_entries() for decision in entry.decisions]
                )
        else:
            lines = review_file.read_review_file(source, content_digest=review_file.content_of(view.dataset))
        return _import_lines(view, lines, str(source))


def _import_lines(view: View, lines: review_file.Lines, source: str) -> dict[str, Any]:
    """Add lines to the queue, all or none; return how many there are, and how many are new."""
    assert view.queue is not None
    known_items = {**view.items, **lines.items}
    if unknown_items := [decision.item for decision in lines.decisions if decision.item not in known_items]:
        problem = f"{source} decides about {unknown_items[0]}, which is no item of it or of the Dataset"
        raise ConfigError(problem, "give a file that has its finding too: sartor review export")
    signed = sum(bool(signer(decision)) for decision in lines.decisions)
    items = [
        *lines.items.values(),
        *(known_items[decision.item] for decision in lines.decisions if decision.item not in lines.items),
    ]
    added, decided = view.queue.add(view.dataset.id, items, lines.decisions)
    elsewhere = sum(not view.concerns(item) for item in lines.items.values())
    counts = {"findings": len(lines.items), "new": added, "of_other_rows": elsewhere}
    return {**counts, "decisions": len(lines.decisions), "new_decisions": decided, "signed": signed}


def review_export(dataset: Path | str, out: Path | str, queue: str = "") -> dict[str, Any]:
    """Write the findings and decisions of a Dataset to a `review.jsonl`, for a reviewer elsewhere.

    Raises ConfigError if `out` exists.
    """
    out = Path(out)
    if out.exists():
        raise ConfigError(f"{out} exists", "choose another --out")
    with open_review(dataset, queue) as view:
        entries = view.entries()
        decisions = [decision for entry in entries for decision in entry.decisions]
        review_file.write_review_file(out, (entry.item for entry in entries), decisions)
    return {"file": str(out), "findings": len(entries), "decisions": len(decisions)}


def _counts(entries: list[ReviewEntry]) -> dict[str, int]:
    verdicts = Counter(entry.standing.verdict for entry in entries)
    conflicts = sum(entry.standing.state == "conflict" for entry in entries)
    decided = {"accepted": verdicts["accept"], "edited": verdicts["edit"], "rejected": verdicts["reject"]}
    return {"open": sum(entry.is_open for entry in entries), "conflicts": conflicts, **decided}


def _line(entry: ReviewEntry, *, blind: bool = False) -> dict[str, Any]:
    item = entry.item
    fields: dict[str, Any] = {"id": item.id, "kind": item.kind, "reason": item.reason, "examples": list(item.examples)}
    fields |= {"slice": item.slice, "detail": item.detail, "suggestion": dict(item.suggestion)}
    fields = {name: value for name, value in fields.items() if value not in ("", [], {})}
    if blind:
        return fields
    people = {by: decision.verdict for by, decision in newest(entry.decisions).items()}
    return {**fields, "state": entry.standing.state, **({"by": people} if people else {})}


def _row(row: Any, identity: str) -> dict[str, Any]:
    messages = []
    for message in row.messages:
        media = [part.media for part in message.content if part.media]
        fields = {"role": message.role, "text": message.text, "media": media}
        messages.append({name: value for name, value in fields.items() if value})
    return {"id": identity, "split": row.split, "messages": messages}


def _would(item: ReviewItem, joins: bool) -> dict[str, str]:
    """Describe the effect of each possible verdict."""
    if not item.examples:
        return {"accept": "the finding may stand; nothing changes"}
    if len(item.examples) > 1:
        return {
            "accept": f"{len(item.examples)} rows stay as they are",
            "reject": f"{len(item.examples)} rows become Drops",
        }
    edit = f"puts {dict(item.suggestion)}" if item.suggestion else "with --reply or --prompt"
    if joins:
        return {"accept": "the row joins", "edit": edit, "reject": "the row stays out"}
    return {"accept": "the row stays as it is", "edit": edit, "reject": "the row becomes a Drop"}


def _decision(decision: Any) -> dict[str, Any]:
    fields = {
        name: value
        for name, value in decision.as_json().items()
        if name not in ("schema", "what", "item", "signature")
    }
    return {**fields, "signed_by": signer(decision) or ("an unknown key" if decision.signature else "nobody")}
