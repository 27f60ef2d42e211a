"""Out-of-fold class probabilities, and confident learning on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import missing_package
from sartor.text import encoders

I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
FOLDS = 5
KEPT = 16  # probabilities kept of a row; the rest is close to 0
# Limits that keep the run time at minutes. Above SPARSE_WORK (non-zeros x classes) only the dense vectors are used.
# Above DENSE_WORK (rows x classes) a sample of the rows is used for training. If the sample would have fewer than
# ROWS_PER_CLASS rows per class, least squares are used instead.
SPARSE_WORK = 40_000_000
DENSE_WORK = 10_000_000
ROWS_PER_CLASS = 10
NEIGHBOURS = 20
SHARPNESS = 10.0  # decay of a neighbour's vote with its distance: vote = exp(SHARPNESS (cos - 1))
SOFTNESS = 10.0  # inverse temperature of the softmax over least-squares scores
_BLOCK, _CELLS = 2048, 50_000_000


@dataclass(frozen=True)
class LabelFeatures:
    """Features of N rows.

    vectors: (N, D) of length 1. columns: (N, C) sparse matrix, or None if it would be too large.
    """

    vectors: F32
    columns: Any = None


@dataclass(frozen=True)
class Likely:
    """Most likely classes of each of N rows, in descending order.

    classes, probabilities: (N, T) with T at most KEPT.
    given: (N,) probability of the given class.
    """

    classes: I64
    probabilities: F32
    given: F32
    method: str

    def dense(self, start: int, stop: int, labels: I64, count: int) -> NDArray[np.float64]:
        """Return (B, K) probabilities of rows `start` to `stop`, with the given class filled in.

        labels: (N,). count: number of classes K. Classes outside the top have probability 0.
        """
        block = np.zeros((stop - start, count))
        np.put_along_axis(block, self.classes[start:stop], self.probabilities[start:stop].astype(np.float64), axis=1)
        block[np.arange(stop - start), labels[start:stop]] = self.given[start:stop]
        return block


def out_of_fold_probabilities(features: LabelFeatures, labels: I64, groups: I64, *, seed: int) -> Likely:
    """Return the class probabilities of N rows, each from a model trained on the other folds.

    labels: (N,) 0..K-1. groups: (N,) prompt numbers; rows of one prompt are in one fold.

    At least two classes and two groups are required.
    """
    count = int(labels.max()) + 1
    folds = assign_folds(labels, groups, seed)
    sample_size = min(len(labels), max(DENSE_WORK // count, 1))
    if sample_size < min(len(labels), ROWS_PER_CLASS * count):
        return _many_classes(features.vectors, labels, folds, count)
    columns = features.columns
    sparse = columns is not None and columns.nnz * count <= SPARSE_WORK
    rows = features.vectors
    if sparse:
        import scipy.sparse

        parts = [columns, scipy.sparse.csr_matrix(features.vectors)]
        rows = scipy.sparse.hstack(parts, format="csr", dtype=np.float64)
    top_classes = _TopClasses(len(labels), count)
    rng = np.random.default_rng(seed)
    for fold in range(int(folds.max()) + 1):
        train_indices, test_indices = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if len(train_indices) > sample_size:
            train_indices = np.sort(rng.choice(train_indices, sample_size, replace=False))
        strength = 10.0 if sparse else 30.0
        for indices, block in _fitted(
            rows, labels, train_indices=train_indices, test_indices=test_indices, strength=strength
        ):
            top_classes.put(indices, *block)
    feature_names = "words, pieces of words and vectors" if sparse else "vectors"
    return top_classes.likely(f"logistic regression over {feature_names}, {int(folds.max()) + 1} folds")


def assign_folds(labels: I64, groups: I64, seed: int) -> I64:
    """Return (N,) the fold of each row. labels, groups: (N,).

    Groups are dealt out class by class, so every fold gets its share of each class.
    """
    heads, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    order = np.lexsort((np.random.default_rng(seed).permutation(len(heads)), labels[first]))
    fold = np.empty(len(heads), np.int64)
    fold[order] = np.arange(len(heads)) % min(FOLDS, len(heads))
    return fold[inverse.ravel()]


class _TopClasses:
    """The KEPT most likely classes of each row, collected block by block."""

    def __init__(self, rows: int, count: int) -> None:
        top_count = min(KEPT, count)
        self.count = count
        self.classes = np.tile(np.arange(top_count), (rows, 1))
        self.probabilities = np.zeros((rows, top_count), np.float32)
        self.given = np.zeros(rows, np.float32)

    def put(self, indices: I64, classes: I64, block: Any, labels: I64) -> None:
        """Store the probabilities of a block of rows.

        indices: (P,) rows. classes: (C,). block: (P, C) probabilities of these classes. labels: (N,).
        """
        whole = np.zeros((len(indices), self.count), np.float32)
        whole[:, classes] = block
        best = np.argsort(-whole, axis=1, kind="stable")[:, : self.classes.shape[1]]
        self.classes[indices] = best
        self.probabilities[indices] = np.take_along_axis(whole, best, axis=1)
        self.given[indices] = whole[np.arange(len(indices)), labels[indices]]

    def likely(self, method: str) -> Likely:
        return Likely(self.classes, self.probabilities, self.given, method)


def _fitted(
    rows: Any, labels: I64, train_indices: I64, test_indices: I64, strength: float
) -> Iterator[tuple[I64, tuple[I64, Any, I64]]]:
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    known_classes = np.unique(labels[train_indices])
    if len(known_classes) == 1:
        yield test_indices, (known_classes, np.ones((len(test_indices), 1)), labels)
        return
    model = LogisticRegression(C=strength, max_iter=100, tol=1e-3)
    # many small products: with several threads most time goes to waiting for each other, ten times more so on a busy
    # machine
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # 100 iterations suffice for a ranking, converged or not
        model.fit(rows[train_indices], labels[train_indices])
    for start in range(0, len(test_indices), _BLOCK):
        indices = test_indices[start : start + _BLOCK]
        yield indices, (model.classes_, model.predict_proba(rows[indices]), labels)


def _many_classes(vectors: F32, labels: I64, folds: I64, count: int) -> Likely:
    """Return class probabilities for thousands of classes, where logistic regression would be too slow.

    They are the mean of a least-squares fit, solved in closed form, and the votes of the nearest rows.
    """
    top_classes = _TopClasses(len(labels), count)
    for fold in range(int(folds.max()) + 1):
        train_indices, test_indices = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        weights = _least_squares(vectors[train_indices], labels[train_indices], count)
        block = max(1, min(_BLOCK, _CELLS // max(len(train_indices), count)))
        for start in range(0, len(test_indices), block):
            indices = test_indices[start : start + block]
            # p = (softmax(SOFTNESS X W) + votes) / 2, (P, K)
            scores = SOFTNESS * (vectors[indices] @ weights)
            probabilities = np.exp(scores - scores.max(1, keepdims=True))
            probabilities /= probabilities.sum(1, keepdims=True)
            probabilities += _votes(vectors[indices], vectors[train_indices], labels[train_indices], count)
            top_classes.put(indices, np.arange(count), probabilities / 2, labels)
    return top_classes.likely(f"least squares and the {NEIGHBOURS} nearest rows, {int(folds.max()) + 1} folds")


def _least_squares(rows: F32, labels: I64, count: int) -> F32:
    """Return (D, K) weights of a ridge regression of one-hot labels on the rows.

    rows: (N, D). labels: (N,).
    """
    # W = (X^T X + I)^-1 X^T Y, with one-hot Y (N, K)
    exact = rows.astype(np.float64)
    sums = np.zeros((count, rows.shape[1]))
    np.add.at(sums, labels, exact)
    return np.linalg.solve(exact.T @ exact + np.eye(rows.shape[1]), sums.T).astype(np.float32)


def _votes(rows: F32, others: F32, labels: I64, count: int) -> F32:
    """Return (P, K) votes of the NEIGHBOURS nearest other rows, weighted by similarity; each row sums to 1.

    rows: (P, D). others: (N, D). labels: (N,) of the other rows.
    """
    neighbour_count = min(NEIGHBOURS, len(others))
    likeness = rows @ others.T
    near = np.argpartition(-likeness, neighbour_count - 1, axis=1)[:, :neighbour_count]
    weights = np.exp(SHARPNESS * (np.take_along_axis(likeness, near, axis=1) - 1))
    votes = np.zeros((len(rows), count), np.float32)
    np.add.at(votes, (np.arange(len(rows))[:, None], labels[near]), weights)
    return votes / votes.sum(1, keepdims=True)


LEAST_ROWS = 10
# n other rows with the same prompt get the weight n / (n + PROMPT_WEIGHT) against the model: copies are not
# independent evidence.
PROMPT_WEIGHT = 4.0
MOST_COLUMNS = 50_000
_BLOCK_CELLS = 20_000_000


@dataclass(frozen=True)
class LabelQuality:
    """Label quality of N rows.

    quality: (N,) 0..1, estimated correctness of the given label.
    suggested: (N,) the most likely other class.
    wrong: (N,) True if the label looks wrong.
    estimated_errors: confident learning's count of wrong labels (Northcutt et al. 2021).
    method: the model that was used. reason: why nothing could be judged, or empty.
    """

    quality: NDArray[np.float64]
    suggested: I64
    wrong: NDArray[np.bool_]
    estimated_errors: int = 0
    method: str = "none"
    reason: str = ""


def confident_learning(prompts: Sequence[str], vectors: Any, labels: I64, *, seed: int = 0) -> LabelQuality:
    """Return the quality of N labels by their prompts and vectors; deterministic.

    vectors: (N, D). labels: (N,) 0..K-1. With too few rows, prompts or labels, no label is wrong and `reason` is set.
    """
    count = int(labels.max(initial=-1)) + 1
    groups = number(prompts)
    distinct = int(groups.max(initial=-1)) + 1
    for available, minimum, noun in (
        (len(labels), LEAST_ROWS, "rows"),
        (distinct, 2, "different prompts"),
        (count, 2, "different labels"),
    ):
        if available < minimum:
            return LabelQuality(
                np.ones(len(labels)),
                suggested=np.zeros(len(labels), np.int64),
                wrong=np.zeros(len(labels), bool),
                reason=f"{available} {noun}; it takes at least {minimum} to judge labels",
            )
    features = LabelFeatures(vectors, _columns(prompts))
    likely = _with_same_prompts(out_of_fold_probabilities(features, labels, groups, seed=seed), labels, groups)
    # A label that no other row has is unknown to the model that judges it, so it is as likely as the model is unsure
    # of all others: (1 - p_max) / 2.
    is_lone = np.bincount(labels, minlength=count)[labels] == 1
    given = np.where(is_lone, (1 - likely.probabilities[:, 0]) / 2, likely.given).astype(np.float32)
    likely = replace(likely, given=given)
    quality, estimated = _confident_learning(likely, labels, count)
    best = likely.classes[:, 0]
    second = likely.classes[:, min(1, likely.classes.shape[1] - 1)]
    wrong = np.zeros(len(labels), bool)
    wrong[np.argsort(quality, kind="stable")[:estimated]] = True
    return LabelQuality(
        quality,
        suggested=np.where(best == labels, second, best),
        wrong=wrong & (best != labels),
        estimated_errors=estimated,
        method=likely.method,
    )


def number(texts: Sequence[str]) -> I64:
    """Return (N,) numbers that are equal for texts equal up to case and white space."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(" ".join(text.casefold().split()), len(numbers)) for text in texts], np.int64)


def _columns(prompts: Sequence[str]) -> Any:
    """Return (N, C) sparse tf-idf features: words, and pieces of words, each half of length 1.

    Features of a single row are left out, since they carry nothing over to other rows. None for more than
    `encoders.CHUNK` prompts.
    """
    from scipy.sparse import hstack
    from sklearn.preprocessing import normalize

    if len(prompts) > encoders.CHUNK:
        return None
    features = encoders.counts(prompts).multiply(encoders.rarity(prompts)).tocsr()
    half = features.shape[1] // 2
    features = hstack([normalize(features[:, :half]), normalize(features[:, half:])], format="csr")
    row_counts = np.bincount(features.indices, minlength=features.shape[1])
    column_count = min(MOST_COLUMNS, int((row_counts > 1).sum()))
    most_frequent = np.argsort(-row_counts, kind="stable")[:column_count]
    return features[:, np.sort(most_frequent)]


def _with_same_prompts(likely: Likely, labels: I64, groups: I64) -> Likely:
    """Combine the model's probabilities with the labels of other rows with the same prompt.

    Those rows are in the same fold, so the model has not learnt from them. labels, groups: (N,).
    """
    # Of a row with n other rows of its prompt, a fraction f of which has its label, and the model's probability p:
    #   t = n / (n + PROMPT_WEIGHT);  given = (1 - t) p + t f
    sizes = np.bincount(groups)
    base = labels.max() + 1
    pairs, inverse, counts = np.unique(groups * base + labels, return_inverse=True, return_counts=True)
    others = sizes[groups] - 1
    same = counts[inverse.ravel()] - 1
    trust = others / (others + PROMPT_WEIGHT)
    share = same / np.maximum(others, 1)
    given = ((1 - trust) * likely.given + trust * share).astype(np.float32)
    probabilities, classes = likely.probabilities.copy(), likely.classes.copy()
    # the most frequent label of the prompt becomes the first class if it is not the given one and its weight t (1 - f)
    # exceeds that of the model's first class
    order = np.argsort(counts, kind="stable")  # the last label that is written to a group stays
    commonest_of_group = np.zeros(len(sizes), np.int64)
    commonest_of_group[pairs[order] // base] = pairs[order] % base
    commonest = commonest_of_group[groups]
    ahead = (others > 0) & (commonest != labels) & (trust * (1 - share) > probabilities[:, 0] * (1 - trust))
    probabilities *= (1 - trust)[:, None].astype(np.float32)
    classes[ahead, 0] = commonest[ahead]
    probabilities[ahead, 0] = (trust * (1 - share))[ahead]
    return replace(likely, given=given, probabilities=probabilities, classes=classes)


def _confident_learning(likely: Likely, labels: I64, count: int) -> tuple[NDArray[np.float64], int]:
    """Return cleanlab's label quality of each row, (N,), and its number of wrong labels.

    The quality is the self-confidence. labels: (N,). Rows are processed in blocks.
    """
    try:
        from cleanlab.experimental.label_issues_batched import LabelInspector
    except ImportError:
        raise missing_package("cleanlab") from None
    inspector = LabelInspector(num_class=count, verbose=False, n_jobs=1)
    block = max(1, _BLOCK_CELLS // count)
    spans = [(start, min(start + block, len(labels))) for start in range(0, len(labels), block)]
    for start, stop in spans:
        inspector.update_confident_thresholds(labels[start:stop], likely.dense(start, stop, labels, count))
    for start, stop in spans:
        inspector.score_label_quality(labels[start:stop], likely.dense(start, stop, labels, count))
    return np.asarray(inspector.get_quality_scores(), np.float64), int(inspector.get_num_issues())
