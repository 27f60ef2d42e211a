"""Exact binomial, Wilson and Newcombe intervals; Holm correction.

Clopper & Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika 26 (1934).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import betaincinv  # of scipy.stats, which reads ten times as much, it is `beta.ppf`


def clopper_pearson_upper(count: int, of: int, confidence: float) -> float:
    """The one-sided upper bound of a fraction of which `count` in `of` were seen.

    >>> round(upper_bound(0, 100, 0.95), 3)
    0.03
    """
    return 1.0 if count >= of else float(betaincinv(count + 1, of - count, confidence))


def lower_bound(count: int, of: int, confidence: float) -> float:
    """The one-sided lower bound."""
    return 0.0 if count <= 0 else float(betaincinv(count, of - count + 1, 1 - confidence))


def interval(count: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided interval; (0, 1) of no trial."""
    half = (1 + confidence) / 2
    return lower_bound(count, of, half), clopper_pearson_upper(count, of, half)


def holm_correction(chances: Sequence[float]) -> list[float]:
    """p-values corrected for being one of many: family-wise, without assumptions on how they hang together (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, most = [0.0] * len(chances), 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=lambda place: chances[place])):
        most = max(most, min(1.0, chances[place] * (len(chances) - rank)))
        corrected[place] = most
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


def newcombe(one: float, rows: float, other: float, others: float) -> tuple[float, float]:
    """The 95 % interval of the difference of two independent proportions.

    >>> [round(end, 2) for end in newcombe(0.7, 80, 0.5, 80)]
    [0.05, 0.34]
    """
    (low, high), (less, more) = wilson(one, rows), wilson(other, others)
    difference = one - other
    return difference - math.hypot(one - low, more - other), difference + math.hypot(high - one, other - less)
