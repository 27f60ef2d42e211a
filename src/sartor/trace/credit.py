"""Credit of training rows: duplicates as one, sums by source, and where a row is from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rapidfuzz import fuzz

from sartor.core.artifacts import REVIEW, Artifact
from sartor.core.errors import SartorError
from sartor.core.lazy_import import import_module
from sartor.core.lineage import ancestry
from sartor.core.records import Example
from sartor.trace.attribution import Method
from sartor.trace.retrieval import RetrievalIndex, RowSources, media_of, prompt_text, reply_text
from sartor.trace.traced_adapter import TrainingRow

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# likeness of the prompts of two rows with equal replies, in % (rapidfuzz's ratio), from which they count as one row
NEAR_PERCENT = 90.0
# groups of equal rows among which near-duplicates are looked for, for each row that is shown
_CANDIDATES = 5


@dataclass(frozen=True)
class RowGroup:
    """Training rows that are duplicates or near-duplicates of each other, and share their credit.

    rows: indices, the row of the highest score first.
    score: sum of their scores by unrolling, the predicted effect of leaving all of them out; by the other methods the
        highest, since likenesses do not add up.
    """

    rows: tuple[int, ...]
    score: float


@dataclass(frozen=True)
class SourceCredit:
    """Sum of the scores of the rows of one source. A row of several sources gives each an equal part of its score.

    rows: number of rows that the source has a part in.
    """

    source: str
    licence: str
    score: float
    rows: int

    def as_json(self) -> dict[str, Any]:
        """Return the source's entry in the trace's JSON."""
        return {
            "source": self.source,
            "score": self.score,
            "rows": self.rows,
            "mean": self.mean,
            "licence": self.licence,
        }

    @property
    def mean(self) -> float:
        """Score per row: a sum grows with the source's size, where scores are likenesses and never below 0."""
        return self.score / self.rows


def rank_groups(index: RetrievalIndex, scores: F64, method: Method, top: int) -> list[RowGroup]:
    """Return the `top` groups of rows with the highest scores, best first.

    Rows are one group if their words and media are equal, or if their replies and media are equal and their prompts
    are alike by NEAR_PERCENT; the second is looked for among the best groups only.
    scores: (N,).
    """
    _, owner = np.unique(index.equal_rows, return_inverse=True)
    group_scores = _combine(scores, owner, int(owner.max()) + 1, method)
    best = np.argsort(-group_scores, kind="stable")[: _CANDIDATES * max(top, 1)]
    members: dict[int, list[int]] = {int(group): [] for group in best}
    for row in np.flatnonzero(np.isin(owner, best)):
        members[int(owner[row])].append(int(row))
    groups: list[list[int]] = []
    for group in best:
        rows = members[int(group)]
        similar = next(
            (other for other in groups if _are_near(index.examples[other[0]], index.examples[rows[0]])), None
        )
        if similar is None:
            groups.append(list(rows))
        else:
            similar += rows
    ranked = []
    for rows in groups:
        rows.sort(key=lambda row: -scores[row])
        values = scores[rows]
        ranked.append(RowGroup(tuple(rows), float(values.sum() if method is Method.UNROLLED else values.max())))
    return sorted(ranked, key=lambda group: -group.score)[:top]


def _combine(scores: F64, owner: I64, count: int, method: Method) -> F64:
    if method is Method.UNROLLED:
        return np.bincount(owner, weights=scores, minlength=count).astype(np.float64)
    combined = np.full(count, -np.inf)
    np.maximum.at(combined, owner, scores)
    return combined


def _are_near(first: Example, second: Example) -> bool:
    if reply_text(first.messages) != reply_text(second.messages) or first.rejected != second.rejected:
        return False
    if [part.media for part in media_of(first.messages)] != [part.media for part in media_of(second.messages)]:
        return False
    return fuzz.ratio(prompt_text(first.messages).lower(), prompt_text(second.messages).lower()) >= NEAR_PERCENT


def sum_by_source(sources: RowSources, scores: F64) -> list[SourceCredit]:
    """Return the sum of the scores (N,) of each source's rows, highest first."""
    parts = np.bincount(sources.owners, minlength=len(scores))
    shares = scores[sources.owners] / parts[sources.owners]
    totals = np.bincount(sources.ids, weights=shares, minlength=len(sources.names)).tolist()
    counts = np.bincount(sources.ids, minlength=len(sources.names)).tolist()
    credits = [
        SourceCredit(source, licence, score=total, rows=count)
        for (source, licence), total, count in zip(sources.names, totals, counts, strict=True)
    ]
    return sorted(credits, key=lambda credit: -credit.score)


@dataclass(frozen=True)
class RowHistory:
    """What is known of a row beside its content.

    dropped: number of rows that curation dropped as its duplicates.
    reviewers: people who decided about it, or about the row that it was made from.
    problem: why a part is unknown; empty if nothing is.
    """

    dropped: int = 0
    reviewers: tuple[str, ...] = ()
    problem: str = ""


def read_histories(rows: Sequence[TrainingRow]) -> dict[str, RowHistory]:
    """Return the histories of rows by id; their Datasets' drops and reviews are read once each."""
    histories: dict[str, RowHistory] = {}
    for dataset in {row.dataset.id: row.dataset for row in rows}.values():
        examples = [row.example for row in rows if row.dataset.id == dataset.id]
        problem, dropped, reviewers = "", {}, {}
        try:
            dropped = ancestry.count_duplicates(dataset, [example.id for example in examples])
            reviewers = _reviewers(dataset, examples)
        except SartorError as error:  # the row itself was checked when the Dataset was opened
            problem = error.problem
        for example in examples:
            histories[example.id] = RowHistory(dropped.get(example.id, 0), reviewers.get(example.id, ()), problem)
    return histories


def _reviewers(dataset: Artifact, examples: Sequence[Example]) -> dict[str, tuple[str, ...]]:
    """Return the people who decided about each row, in the order of their decisions."""
    file = dataset.path / REVIEW
    if not file.is_file():
        return {}
    review_file = import_module("sartor.curate.review.review_file")  # imports the steps of curation: half a second
    lines = review_file.read_review_file(file, content_digest=review_file.content_of(dataset))
    # an edited row has another id than the one that was decided about, which is its parent
    shown: dict[str, str] = {}
    for example in examples:
        shown |= {parent: example.id for origin in example.origins for parent in origin.parents}
    shown |= {example.id: example.id for example in examples}
    people: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for decision in lines.decisions:
        with suppress(KeyError):  # a decision about a finding that the file does not hold
            for id in lines.items[decision.item].examples:
                if id in shown:
                    people[shown[id]][decision.by] = None
    return {id: tuple(names) for id, names in people.items()}
