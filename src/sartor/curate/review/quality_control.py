"""How far two people agree who judged the same items: percent agreement, and Cohen's kappa, which takes off what chance gives.

Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement 20 (1960). The interval is
that of the observed agreement (exact, Clopper-Pearson), carried through kappa at the chance agreement found: unlike the usual
standard error it is no point where two people agree on everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from sartor.core.statistics import interval
from sartor.curate.review.items import VERDICTS, Decision
from sartor.curate.review.standing import first

Estimate = Mapping[str, float]


@dataclass(frozen=True)
class Agreement:
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
        mine, theirs = (Counter[str](), Counter[str]())
        for (one, other), count in self.table.items():
            mine[one] += count
            theirs[other] += count
        return sum(mine[verdict] * theirs[verdict] for verdict in VERDICTS) / self.items**2

    @property
    def kappa(self) -> Estimate | None:
        """1 is full agreement, 0 that of chance."""
        chance = self.by_chance
        if chance >= 1:
            return None
        return {name: max(-1.0, (value - chance) / (1 - chance)) for name, value in self.fraction.items()}

    def as_json(self) -> dict[str, Any]:
        """As the command says it."""
        table = {f"{one}/{other}": count for (one, other), count in sorted(self.table.items())}
        counts = {"reviewers": list(self.reviewers), "items": self.items, "agreed": self.agreed}
        return {**counts, "fraction": self.fraction, "kappa": self.kappa, "table": table}


def agreements(decisions: Sequence[Sequence[Decision]]) -> list[Agreement]:
    """Every pair of people who judged an item in common, those with most first. `decisions` has a list for each item.

    What counts is the verdict that a person gave first and not to settle: later ones may know of the other's.
    """
    tables: dict[tuple[str, str], Counter[tuple[str, str]]] = {}
    for of_item in decisions:
        said = first(of_item)
        for one, other in combinations(sorted(said), 2):
            tables.setdefault((one, other), Counter())[said[one].verdict, said[other].verdict] += 1
    found = [
        Agreement(pair, table.total(), sum(count for (one, other), count in table.items() if one == other), dict(table))
        for pair, table in tables.items()
    ]
    return sorted(found, key=lambda one: (-one.items, one.reviewers))
