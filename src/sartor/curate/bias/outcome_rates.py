"""Outcome rates by group with intervals and tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.statistics import Z, holm_correction, newcombe, wilson
from sartor.curate.bias.group_membership import Memberships

F64 = NDArray[np.float64]
FEWEST = 5  # rows of a group with an outcome: fewer are counted and not compared
MOST_OUTCOMES = 12
FOUR_FIFTHS = 0.8  # EEOC Uniform Guidelines, 29 CFR 1607.4 D
ALPHA, NOTABLE_GAP = 0.05, 0.05


@dataclass(frozen=True)
class OutcomeRate:
    """How many rows of a group there are, by weight, and which fraction has the outcome: Wilson's 95 % interval (1927)."""

    rows: float
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Gap:
    """A group's outcome rate less that of the other groups of its attribute, with Newcombe's 95 % interval (1998, method 10).

    p: two-sided, of two proportions pooled, on the effective number of rows; p_corrected: by Holm over all gaps of a report.
    """

    attribute: str
    group: str
    outcome: str
    rate: float
    others: float
    difference: float
    low: float
    high: float
    p: float
    p_corrected: float = 1.0

    @property
    def is_notable(self) -> bool:
        """Beyond chance, and of a size that matters."""
        return self.p_corrected <= ALPHA and abs(self.difference) > NOTABLE_GAP


@dataclass(frozen=True)
class Ratio:
    """The lowest group's rate over the highest's, with a 95 % interval (Katz et al. 1978); under 0.8 it fails four fifths."""

    attribute: str
    outcome: str
    lowest: str
    highest: str
    ratio: float
    low: float
    high: float

    @property
    def passes_four_fifths(self) -> bool:
        """Whether the rule of thumb of the US employment agencies is kept."""
        return self.ratio >= FOUR_FIFTHS


@dataclass(frozen=True)
class OutcomeRates:
    """What was measured: attribute -> group -> outcome -> Rate, the gaps, largest first, and the ratios."""

    rates: dict[str, dict[str, dict[str, OutcomeRate]]]
    gaps: list[Gap]
    ratios: list[Ratio]

    @property
    def largest_gap(self) -> float:
        """0..1; 0 where nothing could be compared."""
        return max((abs(gap.difference) for gap in self.gaps), default=0.0)

    @property
    def notable(self) -> list[Gap]:
        """Gaps beyond chance and of a size that matters."""
        return [gap for gap in self.gaps if gap.is_notable]

    def as_json(self) -> dict[str, Any]:
        """For a command's JSON and a manifest."""
        return {
            "largest_gap": self.largest_gap,
            "notable": len(self.notable),
            "rates": {
                attribute: {group: {name: asdict(rate) for name, rate in some.items()} for group, some in of.items()}
                for attribute, of in self.rates.items()
            },
            "gaps": [{**asdict(gap), "notable": gap.is_notable} for gap in self.gaps],
            "selection_ratios": [{**asdict(ratio), "four_fifths": ratio.passes_four_fifths} for ratio in self.ratios],
        }


def measure_rates(people: Memberships, outcomes: Sequence[str | None], weights: Sequence[float] | None = None) -> OutcomeRates:
    """The rates of N rows, of which those without an outcome, or without a group of an attribute, are not counted there.

    With weights (N,) a group's rows count by Kish's effective number, so that weighting widens the intervals.
    """
    weight = np.ones(len(outcomes)) if weights is None else np.asarray(weights, float)
    names = [name for name, _ in Counter(one for one in outcomes if one is not None).most_common(MOST_OUTCOMES)]
    hits = {name: np.array([one == name for one in outcomes]) for name in names}
    known = np.array([one is not None for one in outcomes])
    rates: dict[str, dict[str, dict[str, OutcomeRate]]] = {}
    gaps, ratios = [], []
    for attribute, values in people.items():
        groups = {name: known & np.array([one == name for one in values]) for name in sorted({one for one in values if one})}
        groups = {name: inside for name, inside in groups.items() if inside.any()}
        rates[attribute] = {
            name: {outcome: _rate(hit[inside], weight[inside]) for outcome, hit in hits.items()}
            for name, inside in groups.items()
        }
        compared = {name: inside for name, inside in groups.items() if inside.sum() >= FEWEST}
        if len(compared) > 1:
            spoken = np.any(list(groups.values()), axis=0)
            for outcome, hit in list(hits.items())[: 1 if len(hits) == 2 else None]:
                gaps += [
                    _gap((attribute, name, outcome), hit, inside, spoken & ~inside, weight) for name, inside in compared.items()
                ]
            ratios += [
                _ratio(attribute, outcome, {name: rates[attribute][name][outcome] for name in compared}) for outcome in hits
            ]
    return OutcomeRates(rates, sorted(_corrected(gaps), key=lambda gap: -abs(gap.difference)), [one for one in ratios if one])


def _rate(hit: NDArray[np.bool_], weight: F64) -> OutcomeRate:
    total = float(weight.sum())
    if total <= 0:
        return OutcomeRate(0.0, 0.0, 0.0, 1.0)
    rate = float((hit * weight).sum()) / total
    return OutcomeRate(total, rate, *wilson(rate, effective(weight)))


def effective(weight: F64) -> float:
    """How many rows of equal weight would tell as much (Kish 1965)."""
    squares = float((weight**2).sum())
    return float(weight.sum()) ** 2 / squares if squares else 0.0


def _gap(
    names: tuple[str, str, str], hit: NDArray[np.bool_], inside: NDArray[np.bool_], others: NDArray[np.bool_], weight: F64
) -> Gap:
    one, other = _rate(hit[inside], weight[inside]), _rate(hit[others], weight[others])
    rows = effective(weight[inside]), effective(weight[others])
    pooled = (one.rate * rows[0] + other.rate * rows[1]) / max(sum(rows), 1e-9)
    error = math.sqrt(max(pooled * (1 - pooled) * sum(1 / max(count, 1e-9) for count in rows), 1e-12))
    p = math.erfc(abs(one.rate - other.rate) / error / math.sqrt(2))
    interval = newcombe(one.rate, rows[0], other.rate, rows[1])
    return Gap(*names, one.rate, other.rate, one.rate - other.rate, *interval, p)


def _ratio(attribute: str, outcome: str, rates: dict[str, OutcomeRate]) -> Ratio | None:
    lowest, highest = (min(rates, key=lambda name: (sign * rates[name].rate, name)) for sign in (1, -1))
    low, high = rates[lowest], rates[highest]
    if high.rate <= 0:
        return None
    ratio = low.rate / high.rate
    # half a row added where there is none: the interval of a rate of 0 has no log
    hits = [max(rate.rate * rate.rows, 0.5) for rate in (low, high)]
    error = math.sqrt(sum(1 / hit - 1 / max(rate.rows, hit) for hit, rate in zip(hits, (low, high), strict=True)))
    middle = math.log(hits[0] / max(low.rows, 1e-9)) - math.log(hits[1] / max(high.rows, 1e-9))
    return Ratio(attribute, outcome, lowest, highest, ratio, math.exp(middle - Z * error), math.exp(middle + Z * error))


def _corrected(gaps: Sequence[Gap]) -> list[Gap]:
    found = holm_correction([gap.p for gap in gaps])
    return [Gap(**{**asdict(gap), "p_corrected": p}) for gap, p in zip(gaps, found, strict=True)]
