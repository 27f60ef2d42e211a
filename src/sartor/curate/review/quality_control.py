"""Cohen's kappa and acceptance sampling.

Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement 20 (1960). The
interval is that of the observed agreement (exact, Clopper-Pearson), carried through kappa at the chance agreement
found: unlike the usual standard error it is no point where two people agree on everything.

Rows are drawn without putting back, so the number of bad ones in a sample is hypergeometric; both the plan and the
bound come from that distribution itself (a one-sided exact bound, the finite population's counterpart of Clopper &
Pearson 1934), not from an approximation. The order of drawing follows from the seed and the ids alone: a larger sample
begins with the smaller one.
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
from sartor.curate.review.review_items import VERDICTS, Decision, first_opinions

Estimate = Mapping[str, float]


@dataclass(frozen=True)
class ReviewerAgreement:
    """Of two people over the items that both judged. `kappa` is None where chance alone would agree on everything.

    table: (verdict of the first, of the second) -> items. Bounds have 95 % confidence.
    """

    reviewers: tuple[str, str]
    items: int
    agreed: int
    table: Mapping[tuple[str, str], int]

    @property
    def fraction(self) -> Estimate:
        """Of the items, how many both judged alike."""
        low, high = interval(self.agreed, self.items)
        return {"estimate": self.agreed / self.items, "low": low, "high": high}

    @property
    def by_chance(self) -> float:
        """The agreement of two who judge as often so, but blindly."""
        first_counts, second_counts = (Counter[str](), Counter[str]())
        for (first, second), count in self.table.items():
            first_counts[first] += count
            second_counts[second] += count
        return sum(first_counts[verdict] * second_counts[verdict] for verdict in VERDICTS) / self.items**2

    @property
    def kappa(self) -> Estimate | None:
        """1 is full agreement, 0 that of chance."""
        chance = self.by_chance
        if chance >= 1:
            return None
        return {name: max(-1.0, (value - chance) / (1 - chance)) for name, value in self.fraction.items()}

    def as_json(self) -> dict[str, Any]:
        """As the command says it."""
        table = {f"{first}/{second}": count for (first, second), count in sorted(self.table.items())}
        counts = {"reviewers": list(self.reviewers), "items": self.items, "agreed": self.agreed}
        return {**counts, "fraction": self.fraction, "kappa": self.kappa, "table": table}


def agreements(decisions: Sequence[Sequence[Decision]]) -> list[ReviewerAgreement]:
    """Every pair of people who judged an item in common, those with most first. `decisions` has a list for each item.

    What counts is the verdict that a person gave first and not to settle: later ones may know of the other's.
    """
    tables: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    for of_item in decisions:
        opinions = first_opinions(of_item)
        for first, second in combinations(sorted(opinions), 2):
            tables.setdefault((first, second), Counter())[opinions[first].verdict, opinions[second].verdict] += 1
    results = [
        ReviewerAgreement(
            pair, table.total(), sum(count for (first, second), count in table.items() if first == second), dict(table)
        )
        for pair, table in tables.items()
    ]
    return sorted(results, key=lambda agreement: (-agreement.items, agreement.reviewers))


def size(population: int, error: float, confidence: float, allow: int = 0) -> int:
    """The fewest rows to look at so that, if at most `allow` of them are bad, at most `error` (0..1) of all are.

    That statement is wrong in at most 1 - `confidence` of the cases. Raises ConfigError for numbers that mean nothing.

    >>> size(10_000, 0.01, 0.95)
    294
    """
    _check(error, confidence, allow)
    if population <= 0:
        raise ConfigError("there is no row to draw from", "name another --split, or a Dataset that has rows")
    bad = int(error * population + 1e-9) + 1  # the fewest that would be too many
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
    """The most bad rows of the population that `bad_in_sample` bad ones in `sample_size` do not speak against with
    this confidence.

    >>> most_bad(10_000, 294, 0, 0.95)
    100
    """
    low, high = bad_in_sample, population - (sample_size - bad_in_sample)
    while low < high:
        middle = (low + high + 1) // 2
        if _at_most(bad_in_sample, sample_size, middle, population) > 1 - confidence:
            low = middle
        else:
            high = middle - 1
    return low


def _at_most(bad_in_sample: int, sample_size: int, bad: int, population: int) -> float:
    """How probable it is that at most `bad_in_sample` of the rows that are looked at are bad."""
    from scipy.stats import hypergeom  # not above: whatever asks whether a queue is empty would wait a second for it

    return float(hypergeom.cdf(bad_in_sample, population, bad, sample_size))


def draw_ids(ids: Iterable[str], count: int, seed: int) -> list[str]:
    """`count` of the ids, at random by the seed; whatever order they come in."""
    return sorted(set(ids), key=lambda row_id: hashlib.sha256(f"{seed}:{row_id}".encode()).digest())[:count]


def _check(error: float, confidence: float, allow: int) -> None:
    for name, value in (("error", error), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ConfigError(
                f"{name} is {value:g}, not between 0 and 1", f"--{name} {0.01 if name == 'error' else 0.95}"
            )
    if allow < 0:
        raise ConfigError(f"allow is {allow}", "--allow 0")
