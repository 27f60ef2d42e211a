"""Exact binomial, Wilson and Newcombe intervals; Holm correction; area under a ROC curve.

Clopper & Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika 26
(1934).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scipy.special import betaincinv  # equals scipy.stats.beta.ppf, whose import reads ten times as much

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def clopper_pearson_upper(count: int, total: int, confidence: float) -> float:
    """Return the one-sided upper bound of a fraction of which `count` in `total` were observed.

    It solves I_p(count + 1, total - count) = confidence for p; I is the regularised incomplete beta function.

    >>> round(clopper_pearson_upper(0, 100, 0.95), 3)
    0.03
    """
    return 1.0 if count >= total else float(betaincinv(count + 1, total - count, confidence))


def lower_bound(count: int, total: int, confidence: float) -> float:
    """Return the one-sided lower bound of a fraction of which `count` in `total` were observed.

    It solves I_p(count, total - count + 1) = 1 - confidence for p.
    """
    return 0.0 if count <= 0 else float(betaincinv(count, total - count + 1, 1 - confidence))


def interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided Clopper-Pearson interval; (0, 1) without trials."""
    quantile = (1 + confidence) / 2
    return lower_bound(count, total, quantile), clopper_pearson_upper(count, total, quantile)


def holm_correction(chances: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple tests by Holm's method (1979).

    They control the family-wise error rate without assumptions on the dependence of the tests: p'_(i) = max over j <=
    i of min(1, (m - j + 1) p_(j)), for m p-values in ascending order.

    >>> holm_correction([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, highest = [0.0] * len(chances), 0.0
    for rank, index in enumerate(sorted(range(len(chances)), key=lambda index: chances[index])):
        highest = max(highest, min(1.0, chances[index] * (len(chances) - rank)))
        corrected[index] = highest
    return corrected


Z = 1.959964  # standard normal quantile of a two-sided 95 % interval


def wilson(rate: float, rows: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion.

    rate: observed proportion p.
    rows: number of trials n; may be fractional.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    >>> [round(end, 3) for end in wilson(0.5, 10)]
    [0.237, 0.763]
    """
    if rows <= 0:
        return 0.0, 1.0
    middle, width = rate + Z**2 / (2 * rows), Z * math.sqrt(rate * (1 - rate) / rows + Z**2 / (4 * rows**2))
    return max(0.0, (middle - width) / (1 + Z**2 / rows)), min(1.0, (middle + width) / (1 + Z**2 / rows))


def newcombe(rate: float, rows: float, other_rate: float, other_rows: float) -> tuple[float, float]:
    """Return Newcombe's 95 % interval of the difference of two independent proportions.

    With Wilson's limits (l1, u1) and (l2, u2) of p1 and p2 (Newcombe 1998, method 10):

    (p1 - p2 - sqrt((p1 - l1)^2 + (u2 - p2)^2), p1 - p2 + sqrt((u1 - p1)^2 + (p2 - l2)^2))

    >>> [round(end, 2) for end in newcombe(0.7, 80, 0.5, 80)]
    [0.05, 0.34]
    """
    (low, high), (other_low, other_high) = wilson(rate, rows), wilson(other_rate, other_rows)
    difference = rate - other_rate
    return difference - math.hypot(rate - low, other_high - other_rate), difference + math.hypot(
        high - rate, other_rate - other_low
    )


def area_under_roc(positives: ArrayLike, negatives: ArrayLike) -> tuple[float, float]:
    """Return the area under the ROC curve and its standard error (DeLong et al. 1988, Biometrics 44).

    positives: (N,) scores, N at least 2. negatives: (M,) scores, M at least 2. Ties count 1/2.

    >>> area_under_roc([1.0, 1.0, 0.0], [0.0, 0.0])[0]
    0.8333333333333334
    """
    import numpy as np
    from scipy.stats import rankdata  # half a second that other callers of this module need not wait for

    high, low = np.asarray(positives, float), np.asarray(negatives, float)
    count, other_count = len(high), len(low)
    ranks = rankdata(np.concatenate([high, low]))
    # placements (DeLong et al. 1988), ties count 1/2:
    #   v_i = (1/M) #{j: low_j < high_i}, (N,);  w_j = (1/N) #{i: high_i > low_j}, (M,)
    #   AUC = mean(v);  Var(AUC) = var(v) / N + var(w) / M
    placements = (ranks[:count] - rankdata(high)) / other_count
    other_placements = 1 - (ranks[count:] - rankdata(low)) / count
    deviation = np.sqrt(placements.var(ddof=1) / count + other_placements.var(ddof=1) / other_count)
    return float(placements.mean()), float(deviation)
