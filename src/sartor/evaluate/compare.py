"""Is the tuned model better, worse, or can one not tell? A paired bootstrap over groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

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


def paired(
    base: Sequence[float], tuned: Sequence[float], groups: Sequence[str], weights: Sequence[float] | None = None, seed: int = 0
) -> Comparison:
    """Compare two sides scored on the same rows. Inputs: (N,) each; `weights` makes the means weighted (tokens per row).

    Percentile bootstrap of the difference (Efron & Tibshirani 1993, ch. 13), 10,000 resamples. Whole groups are drawn,
    not rows: rows of one group fail together, and drawing them apart would make the interval too narrow. One group gives
    no interval: every difference that the scores allow is possible then, -1..1 for scores in 0..1.
    """
    base_scores, tuned_scores = np.asarray(base, float), np.asarray(tuned, float)
    weight = np.ones_like(base_scores) if weights is None else np.asarray(weights, float)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    # per group: sums of weight, of weighted base and of weighted tuned scores; a resample is a sum over drawn groups
    mass = np.bincount(member, weight)
    base_mass, tuned_mass = np.bincount(member, weight * base_scores), np.bincount(member, weight * tuned_scores)
    means = base_mass.sum() / mass.sum(), tuned_mass.sum() / mass.sum()
    if len(names) < 2:
        widest = max(1.0, float(np.abs(np.concatenate([base_scores, tuned_scores])).max()))
        return Comparison(float(means[0]), float(means[1]), float(means[1] - means[0]), -widest, widest)
    rng = np.random.default_rng(seed)
    differences = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 500):  # in slices: 10,000 x groups of indices at once could be gigabytes
        drawn = rng.integers(0, len(names), (500, len(names)))
        gain = tuned_mass[drawn].sum(1) - base_mass[drawn].sum(1)
        differences[start : start + 500] = gain / mass[drawn].sum(1)
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Comparison(float(means[0]), float(means[1]), float(means[1] - means[0]), float(low), float(high))
