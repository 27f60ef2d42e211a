"""Exact binomial, Wilson and Newcombe intervals; Holm correction.

Clopper & Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika 26
(1934).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import betaincinv  # of scipy.stats, which reads ten times as much, it is `beta.ppf`


def clopper_pearson_upper(count: int, total: int, confidence: float) -> float:
    """The one-sided upper bound of a fraction of which `count` in `total` were seen.

    >>> round(upper_bound(0, 100, 0.95), 3)
    0.03
    """
    return 1.0 if count >= total else float(betaincinv(count + 1, total - count, confidence))


def lower_bound(count: int, total: int, confidence: float) -> float:
    """The one-sided lower bound."""
    return 0.0 if count <= 0 else float(betaincinv(count, total - count + 1, 1 - confidence))


def interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided interval; (0, 1) of no trial."""
    quantile = (1 + confidence) / 2
    return lower_bound(count, total, quantile), clopper_pearson_upper(count, total, quantile)


def holm_correction(chances: Sequence[float]) -> list[float]:
    """p-values corrected for being one of many: family-wise, without assumptions on how they hang together (Holm
    1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, highest = [0.0] * len(chances), 0.0
    for rank, index in enumerate(sorted(range(len(chances)), key=lambda index: chances[index])):
        highest = max(highest, min(1.0, chances[index] * (len(chances) - rank)))
        corrected[index] = highest
    return corrected


Z = 1.959964  # of a 95 % interval


def wilson(rate: float, rows: float) -> tuple[float, float]:
    """The 95 % interval of a proportion that was found in so many rows.

    >>> [round(end, 3) for end in wilson(0.5, 10)]
    [0.237, 0.763]
    """
    if rows <= 0:
        return 0.0, 1.0
    middle, width = rate + Z**2 / (2 * rows), Z * math.sqrt(rate * (1 - rate) / rows + Z**2 / (4 * rows**2))
    return max(0.0, (middle - width) / (1 + Z**2 / rows)), min(1.0, (middle + width) / (1 + Z**2 / rows))


def newcombe(rate: float, rows: float, other_rate: float, other_rows: float) -> tuple[float, float]:
    """The 95 % interval of the difference of two independent proportions.

    >>> [round(end, 2) for end in newcombe(0.7, 80, 0.5, 80)]
    [0.05, 0.34]
    """
    (low, high), (other_low, other_high) = wilson(rate, rows), wilson(other_rate, other_rows)
    difference = rate - other_rate
    return difference - math.hypot(rate - low, other_high - other_rate), difference + math.hypot(
        high - rate, other_rate - other_low
    )
