"""Part of curate.bias.rates."""

from __future__ import annotations

import math

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
