"""How well each label fits, by what the other rows say; and how many look wrong, by confident learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import need
from sartor.curate.labels.folds import I64, Features, Likely, out_of_fold
from sartor.text import encoders

LEAST_ROWS = 10
# Other rows with the same prompt weigh against the model as n to n + PROMPT_WEIGHT: copies are no independent witnesses.
PROMPT_WEIGHT = 4.0
MOST_COLUMNS = 50_000
_BLOCK_CELLS = 20_000_000


@dataclass(frozen=True)
class Judged:
    """Of N rows: `quality` 0..1 (how likely the given label is), the likeliest other class, and whether it looks wrong.

    `estimated_errors` is confident learning's count of wrong labels (Northcutt et al. 2021), `method` what judged, `why` says
    why nothing could be judged where that is so.
    """

    quality: NDArray[np.float64]
    suggested: I64
    wrong: NDArray[np.bool_]
    estimated_errors: int = 0
    method: str = "none"
    why: str = ""


def judge(prompts: Sequence[str], vectors: Any, labels: I64, *, seed: int = 0) -> Judged:
    """Judge N labels (0..K-1) by their prompts and vectors (N, D). Deterministic. With too little to go by, none is wrong."""
    count = int(labels.max(initial=-1)) + 1
    groups = number(prompts)
    distinct = int(groups.max(initial=-1)) + 1
    for few, least, what in ((len(labels), LEAST_ROWS, "rows"), (distinct, 2, "prompts"), (count, 2, "labels")):
        if few < least:
            why = f"{few} different {what}" if what != "rows" else f"{few} rows"
            blank = np.zeros(len(labels), np.int64)
            return Judged(np.ones(len(labels)), blank, blank > 0, why=f"{why}; it takes at least {least} to judge labels")
    features = Features(vectors, _columns(prompts))
    likely = _with_same_prompts(out_of_fold(features, labels, groups, seed=seed), labels, groups)
    likely = _lone_labels(likely, labels, count)
    quality, estimated = _confident_learning(likely, labels, count)
    best = likely.classes[:, 0]
    second = likely.classes[:, min(1, likely.classes.shape[1] - 1)]
    wrong = np.zeros(len(labels), bool)
    wrong[np.argsort(quality, kind="stable")[:estimated]] = True
    return Judged(quality, np.where(best == labels, second, best), wrong & (best != labels), estimated, likely.method)


def number(texts: Sequence[str]) -> I64:
    """(N,) equal numbers for texts that differ in nothing but case and space."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(" ".join(text.casefold().split()), len(numbers)) for text in texts], np.int64)


def _columns(prompts: Sequence[str]) -> Any:
    """Words and pieces of words, each half of length 1; columns of one row alone teach nothing about another."""
    from scipy.sparse import hstack
    from sklearn.preprocessing import normalize

    if len(prompts) > encoders.CHUNK:
        return None
    found = encoders.counts(prompts).multiply(encoders.rarity(prompts)).tocsr()
    half = found.shape[1] // 2
    found = hstack([normalize(found[:, :half]), normalize(found[:, half:])], format="csr")
    having = np.bincount(found.indices, minlength=found.shape[1])
    return found[:, np.sort(np.argsort(-having, kind="stable")[: min(MOST_COLUMNS, int((having > 1).sum()))])]


def _with_same_prompts(likely: Likely, labels: I64, groups: I64) -> Likely:
    """Rows of the same prompt are no part of what a fold learns; here they say which label they have."""
    sizes = np.bincount(groups)
    pairs, inverse, counts = np.unique(groups * (labels.max() + 1) + labels, return_inverse=True, return_counts=True)
    others = sizes[groups] - 1
    same = counts[inverse.ravel()] - 1
    trust = others / (others + PROMPT_WEIGHT)
    share = same / np.maximum(others, 1)
    given = ((1 - trust) * likely.given + trust * share).astype(np.float32)
    probabilities, classes = likely.probabilities.copy(), likely.classes.copy()
    # the most frequent label of the prompt's other rows comes first, where it is not the given one and has more of them
    commonest = _commonest(pairs, counts, labels.max() + 1, len(sizes))[groups]
    ahead = (others > 0) & (commonest != labels) & (trust * (1 - share) > probabilities[:, 0] * (1 - trust))
    probabilities *= (1 - trust)[:, None].astype(np.float32)
    classes[ahead, 0] = commonest[ahead]
    probabilities[ahead, 0] = (trust * (1 - share))[ahead]
    return replace(likely, given=given, probabilities=probabilities, classes=classes)


def _commonest(pairs: I64, counts: I64, base: int, groups: int) -> I64:
    """(groups,) the most frequent label of each group."""
    order = np.argsort(counts, kind="stable")
    found = np.zeros(groups, np.int64)
    found[pairs[order] // base] = pairs[order] % base
    return found


def _lone_labels(likely: Likely, labels: I64, count: int) -> Likely:
    """A label that no other row has is unknown to every fold: it is as likely as the model is unsure of all others."""
    lone = np.bincount(labels, minlength=count)[labels] == 1
    given = np.where(lone, (1 - likely.probabilities[:, 0]) / 2, likely.given).astype(np.float32)
    return replace(likely, given=given)


def _confident_learning(likely: Likely, labels: I64, count: int) -> tuple[NDArray[np.float64], int]:
    """cleanlab's label quality (self-confidence) of each row and its number of wrong labels, in blocks of rows."""
    try:
        from cleanlab.experimental.label_issues_batched import LabelInspector
    except ImportError:
        raise need("cleanlab") from None
    inspector = LabelInspector(num_class=count, verbose=False, n_jobs=1)
    block = max(1, _BLOCK_CELLS // count)
    spans = [(start, min(start + block, len(labels))) for start in range(0, len(labels), block)]
    for start, stop in spans:
        inspector.update_confident_thresholds(labels[start:stop], likely.dense(start, stop, labels, count))
    for start, stop in spans:
        inspector.score_label_quality(labels[start:stop], likely.dense(start, stop, labels, count))
    return np.asarray(inspector.get_quality_scores(), np.float64), int(inspector.get_num_issues())
