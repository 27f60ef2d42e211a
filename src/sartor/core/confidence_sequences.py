"""Anytime-valid evidence and confidence sequences for a failure rate.

k = `bad` of n = `seen` observations were bad. The evidence against a rate q is the mixture likelihood over all rates
(Jeffreys' prior, Beta(1/2, 1/2)) divided by the likelihood of q:

    E(q) = B(k + 1/2, n - k + 1/2) / B(1/2, 1/2) / (q^k (1 - q)^(n - k))

E(q) is a martingale of mean 1 if q is true. It exceeds 1/a with a probability of at most a, at any number of looks and
any stopping time (Ville 1939; Robbins, Ann. Math. Stat. 41, 1970; Howard et al., arXiv:1810.08240). The rates that the
evidence does not exclude form a confidence sequence: intervals that hold for all counts at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class FailureRate:
    """Counts of observations and of bad ones among them."""

    seen: int = 0
    bad: int = 0

    def count(self, is_bad: bool) -> None:
        """Add one observation."""
        self.seen += 1
        self.bad += is_bad

    @property
    def fraction(self) -> float:
        """Fraction of bad observations; 0 if there are none."""
        return self.bad / self.seen if self.seen else 0.0

    def against(self, rate: float) -> float:
        """Return log E(q), the natural log of the evidence against `rate` being the true rate q."""
        good = self.seen - self.bad
        if (rate <= 0 and self.bad) or (rate >= 1 and good):
            return math.inf
        log_likelihood = (self.bad * math.log(rate) if self.bad else 0.0) + (good * math.log1p(-rate) if good else 0.0)
        return _log_beta(self.bad + 0.5, good + 0.5) - _log_beta(0.5, 0.5) - log_likelihood

    def is_above(self, rate: float, confidence: float) -> bool:
        """Return whether the evidence shows that the true rate is above `rate`.

        The probability of a wrong answer, at any count, is at most 1 - confidence.
        """
        return self.fraction > rate and self.against(rate) >= -math.log1p(-confidence)

    def is_below(self, rate: float, confidence: float) -> bool:
        """Return whether the evidence shows that the true rate is below `rate`.

        The error bound is that of `is_above`.
        """
        return self.seen > 0 and self.fraction < rate and self.against(rate) >= -math.log1p(-confidence)

    def lower_limit(self, confidence: float) -> float:
        """Return the highest rate that the true rate `is_above`: the lower end of the confidence sequence.

        Lower and upper limits of all counts together miss the true rate with a probability of at most 1 - confidence.
        For a fixed `seen` both limits grow with `bad`. Replacing a good observation by a bad one multiplies the
        evidence against q by (bad + 1/2) / (seen - bad - 1/2) * (1 - q) / q. That factor is above 1 for every q below
        the fraction; above the fraction the argument is symmetric.
        """
        # bisection for the largest q in [0, k / n] whose evidence still excludes it
        outside, inside = 0.0, self.fraction
        for _ in range(50):
            middle = (inside + outside) / 2
            outside, inside = (middle, inside) if self.is_above(middle, confidence) else (outside, middle)
        return outside

    def upper_limit(self, confidence: float) -> float:
        """Return the lowest rate that the true rate `is_below`: the upper end of the sequence; 1 if there is none."""
        # by symmetry: 1 - the lower limit of the rate of good observations
        return 1.0 - FailureRate(self.seen, self.seen - self.bad).lower_limit(confidence) if self.seen else 1.0


def log_evidence(candidate: FailureRate, live: FailureRate, margin: float) -> float:
    """Return the log evidence that the candidate's rate exceeds the live version's by more than `margin`.

    It is the least evidence against any pair of rates (q + margin, q), as a natural log; 0 is no evidence.
    """
    low, high = live.fraction, candidate.fraction - margin
    if high <= low:
        return 0.0

    def at(rate: float) -> float:
        return candidate.against(min(1.0, rate + margin)) + live.against(rate)

    # f(q) = log E_candidate(q + margin) + log E_live(q) is convex in the live version's rate q.
    # Its minimum lies between the two observed optima q = live.fraction and q = candidate.fraction - margin.
    for _ in range(60):
        lower_third, upper_third = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, upper_third) if at(lower_third) <= at(upper_third) else (lower_third, high)
    return max(0.0, at((low + high) / 2))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
