"""Cohen's kappa and acceptance sampling.

Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement 20 (1960). The
interval of kappa is the exact (Clopper-Pearson) interval of the observed agreement, transformed by kappa at the
observed chance agreement. Unlike the interval from the usual standard error, it has a positive width even if two
reviewers agree on everything.

Rows are drawn without replacement, so the number of bad rows in a sample is hypergeometric. The sample size and the
bound come from that distribution itself (a one-sided exact bound, the finite-population counterpart of Clopper &
Pearson 1934), not from an approximation. The order of the draw depends only on the seed and the ids, so a larger
sample begins with the smaller one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from sartor.core.errors import ConfigError
from sartor.core.statistics import interval
from sartor.curate.review.review_items import Decision, first_opinions

Estimate = Mapping[str, float]


@dataclass(frozen=True)
class ReviewerAgreement:
    """Agreement of two reviewers on the items that both judged.

    table: (verdict of the first, verdict of the second) -> items. Bounds have 95 % confidence.
    """

    reviewers: tuple[str, str]
    items: int
    agreed: int
    table: Mapping[tuple[str, str], int]

    @property
    def fraction(self) -> Estimate:
        """Observed agreement p_o: fraction of the items with equal verdicts, with its interval."""
        low, high = interval(self.agreed, self.items)
        return {"estimate": self.agreed / self.items, "low": low, "high": high}

    @property
    def by_chance(self) -> float:
        """Chance agreement p_e = sum_v n1(v) n2(v) / n^2, with n1, n2 the verdict counts of the two reviewers."""
        first_counts, second_counts = (Counter[str](), Counter[str]())
        for (first, second), count in self.table.items():
            first_counts[first] += count
            second_counts[second] += count
        return sum(first_counts[verdict] * second_counts[verdict] for verdict in first_counts) / self.items**2

    @property
    def kappa(self) -> Estimate | None:
        """Cohen's kappa (p_o - p_e) / (1 - p_e): 1 is full agreement, 0 chance agreement; None if p_e is 1."""
        chance = self.by_chance
        if chance >= 1:
            return None
        return {name: max(-1.0, (value - chance) / (1 - chance)) for name, value in self.fraction.items()}

    def as_json(self) -> dict[str, Any]:
        """Return the JSON that the command prints."""
        table = {f"{first}/{second}": count for (first, second), count in sorted(self.table.items())}
        counts = {"reviewers": list(self.reviewers), "items": self.items, "agreed": self.agreed}
        return {**counts, "fraction": self.fraction, "kappa": self.kappa, "table": table}


def agreements(decisions: Sequence[Sequence[Decision]]) -> list[ReviewerAgreement]:
    """Return the agreement of each pair of people with items in common, largest number of items first.

    decisions: one list per item. Only a person's first verdict counts, and no settling decision: later verdicts may be
    influenced by those of others.
    """
    tables: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    for of_item in decisions:
        opinions = first_opinions(of_item)
        for first, second in combinations(sorted(opinions), 2):
            tables.setdefault((first, second), Counter())[opinions[first].verdict, opinions[second].verdict] += 1
    results = []
    for pair, table in tables.items():
        agreed = sum(count for (first, second), count in table.items() if first == second)
        results.append(ReviewerAgreement(pair, table.total(), agreed, dict(table)))
    return sorted(results, key=lambda agreement: (-agreement.items, agreement.reviewers))


def size(population: int, error: float, confidence: float, allow: int = 0) -> int:
    """Return the smallest sample that bounds the fraction of bad rows.

    If at most `allow` rows of the sample are bad, at most the fraction `error` (0..1) of the population is bad. The
    statement is wrong in at most 1 - `confidence` of the cases. Raises ConfigError for values outside their range.

    >>> size(10_000, 0.01, 0.95)
    294
    """
    _check(error, confidence, allow)
    if population <= 0:
        raise ConfigError("there is no row to draw from", "name another --split, or a Dataset that has rows")
    # smallest n with P(X <= allow) <= 1 - confidence, X ~ Hypergeometric(population, bad, n)
    bad = int(error * population + 1e-9) + 1  # smallest number of bad rows above `error`
    if bad > population or allow >= bad:
        if bad > population:
            return 0
        problem = f"{allow} bad rows are allowed in the sample, and {bad} in {population:,} are too many already"
        raise ConfigError(problem, f"--allow {bad - 1}")
    low, high = 1, population
    while low < high:
        middle = (low + high) // 2
        if _at_most(allow, middle, bad, population) <= 1 - confidence:
            high = middle
        else:
            low = middle + 1
    return low


def most_bad(population: int, sample_size: int, bad_in_sample: int, confidence: float) -> int:
    """Return the upper confidence bound on the number of bad rows in the population.

    >>> most_bad(10_000, 294, 0, 0.95)
    100
    """
    # largest K with P(X <= bad_in_sample) > 1 - confidence, X ~ Hypergeometric(population, K, sample_size)
    low, high = bad_in_sample, population - (sample_size - bad_in_sample)
    while low < high:
        middle = (low + high + 1) // 2
        if _at_most(bad_in_sample, sample_size, middle, population) > 1 - confidence:
            low = middle
        else:
            high = middle - 1
    return low


def _at_most(bad_in_sample: int, sample_size: int, bad: int, population: int) -> float:
    """Return the probability that at most `bad_in_sample` rows of the sample are bad."""
    from scipy.stats import hypergeom  # not at the top: scipy takes a second to load, and counting items needs none

    return float(hypergeom.cdf(bad_in_sample, population, bad, sample_size))


def draw_ids(ids: Iterable[str], count: int, seed: int) -> list[str]:
    """Draw `count` ids by the seed, independent of the order of `ids`."""
    return sorted(set(ids), key=lambda row_id: hashlib.sha256(f"{seed}:{row_id}".encode()).digest())[:count]


def _check(error: float, confidence: float, allow: int) -> None:
    for name, value in (("error", error), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ConfigError(
                f"{name} is {value:g}, not between 0 and 1", f"--{name} {0.01 if name == 'error' else 0.95}"
            )
    if allow < 0:
        raise ConfigError(f"allow is {allow}", "--allow 0")
