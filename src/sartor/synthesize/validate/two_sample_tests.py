"""Classifier test, MMD, coverage, precision, drift."""

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
    """Words of prompts and of replies: the larger of their Kolmogorov-Smirnov distances."""
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
    """(B,) the largest distance of the two cumulative distributions of (n,) values."""
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order], append=values.max() + 1))  # only where the value changes
    inside = members[:, order].cumsum(1, dtype=np.float64)
    count = inside[:, -1:]
    outside = np.arange(1, len(values) + 1) - inside
    return np.asarray(np.abs(inside / count - outside / (len(values) - count))[:, ends].max(1))


def topics(space: SampleSpace, members: F32, limits: ValidationLimits) -> StatisticResult:
    """Chi-squared of how the two sides fall into topics, over all ways in which the topics were drawn.

    The effect is the total variation beyond chance in the way where it is largest, against what chance gives there;
    the rows are of the topics that grew most.
    """
    beyond = np.stack([_beyond(_chi_squared(clusters, members)) for clusters in space.topics])
    measured = [_variation(clusters, members) for clusters in space.topics]
    chosen = int(np.argmax([_beyond(values)[0] for values, _ in measured]))
    clusters, (values, shift) = space.topics[chosen], measured[chosen]
    grown = np.argsort(-shift)[:SHOWN]
    is_synthetic = space.pool.is_synthetic
    rows = [
        row
        for topic in grown.tolist()
        if shift[topic] > 0
        for row in np.flatnonzero(is_synthetic & (clusters == topic)).tolist()
    ]
    detail = (
        f"of {len(shift)} topics one gains {shift.max():+.0%}, one {shift.min():+.0%} ; they differ by {values[0]:.0%}"
    )
    ids = [space.pool.rows[row].id for row in rows]
    return finding_of("topic", beyond.mean(0), limits.topic, detail, ids, effect=beyond_chance(values))


def labels(pool: Pool, row_labels: Sequence[str | None], members: F32, limits: ValidationLimits) -> StatisticResult:
    """Total variation of the labels; a row without one is of its own kind."""
    if not any(row_labels):
        return not_tested("label", limits.label, "the replies are free text: there is no label")
    texts = np.array([name or "(none)" for name in row_labels])
    names, member = np.unique(texts, return_inverse=True)
    values, shift = _variation(member, members)
    largest = np.argsort(-np.abs(shift))[:SHOWN].tolist()
    label_shifts = Counter({str(names[index])[:60]: float(shift[index]) for index in largest})
    detail = "moved most: " + ", ".join(f"{name!r} {change:+.0%}" for name, change in label_shifts.items())
    is_synthetic = pool.is_synthetic
    rows = [
        row
        for index in largest
        if shift[index] > 0
        for row in np.flatnonzero(is_synthetic & (member == index)).tolist()
    ]
    return finding_of(
        "label", values, limits.label, detail, [pool.rows[row].id for row in rows], effect=beyond_chance(values)
    )


def _beyond(values: F64) -> F64:
    """(B,) how many deviations of the permutations each value is above their mean."""
    return np.asarray((values - values[1:].mean()) / max(float(values[1:].std()), 1e-9))


def _chi_squared(kinds: NDArray[np.int64], members: F32) -> F64:
    """(B,) Pearson's statistic of kinds of rows by side."""
    inside, outside = _counts(kinds, members)
    share = inside.sum(1, keepdims=True) / len(kinds)
    usual = (inside + outside) * share
    return np.asarray(((inside - usual) ** 2 / np.maximum(usual * (1 - share), 1e-9)).sum(1))


def _counts(kinds: NDArray[np.int64], members: F32) -> tuple[F64, F64]:
    """((B, K), (B, K)) how many rows of each kind are members, and how many are not."""
    one_hot = np.eye(int(kinds.max()) + 1, dtype=np.float32)[kinds]
    inside = (members @ one_hot).astype(np.float64)
    return inside, one_hot.sum(0) - inside


def _variation(kinds: NDArray[np.int64], members: F32) -> tuple[F64, F64]:
    """((B,) total variation of the kinds of rows between members and others, (K,) what each kind gained as it is)."""
    inside, outside = _counts(kinds, members)
    count = inside.sum(1, keepdims=True)
    shift = inside / count - outside / (len(kinds) - count)
    return np.abs(shift).sum(1) / 2, shift[0]


FOLDS = 5
_RIDGE = 1.0


def classifier_test(space: SampleSpace, members: F32, limits: ValidationLimits) -> StatisticResult:
    """Classifier two-sample test (Lopez-Paz and Oquab 2017): AUC of kernel ridge on rows that it did not learn from.

    Units are kept whole in the folds. The held-out scores are linear in the labels, so every permutation is trained
    anew at the cost of one product.
    """
    scores = (members - members.mean(1, keepdims=True)) @ _hat(space).T
    values = _auc(scores, members)
    auc = float(values[0])
    detail = f"a classifier tells a synthetic row from a real one {auc:.0%} of the time; 50 % is chance"
    is_synthetic = space.pool.is_synthetic
    # the rows that give the synthetic side away most
    telling = np.argsort(-np.where(is_synthetic, scores[0], -np.inf))[: int(is_synthetic.sum())]
    ids = [space.pool.rows[row].id for row in telling.tolist()]
    return finding_of("distinguishable", values, limits.distinguishable, detail, ids, effect=auc - 0.5)


def _hat(space: SampleSpace) -> F32:
    """(n, n): held-out scores of all rows are this times their labels."""
    units = space.pool.units
    fold = np.random.default_rng([space.seed, 3]).permutation(int(units.max()) + 1)[units] % FOLDS
    hat = np.zeros_like(space.kernel)
    for number in range(FOLDS):
        out, inside = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        if len(out) and len(inside):
            train_kernel = space.kernel[np.ix_(inside, inside)] + _RIDGE * np.eye(len(inside), dtype=np.float32)
            hat[np.ix_(out, inside)] = np.linalg.solve(train_kernel, space.kernel[np.ix_(inside, out)]).T
    return hat


def _auc(scores: NDArray[np.float32], members: F32) -> F64:
    """(B,) the chance that a member scores above a non-member."""
    ranks = np.empty(scores.shape, np.float32)
    rank_values = np.broadcast_to(np.arange(1, scores.shape[1] + 1, dtype=np.float32), scores.shape)
    np.put_along_axis(ranks, np.argsort(scores, axis=1), rank_values, axis=1)
    inside = members.sum(1, dtype=np.float64)
    outside = members.shape[1] - inside
    above = np.einsum("bn,bn->b", ranks, members, dtype=np.float64)
    return np.asarray((above - inside * (inside + 1) / 2) / (inside * outside))


def mmd_test(space: SampleSpace, members: F32, limits: ValidationLimits) -> StatisticResult:
    """The unbiased squared maximum mean discrepancy (Gretton et al. 2012, lemma 6), over the mean squared distance of
    two rows.

    The effect is a part of reality's own spread: 0 for the same distribution.
    """
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


# by chance so few rows have no neighbour of the other side
_CHANCE = 0.04
_FEWEST, _MOST = 3, 100


def coverage(space: SampleSpace, members: F32, limits: ValidationLimits) -> StatisticResult:
    """Real rows none of whose k nearest is synthetic: 1 - coverage (Naeem et al. 2020), k by how many are synthetic.

    Near is what is about the same: among neighbours by single words are rows of every topic, and a lost one stays
    unseen.
    """
    synthetic = float(space.pool.is_synthetic.mean())
    isolated = _alone(space.neighbours(_k(synthetic, len(members[0])), coarse=True), members)
    outside = 1 - members
    values = (isolated * outside).sum(1) / outside.sum(1)
    bare = np.flatnonzero(isolated[0] * outside[0])
    detail = f"{values[0]:.0%} of the real rows have no synthetic neighbour; chance gives {values[1:].mean():.0%}"
    ids = [space.pool.rows[row].id for row in bare.tolist()]
    finding = finding_of("coverage", values.astype(np.float64), limits.coverage, detail, ids)
    return replace(finding, more={"regions": _regions(space, isolated[0])})


def novelty(space: SampleSpace, members: F32, limits: ValidationLimits) -> StatisticResult:
    """Synthetic rows none of whose k nearest is real: 1 - precision in the sense of Kynkaanniemi et al. 2019, k as
    above.
    """
    real = 1 - float(space.pool.is_synthetic.mean())
    isolated = _alone(space.neighbours(_k(real, len(members[0]))), 1 - members)
    values = (isolated * members).sum(1) / members.sum(1)
    ids = [space.pool.rows[row].id for row in np.flatnonzero(isolated[0] * members[0]).tolist()]
    detail = f"{values[0]:.0%} of the synthetic rows have no real neighbour; chance gives {values[1:].mean():.0%}"
    return finding_of("novelty", values.astype(np.float64), limits.novelty, detail, ids)


def _k(other: float, rows: int) -> int:
    """How many neighbours to look at so that one of the other side, a fraction `other` of all, is among them nearly
    always.
    """
    return min(max(_FEWEST, math.ceil(math.log(_CHANCE) / math.log(1 - other))), _MOST, rows - 1)


def _alone(neighbours: Any, members: F32) -> F32:
    """(B, n) 1 where none of a row's neighbours, (n, n) of 0 and 1, is a member."""
    return ((neighbours @ members.T) == 0).T.astype(np.float32)


def _regions(space: SampleSpace, isolated: F32) -> list[dict[str, Any]]:
    """Topics of real rows, the least covered first: how many rows, which part is covered, and a row from its
    middle.
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
    """Synthetic rows that are farther from reality than real rows are: row -> a sentence.

    A row's p is the fraction of real rows whose nearest of another unit is as far (conformal, Bates et al. 2023); rows
    at or below `rate` are named, or of few real rows those that are farther than all.
    """
    cosines = real_vectors @ real_vectors.T
    cosines[real_units[:, None] == real_units[None, :]] = -1
    usual = np.sort(cosines.max(1))
    nearest = np.concatenate(
        [(part @ real_vectors.T).max(1) for part in np.array_split(vectors, max(1, len(vectors) // 1000))]
    )
    p = (1 + np.searchsorted(usual, nearest, side="right")) / (len(usual) + 1)
    outliers = np.flatnonzero(p <= max(rate, 1 / (len(usual) + 1)))
    text = "likeness {:.2f} to the nearest real row; {:.1%} of the real rows are so far from the others"
    return {int(row): text.format(nearest[row], p[row]) for row in outliers}
