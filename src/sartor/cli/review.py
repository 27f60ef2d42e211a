"""Commands for the human review queue of a Dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from cyclopts import App

import sartor
from sartor.cli.app import REPLACE, app
from sartor.core.errors import ConfigError

review_app = App(
    name="review", help="What labels, bias checks, validation and searches for personal data put before a person."
)
app.command(review_app)

Kind = Literal["", "label", "bias", "validation", "personal", "synthetic", "sample"]
State = Literal["open", "conflict", "decided", "all"]


@review_app.default
def review(
    dataset: Path, *, list: REPLACE = False, accept: str = "", reject: str = "", by: str = "", queue: str = ""
) -> Any:
    """Count open and decided items; the commands below show them and record decisions.

    Args:
        dataset: the Dataset
        list: also the open items
        accept: id of an item whose row stays as it is
        reject: id of an item whose row is removed
        by: name of the reviewer
        queue: file or Postgres URL; by default SARTOR_REVIEW, else review.sqlite beside the Dataset
    """
    if bool(accept) + bool(reject) + list > 1:
        raise ConfigError(
            "--list, --accept and --reject exclude each other",
            f"sartor review {dataset} --list, or one of the others alone",
        )
    if accept or reject:
        opinion = sartor.Opinion("accept" if accept else "reject", by)
        return sartor.review_decide(dataset, [accept or reject], opinion, queue)
    return sartor.review_list(dataset, queue) if list else sartor.review_counts(dataset, queue)


@review_app.command(name="list")
def review_list(
    dataset: Path,
    *,
    kind: Kind = "",
    state: State = "open",
    by: str = "",
    rows: int = 50,
    reviewers: int = 1,
    signed: REPLACE = False,
    queue: str = "",
) -> Any:
    """List the items of a Dataset: findings, the rows concerned, suggestions and decisions.

    Args:
        dataset: the Dataset
        kind: only items of this kind
        state: open (with conflicts), conflict, decided or all
        by: items that this person has yet to decide, without the decisions of others
        rows: number of items
        reviewers: how many people must agree before an item counts as decided
        signed: count only decisions that a trusted key signed
        queue: file or Postgres URL; by default SARTOR_REVIEW, else review.sqlite beside the Dataset
    """
    rule = sartor.ReviewRule(reviewers, signed)
    return sartor.review_list(dataset, queue, kind=kind, state=state, by=by, most=rows, rule=rule)


@review_app.command
def show(dataset: Path, item: str, *, reveal: REPLACE = False, queue: str = "") -> Any:
    """Show one item: the evidence, the current rows, the effect of each verdict, the decisions so far.

    Args:
        dataset: the Dataset
        item: id of the item, or its beginning
        reveal: show rows of a finding of personal data unmasked
        queue: file or Postgres URL, as in list
    """
    return sartor.review_show(dataset, item, queue, reveal=reveal)


@review_app.command
def accept(
    dataset: Path,
    *items: str,
    by: str,
    reason: str = "",
    settle: REPLACE = False,
    key: Path | None = None,
    queue: str = "",
) -> Any:
    """Accept rows as they are; a proposed row joins the Dataset.

    Args:
        dataset: the Dataset
        items: ids of items
        by: name of the reviewer
        reason: why
        settle: this ends a disagreement
        key: private key that signs the decision; by default that of SARTOR_HOME/keys/review, if there is one
        queue: file or Postgres URL, as in list
    """
    opinion = sartor.Opinion("accept", by, reason, settles=settle, key=key)
    return sartor.review_decide(dataset, items, opinion, queue)


@review_app.command
def reject(
    dataset: Path,
    *items: str,
    by: str,
    reason: str = "",
    settle: REPLACE = False,
    key: Path | None = None,
    queue: str = "",
) -> Any:
    """Reject rows: `sartor review apply` turns them into Drops.

    Args:
        dataset: the Dataset
        items: ids of items
        by: name of the reviewer
        reason: why
        settle: this ends a disagreement
        key: private key that signs the decision
        queue: file or Postgres URL, as in list
    """
    opinion = sartor.Opinion("reject", by, reason, settles=settle, key=key)
    return sartor.review_decide(dataset, items, opinion, queue)


@review_app.command
def edit(
    dataset: Path,
    *items: str,
    by: str,
    reply: str | None = None,
    prompt: str | None = None,
    change: str = "",
    reason: str = "",
    settle: REPLACE = False,
    key: Path | None = None,
    queue: str = "",
) -> Any:
    """Change rows as suggested or as given here: `sartor review apply` puts new rows in their place.

    Args:
        dataset: the Dataset
        items: ids of items
        by: name of the reviewer
        reply: new text of the last reply
        prompt: new text of the last question
        change: JSON of any other change: {"turns": {"0": "..."}}, {"weight": 0.5}, {"mask": true}
        reason: why
        settle: this ends a disagreement
        key: private key that signs the decision
        queue: file or Postgres URL, as in list
    """
    changes: dict[str, Any] = {name: text for name, text in (("reply", reply), ("prompt", prompt)) if text is not None}
    try:
        changes |= json.loads(change) if change else {}
    except (ValueError, TypeError):
        raise ConfigError(f"--change {change[:80]!r} is no JSON object", '--change \'{"reply": "..."}\'') from None
    opinion = sartor.Opinion("edit", by, reason, change=changes or None, settles=settle, key=key)
    return sartor.review_decide(dataset, items, opinion, queue)


@review_app.command
def sample(
    dataset: Path,
    *,
    error: float = 0.01,
    confidence: float = 0.95,
    allow: int = 0,
    split: str = "",
    seed: int = 0,
    queue: str = "",
) -> Any:
    """Sample the rows to review for a bound on the fraction of bad ones; run again, it shows the result so far.

    Args:
        dataset: the Dataset
        error: fraction of bad rows that may remain, 0..1
        confidence: confidence of that bound, 0..1
        allow: number of bad rows in the sample that is still acceptable; more rows are drawn then
        split: train or eval; by default all rows
        seed: of the draw
        queue: file or Postgres URL, as in list
    """
    return sartor.review_sample(
        dataset, queue, error=error, confidence=confidence, allow=allow, split=split, seed=seed
    )


@review_app.command
def agreement(dataset: Path, *, kind: Kind = "", queue: str = "") -> Any:
    """Show how far each two reviewers agree (percent and Cohen's kappa, with intervals).

    It also lists the items on which they differ.

    Args:
        dataset: the Dataset
        kind: only items of this kind
        queue: file or Postgres URL, as in list
    """
    return sartor.review_agreement(dataset, queue, kind=kind)


@review_app.command
def apply(
    dataset: Path,
    *,
    out: Path,
    replace: REPLACE = False,
    keep_derived: REPLACE = False,
    reviewers: int = 1,
    signed: REPLACE = False,
    queue: str = "",
) -> Any:
    """Write a new Dataset with the decisions applied. Open items are carried over.

    Args:
        dataset: the Dataset, which stays as it is
        out: directory of the new one
        replace: replace an existing Dataset
        keep_derived: keep rows derived from rows that are removed or changed
        reviewers: how many people must agree before an item counts as decided
        signed: count only decisions that a trusted key signed
        queue: file or Postgres URL, as in list
    """
    rule = sartor.ReviewRule(reviewers, signed)
    return sartor.review_apply(dataset, out, queue, replace=replace, keep_derived=keep_derived, rule=rule)


@review_app.command(name="import")
def review_import(dataset: Path, source: Path, *, queue: str = "") -> Any:
    """Import findings and decisions into the queue.

    Args:
        dataset: the Dataset that they are about
        source: a review.jsonl, or another Dataset
        queue: file or Postgres URL, as in list
    """
    return sartor.review_import(dataset, source, queue)


@review_app.command(name="export")
def review_export(dataset: Path, *, out: Path, queue: str = "") -> Any:
    """Export findings and decisions as a review.jsonl, for a reviewer elsewhere.

    Args:
        dataset: the Dataset
        out: the file
        queue: file or Postgres URL, as in list
    """
    return sartor.review_export(dataset, out, queue)
