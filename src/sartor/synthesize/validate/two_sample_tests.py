"""Two-sample tests: classifier, MMD, coverage, novelty and drift.

In all tests, members: (B, n) 0/1, the synthetic rows as they are and under B - 1 permutations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.synthesize.validate.permutation_tests import F64, StatisticResult, beyond_chance, finding_of, not_tested
from sartor.synthesize.validate.samples import F32, Pool, SampleSpace
from sartor.synthesize.validate.types import ValidationLimits
from sartor.text.encoders import prompt_text
from sartor.text.example_text import words

SHOWN = 5


def lengths(pool: Pool, members: F32, limits: ValidationLimits) -> StatisticResult:
    """Test the lengths of prompts and replies: the larger Kolmogorov-Smirnov distance of their word counts.

    members: (B, n).
    """
    counted = {
        "prompts": np.array([len(words(prompt_text(row))) for row in pool.rows]),
        "replies": np.array([len(words(row.reply)) for row in pool.rows]),
    }
    distances = {name: _kolmogorov(values, members) for name, values in counted.items()}
    name = max(distances, key=lambda key: float(distances[key][0]))
    values, is_synthetic = np.maximum(*distances.values()), pool.is_synthetic
    middle = [float(np.median(counted[name][side])) for side in (is_synthetic, ~is_synthetic)]
    detail = f"median words of {name}: {middle[0]:.0f} synthetic, {middle[1]:.0f} real"
    return finding_of("length", values, limits.length, detail, effect=beyond_chance(values))


def _kolmogorov(values: NDArray[np.int64], members: F32) -> F64:
    """Return (B,) Kolmogorov-Smirnov distances of the values (n,) of members and others."""
    order = np.argsort(values, kind="stable")
    # D = max_v |F_in(v) - F_out(v)|, taken only after the last of equal values
    ends = np.flatnonzero(np.diff(values[order], append=values.max() + 1))
    inside = members[:, order].cumsum(1, dtype=np.float64)
    count = inside[:, -1:]
    outside = np.arange(1, len(values) + 1) - inside
    return np.asarray(np.abs(inside / count - outside / (len(values) - count))[:, ends].max(1))


def topics(space: SampleSpace, members: F32, limits: ValidationLimits) -> StatisticResult:
    """Test whether the two sides fall into topics differently, by chi-squared over all clusterings.

    The statistic is the mean over the clusterings, each in standard deviations above chance. The effect is the total
    variation beyond chance in the clustering that shows it most clearly. The rows are of the topics that grew most.
    members: (B, n).
    """
    beyond = np.stack([_beyond(_chi_squared(clusters, members)) for clusters in space.topics])
    measured = [_variation(clusters, members) for clusters in space.topics]
    chosen = int(np.argmax([_beyond(values)[0] for values, _ in measured]))
    clusters, (values, shift) = space.topics[chosen], measured[chosen]
    grown = np.argsort(-shift)[:SHOWN]
    is_synthetic = space.pool.is_synthetic
    rows: list[int] = []
    for topic in grown.tolist():
        if shift[topic] > 0:
            rows += np.flatnonzero(is_synthetic & (clusters == topic)).tolist()
    detail = (
        f"of {len(shift)} topics one gains {shift.max():+.0%}, one {shift.min():+.0%} ; they differ by {values[0]:.0%}"
    )
    ids = [space.pool.rows[row].id for row in rows]
    return finding_of(
        "topic", beyond.mean(0), limit=limits.topic, detail=detail, rows=ids, effect=beyond_chance(values)
    )


def labels(pool: Pool, row_labels: Sequence[str | None], members: F32, limits: ValidationLimits) -> StatisticResult:
    """Test the total variation distance of the labels; rows without a label are a kind of their own.

    members: (B, n).
    """
    if not any(row_labels):
        return not_tested("label", limits.label, "the replies are free text: there is no label")
    texts = np.array([name or "(none)" for name in row_labels])
    names, member = np.unique(texts, return_inverse=True)
    values, shift = _variation(member, members)
    largest = np.argsort(-np.abs(shift))[:SHOWN].tolist()
    label_shifts = Counter({str(names[index])[:60]: float(shift[index]) for index in largest})
    detail = "moved most: " + ", ".join(f"{name!r} {change:+.0%}" for name, change in label_shifts.items())
    is_synthetic = pool.is_synthetic
    rows: list[int] = []
    for index in largest:
        if shift[index] > 0:
            rows += np.flatnonzero(is_synthetic & (member == index)).tolist()
    return finding_of(
        "label",
        values,
        limit=limits.label,
        detail=detail,
        rows=[pool.rows[row].id for row in rows],
        effect=beyond_chance(values),
    )


def _beyond(values: F64) -> F64:
    """Return (B,) each value minus the permutations' mean, in their standard deviations. values: (B,)."""
    return np.asarray((values - values[1:].mean()) / max(float(values[1:].std()), 1e-9))


def _chi_squared(kinds: NDArray[np.int64], members: F32) -> F64:
    """Return (B,) Pearson's chi-squared statistic of kinds (n,) by side. members: (B, n)."""
    inside, outside = _counts(kinds, members)
    # with s the share of members and N_k rows of kind k:  X^2 = sum_k (O_k - N_k s)^2 / (N_k s (1 - s))
    share = inside.sum(1, keepdims=True) / len(kinds)
    usual = (inside + outside) * share
    return np.asarray(((inside - usual) ** 2 / np.maximum(usual * (1 - share), 1e-9)).sum(1))


def _counts(kinds: NDArray[np.int64], members: F32) -> tuple[F64, F64]:
    """Return (B, K) rows of each kind that are members, and (B, K) rows that are not."""
    one_hot = np.eye(int(kinds.max()) + 1, dtype=np.float32)[kinds]
    inside = (members @ one_hot).astype(np.float64)
    return inside, one_hot.sum(0) - inside


def _variation(kinds: NDArray[np.int64], members: F32) -> tuple[F64, F64]:
    """Return (B,) total variation between members and others, and (K,) the observed gain of each kind.

    kinds: (n,) 0..K-1. members: (B, n).
    """
    inside, outside = _counts(kinds, members)
    count = inside.sum(1, keepdims=True)
    # shift_k = p_in(k) - p_out(k);  TV = 1/2 sum_k |shift_k|
    shift = inside / count - outside / (len(kinds) - count)
    return np.abs(shift).sum(1) / 2, shift[0]


FOLDS = 5
_RIDGE = 1.0


def classifier_test(space: SampleSpace, members: F32, limits: ValidationLimits) -> StatisticResult:
    """Test the AUC of a classifier on rows that it did not learn from.

    Classifier two-sample test (Lopez-Paz and Oquab 2017) with kernel ridge regression. Units are kept whole in the
    folds. The held-out scores are linear in the labels, so every permutation is trained anew at the cost of one
    product. members: (B, n).
    """
    scores = (members - members.mean(1, keepdims=True)) @ _hat(space).T
    values = _auc(scores, members)
    auc = float(values[0])
    detail = f"a classifier tells a synthetic row from a real one {auc:.0%} of the time; 50 % is chance"
    is_synthetic = space.pool.is_synthetic
    # the synthetic rows that are easiest to recognise first
    telling = np.argsort(-np.where(is_synthetic, scores[0], -np.inf))[: int(is_synthetic.sum())]
    ids = [space.pool.rows[row].id for row in telling.tolist()]
    return finding_of(
        "distinguishable", values, limit=limits.distinguishable, detail=detail, rows=ids, effect=auc - 0.5
    )


def _hat(space: SampleSpace) -> F32:
    """Return the (n, n) matrix that maps the labels of all rows to their held-out scores."""
    units = space.pool.units
    fold = np.random.default_rng([space.seed, 3]).permutation(int(units.max()) + 1)[units] % FOLDS
    # held-out rows o of a fold, training rows t:  scores_o = K_ot (K_tt + ridge I)^-1 y_t
    hat = np.zeros_like(space.kernel)
    for number in range(FOLDS):
        out, inside = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        if len(out) and len(inside):
            train_kernel = space.kernel[np.ix_(inside, inside)] + _RIDGE * np.eye(len(inside), dtype=np.float32)
            hat[np.ix_(out, inside)] = np.linalg.solve(train_kernel, space.kernel[np.ix_(inside, out)]).T
    return hat


def _auc(scores: NDArray[np.float32], members: F32) -> F64:
    """Return (B,) the probability that a member scores above a non-member. scores, members: (B, n)."""
    ranks = np.empty(scores.shape, np.float32)
    rank_values = np.broadcast_to(np.arange(1, scores.shape[1] + 1, dtype=np.float32), scores.shape)
    np.put_along_axis(ranks, np.argsort(scores, axis=1), rank_values, axis=1)
    # AUC = (R - a (a + 1) / 2) / (a b), with R the sum of the ranks of a members, against b others
    inside = members.sum(1, dtype=np.float64)
    outside = members.shape[1] - inside
    above = np.einsum("bn,bn->b", ranks, members, dtype=np.float64)
    return np.asarray((above - inside * (inside + 1) / 2) / (inside * outside))


def mmd_test(space: SampleSpace, members: F32, limits: ValidationLimits) -> StatisticResult:
    """Test the unbiased squared maximum mean discrepancy (Gretton et al. 2012, lemma 6).

    It is divided by the spread of the rows, 1 - mean kernel value of two rows. The effect is therefore a fraction of
    that spread: 0 for equal distributions. members: (B, n).
    """
    # MMD^2 = mean_{i != j in} k_ij + mean_{i != j out} k_ij - 2 mean_{i in, j out} k_ij; the diagonal is left out
    kernel = space.kernel.copy()
    np.fill_diagonal(kernel, 0)
    toward = (members @ kernel).astype(np.float64)
    total, rows = float(kernel.sum(dtype=np.float64)), members.shape[1]
    inside, reached = np.einsum("bn,bn->b", toward, members), toward.sum(1)
    count = members.sum(1, dtype=np.float64)
    n_others = rows - count
    values = (
        inside / np.maximum(count * (count - 1), 1)
        + (total - 2 * reached + inside) / np.maximum(n_others * (n_others - 1), 1)
        - 2 * (reached - inside) / (count * n_others)
    )
    spread = max(1 - total / (rows * (rows - 1)), 1e-9)
    part = float(values[0]) / spread
    detail = f"the sides are apart by {part:.3f} of the spread of rows"
    return finding_of("mmd", values / spread, limits.mmd, detail, effect=part)


# fraction of rows that by chance have no neighbour of the other side: (1 - other)^k = _CHANCE gives k
_CHANCE = 0.04
_FEWEST, _MOST = 3, 100


def coverage(space: SampleSpace, members: F32, limits: ValidationLimits) -> StatisticResult:
    """Test the fraction of real rows none of whose k nearest rows is synthetic.

    This is 1 - coverage (Naeem et al. 2020), with k chosen by the fraction of synthetic rows. Nearness is measured by
    topic. Neighbours by single words include rows of every topic, which would hide a lost topic. members: (B, n).
    """
    synthetic = float(space.pool.is_synthetic.mean())
    isolated = _alone(space.neighbours(_k(synthetic, len(members[0])), coarse=True), members)
    outside = 1 - members
    values = (isolated * outside).sum(1) / outside.sum(1)
    bare = np.flatnonzero(isolated[0] * outside[0])
    detail = f"{values[0]:.0%} of the real rows have no synthetic neighbour; chance gives {values[1:].mean():.0%}"
    ids = [space.pool.rows[row].id for row in bare.tolist()]
    finding = finding_of("coverage", values.astype(np.float64), limit=limits.coverage, detail=detail, rows=ids)
    return replace(finding, more={"regions": _regions(space, isolated[0])})


def novelty(space: SampleSpace, members: F32, limits: ValidationLimits) -> StatisticResult:
    """Test the fraction of synthetic rows none of whose k nearest rows is real.

    This is 1 - precision in the sense of Kynkaanniemi et al. 2019, with k chosen by the fraction of real rows.
    members: (B, n).
    """
    real = 1 - float(space.pool.is_synthetic.mean())
    isolated = _alone(space.neighbours(_k(real, len(members[0]))), 1 - members)
    values = (isolated * members).sum(1) / members.sum(1)
    ids = [space.pool.rows[row].id for row in np.flatnonzero(isolated[0] * members[0]).tolist()]
    detail = f"{values[0]:.0%} of the synthetic rows have no real neighbour; chance gives {values[1:].mean():.0%}"
    return finding_of("novelty", values.astype(np.float64), limit=limits.novelty, detail=detail, rows=ids)


def _k(other: float, rows: int) -> int:
    """Return the number of neighbours among which a row of the other side is nearly always found.

    other: fraction of all rows on the other side.
    """
    return min(max(_FEWEST, math.ceil(math.log(_CHANCE) / math.log(1 - other))), _MOST, rows - 1)


def _alone(neighbours: Any, members: F32) -> F32:
    """Return (B, n) 1 for rows without a member among their neighbours.

    neighbours: (n, n) sparse 0/1. members: (B, n).
    """
    return ((neighbours @ members.T) == 0).T.astype(np.float32)


def _regions(space: SampleSpace, isolated: F32) -> list[dict[str, Any]]:
    """Return the topics of real rows, the least covered first.

    Each has its numbers of rows, the covered fraction and a central row. isolated: (n,) 0/1.
    """
    real = ~space.pool.is_synthetic
    results = []
    topics = space.topics[-1]
    for topic in np.unique(topics[real]).tolist():
        rows = np.flatnonzero(real & (topics == topic))
        middle = rows[np.argmax(space.vectors[rows] @ space.vectors[rows].mean(0))]
        results.append(
            {
                "real": len(rows),
                "synthetic": int((space.pool.is_synthetic & (topics == topic)).sum()),
                "covered": round(1 - float(isolated[rows].mean()), 4),
                "example": space.pool.rows[int(middle)].id,
            }
        )
    return sorted(results, key=lambda region: (region["covered"], -region["real"]))


def out_of_distribution(vectors: F32, real_vectors: F32, real_units: NDArray[Any], rate: float) -> dict[int, str]:
    """Return row -> a sentence, for synthetic rows farther from reality than real rows are.

    vectors: (S, D). real_vectors: (R, D). real_units: (R,). All vectors have length 1.

    The p-value of a row is the fraction of real rows whose nearest row of another unit is as far (conformal, Bates et
    al. 2023). Rows with p at most `rate` are returned; with few real rows, those that are farther than all.
    """
    cosines = real_vectors @ real_vectors.T
    cosines[real_units[:, None] == real_units[None, :]] = -1
    usual = np.sort(cosines.max(1))
    nearest = np.concatenate(
        [(part @ real_vectors.T).max(1) for part in np.array_split(vectors, max(1, len(vectors) // 1000))]
    )
    # p = (1 + |{real rows whose nearest cosine is at most that of the row}|) / (R + 1)
    p = (1 + np.searchsorted(usual, nearest, side="right")) / (len(usual) + 1)
    outliers = np.flatnonzero(p <= max(rate, 1 / (len(usual) + 1)))
    text = "likeness {:.2f} to the nearest real row; {:.1%} of the real rows are so far from the others"
    return {int(row): text.format(nearest[row], p[row]) for row in outliers}
