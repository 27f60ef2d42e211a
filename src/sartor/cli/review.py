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
    """How many items are open and decided; the commands below look at them and decide.

    Args:
        dataset: the Dataset
        list: also the open items
        accept: id of an item whose row stays as it is
        reject: id of an item whose row goes
        by: name of who decides
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
    """The items of a Dataset: what was found about which rows, what is suggested, who decided what.

    Args:
        dataset: the Dataset
        kind: of this kind alone
        state: open (with conflicts), conflict, decided or all
        by: what this person has yet to decide, without what others decided
        rows: so many at once
        reviewers: how many people must agree before an item counts as decided
        signed: only decisions count that a trusted key signed
        queue: file or Postgres URL; by default SARTOR_REVIEW, else review.sqlite beside the Dataset
    """
    rule = sartor.ReviewRule(reviewers, signed)
    return sartor.review_list(dataset, queue, kind=kind, state=state, by=by, most=rows, rule=rule)


@review_app.command
def show(dataset: Path, item: str, *, reveal: REPLACE = False, queue: str = "") -> Any:
    """One item: the evidence, the rows as they stand, what each verdict would do, who decided what.

    Args:
        dataset: the Dataset
        item: id of the item, or how it begins
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
    """The rows are right as they stand; a row that was proposed joins the Dataset.

    Args:
        dataset: the Dataset
        items: ids of items
        by: name of who decides
        reason: why
        settle: this ends a disagreement
        key: private key that signs the decision; by default that of SARTOR_HOME/keys/review, where there is one
        queue: file or Postgres URL, as in list
    """
    return sartor.review_decide(dataset, items, sartor.Opinion("accept", by, reason, None, settle, key), queue)


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
    """The rows go: `sartor review apply` makes Drops of them.

    Args:
        dataset: the Dataset
        items: ids of items
        by: name of who decides
        reason: why
        settle: this ends a disagreement
        key: private key that signs the decision
        queue: file or Postgres URL, as in list
    """
    return sartor.review_decide(dataset, items, sartor.Opinion("reject", by, reason, None, settle, key), queue)


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
    """The rows are changed, as was suggested or as is said here: `sartor review apply` puts new rows in their places.

    Args:
        dataset: the Dataset
        items: ids of items
        by: name of who decides
        reply: what the last reply is to be
        prompt: what the last question is to be
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
    return sartor.review_decide(
        dataset, items, sartor.Opinion("edit", by, reason, changes or None, settle, key), queue
    )


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
    """Draw as many rows to look at as a bound on the fraction of bad ones needs; asked again, what they tell so far.

    Args:
        dataset: the Dataset
        error: the fraction of bad rows that may be left, 0..1
        confidence: how sure that is to be, 0..1
        allow: so many bad rows in the sample would still do; more rows are drawn then
        split: train or eval; by default all rows
        seed: of the draw
        queue: file or Postgres URL, as in list
    """
    return sartor.review_sample(
        dataset, queue, error=error, confidence=confidence, allow=allow, split=split, seed=seed
    )


@review_app.command
def agreement(dataset: Path, *, kind: Kind = "", queue: str = "") -> Any:
    """How far each two reviewers agree (percent and Cohen's kappa, with intervals), and the items about which they
    differ.

    Args:
        dataset: the Dataset
        kind: over items of this kind alone
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
    """A new Dataset in which what was decided is done. What is open comes along.

    Args:
        dataset: the Dataset, which stays as it is
        out: directory of the new one
        replace: replace the Dataset that stands there
        keep_derived: keep rows that were made of rows which go or change
        reviewers: how many people must agree before an item counts as decided
        signed: only decisions count that a trusted key signed
        queue: file or Postgres URL, as in list
    """
    rule = sartor.ReviewRule(reviewers, signed)
    return sartor.review_apply(dataset, out, queue, replace=replace, keep_derived=keep_derived, rule=rule)


@review_app.command(name="import")
def review_import(dataset: Path, source: Path, *, queue: str = "") -> Any:
    """Take findings and decisions into the queue.

    Args:
        dataset: the Dataset that they are about
        source: a review.jsonl, or another Dataset
        queue: file or Postgres URL, as in list
    """
    return sartor.review_import(dataset, source, queue)


@review_app.command(name="export")
def review_export(dataset: Path, *, out: Path, queue: str = "") -> Any:
    """Findings and decisions as a review.jsonl, for a reviewer elsewhere.

    Args:
        dataset: the Dataset
        out: the file
        queue: file or Postgres URL, as in list
    """
    return sartor.review_export(dataset, out, queue)
