"""Exact bounds of a fraction: no approximation by a normal curve, so that few rows and none found are told rightly.

Clopper & Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika 26 (1934).
"""

from __future__ import annotations

from scipy.special import betaincinv  # of scipy.stats, which reads ten times as much, it is `beta.ppf`


def upper_bound(count: int, of: int, confidence: float) -> float:
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
    return lower_bound(count, of, half), upper_bound(count, of, half)
