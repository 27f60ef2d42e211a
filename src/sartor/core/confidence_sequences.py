"""Anytime-valid evidence and confidence sequences for a failure rate.

Of a rate, `bad` of `seen` observations were bad. The mixture likelihood over all rates (Jeffreys' prior) divided by
the likelihood of the rate q is a martingale of mean 1 where q is true. So it exceeds 1/a with a probability of at most
a, however often one looks and whenever one stops (Ville 1939; Robbins, Ann. Math. Stat. 41, 1970; Howard et al.,
arXiv:1810.08240). The rates that the evidence does not exclude are a confidence sequence: intervals that hold all at
once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class FailureRate:
    """How many were seen, and how many of them were bad."""

    seen: int = 0
    bad: int = 0

    def count(self, is_bad: bool) -> None:
        """One more."""
        self.seen += 1
        self.bad += is_bad

    @property
    def fraction(self) -> float:
        """Of bad ones; 0 where none was seen."""
        return self.bad / self.seen if self.seen else 0.0

    def against(self, rate: float) -> float:
        """Natural log of the evidence against `rate` being the true one."""
        good = self.seen - self.bad
        if (rate <= 0 and self.bad) or (rate >= 1 and good):
            return math.inf
        log_likelihood = (self.bad * math.log(rate) if self.bad else 0.0) + (good * math.log1p(-rate) if good else 0.0)
        return _log_beta(self.bad + 0.5, good + 0.5) - _log_beta(0.5, 0.5) - log_likelihood

    def is_above(self, rate: float, confidence: float) -> bool:
        """Return whether the true rate is above `rate`; wrongly at any count with a probability of at most 1 -
        confidence.
        """
        return self.fraction > rate and self.against(rate) >= -math.log1p(-confidence)

    def is_below(self, rate: float, confidence: float) -> bool:
        """Return whether the true rate is below `rate`, as `is_above` does."""
        return self.seen > 0 and self.fraction < rate and self.against(rate) >= -math.log1p(-confidence)

    def lower_limit(self, confidence: float) -> float:
        """Return the highest rate that the true one `is_above`: the lower end of the confidence sequence.

        Lower and upper limits of all counts together miss the true rate with a probability of at most 1 - confidence.
        For one
        `seen` both grow with `bad`: a bad observation in the place of a good one multiplies the evidence against q by
        (bad + 1/2) / (seen - bad - 1/2) * (1 - q) / q, which is above 1 for every q below the fraction; above it, by
        symmetry.
        """
        outside, inside = 0.0, self.fraction
        for _ in range(50):
            middle = (inside + outside) / 2
            outside, inside = (middle, inside) if self.is_above(middle, confidence) else (outside, middle)
        return outside

    def upper_limit(self, confidence: float) -> float:
        """Return the lowest rate that the true one `is_below`: the upper end of the confidence sequence; 1 where none
        is.
        """
        return 1.0 - FailureRate(self.seen, self.seen - self.bad).lower_limit(confidence) if self.seen else 1.0


def log_evidence(candidate: FailureRate, live: FailureRate, margin: float) -> float:
    """Natural log of the evidence that the candidate's rate is above the live version's plus `margin`; 0 or less is
    none.
    """
    low, high = live.fraction, candidate.fraction - margin
    if high <= low:
        return 0.0

    def at(rate: float) -> float:
        return candidate.against(min(1.0, rate + margin)) + live.against(rate)

    for _ in range(
        60
    ):  # the sum is convex in the live version's rate: its least value lies between the two best guesses
        lower_third, upper_third = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, upper_third) if at(lower_third) <= at(upper_third) else (lower_third, high)
    return max(0.0, at((low + high) / 2))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
