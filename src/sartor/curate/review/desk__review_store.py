"""Part of curate.review.desk."""

from __future__ import annotations

from pathlib import Path

from sartor.core.artifacts import Artifact
from sartor.curate.review.view import Rule, opened


def open_items(dataset: Path | str | Artifact, queue: str = "", *, reviewers: int = 1, signed: bool = False) -> int:
    """How many items of a Dataset nobody has decided, or two people differently: what the gate asks.

    Findings that stand in the Dataset's files count whether or not anybody has looked at the queue yet. `reviewers` is how many
    people must agree; with `signed` only decisions count that a key which this machine trusts has signed.
    """
    path = dataset.path if isinstance(dataset, Artifact) else Path(dataset)
    with opened(path, queue, Rule(reviewers, signed)) as view:
        return sum(entry.is_open for entry in view.entries())
