"""Is the tuned model better, worse, or can one not tell? A paired bootstrap over groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Means of both sides, and the interval of their difference (tuned minus base)."""

    base: float
    tuned: float
    difference: float
    low: float
    high: float

    def verdict(self, *, higher_is_better: bool = True) -> Literal["better", "worse", "cannot tell"]:
        """What the interval says: it lies on one side of 0, or it does not."""
        if self.low <= 0 <= self.high:
            return "cannot tell"
        return "better" if (self.low > 0) == higher_is_better else "worse"


Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def paired(
    base: Sequence[float], tuned: Sequence[float], groups: Sequence[str], weights: Sequence[float] | None = None, seed: int = 0
) -> Comparison:
    """Compare two sides scored on the same rows. Inputs: (N,) each; `weights` makes the means weighted (tokens per row).

    See `corpus`, of which a mean is the plainest case.
    """
    base_scores, tuned_scores = np.asarray(base, float), np.asarray(tuned, float)
    weight = np.ones_like(base_scores) if weights is None else np.asarray(weights, float)
    before, after = (np.stack([weight * scores, weight], 1) for scores in (base_scores, tuned_scores))
    widest = max(1.0, float(np.abs(np.concatenate([base_scores, tuned_scores])).max()))
    return corpus(before, after, groups, lambda found: found[:, 0] / found[:, 1], widest=widest, seed=seed)


def corpus(
    base: NDArray[np.float64],
    tuned: NDArray[np.float64],
    groups: Sequence[str],
    statistic: Statistic,
    *,
    widest: float = 1.0,
    seed: int = 0,
) -> Comparison:
    """Compare two sides by a statistic of the whole set that is a function of sums over rows: macro-F1, a word error rate.

    base, tuned: (N, K) what each row adds to the sums. statistic: (R, K) sums -> (R,) values. Percentile bootstrap of the
    difference (Efron & Tibshirani 1993, ch. 13), 10,000 resamples. Whole groups are drawn, not rows: rows of one group fail
    together, and drawing them apart would make the interval too narrow. One group gives no interval: every difference that
    the scores allow is possible then, -widest..widest.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    sums = [np.zeros((len(names), side.shape[1])) for side in (base, tuned)]
    for side, rows in zip(sums, (base, tuned), strict=True):
        np.add.at(side, member, rows)
    before, after = (float(statistic(side.sum(0, keepdims=True))[0]) for side in sums)
    if len(names) < 2:
        return Comparison(before, after, after - before, -widest, widest)
    rng = np.random.default_rng(seed)
    differences = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 500):  # in slices: 10,000 x groups of indices at once could be gigabytes
        drawn = rng.integers(0, len(names), (500, len(names))) + np.arange(500)[:, None] * len(names)
        # a resample is a sum over groups, each as often as it was drawn
        times = np.bincount(drawn.ravel(), minlength=500 * len(names)).reshape(500, -1).astype(float)
        first, second = (statistic(times @ side) for side in sums)
        differences[start : start + 500] = second - first
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Comparison(before, after, after - before, float(low), float(high))
