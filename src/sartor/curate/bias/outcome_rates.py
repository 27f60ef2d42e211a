"""Outcome rates by group, with intervals and tests."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.statistics import Z, holm_correction, newcombe, wilson
from sartor.curate.bias.group_membership import Memberships

F64 = NDArray[np.float64]
FEWEST = 5  # rows with an outcome that a group needs to be compared
MOST_OUTCOMES = 12
FOUR_FIFTHS = 0.8  # EEOC Uniform Guidelines, 29 CFR 1607.4 D
ALPHA, NOTABLE_GAP = 0.05, 0.05


@dataclass(frozen=True)
class OutcomeRate:
    """Outcome rate of a group.

    rows: total weight of the group's rows.
    rate: weighted fraction with the outcome, 0..1.
    low, high: Wilson's 95 % interval (1927).
    """

    rows: float
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Gap:
    """Difference between a group's outcome rate and the rate of the other groups of its attribute.

    low, high: Newcombe's 95 % interval (1998, method 10).
    p: two-sided test of two pooled proportions, on the effective number of rows.
    p_corrected: Holm-corrected over all gaps of a report.
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
        """Whether the gap is significant and larger than NOTABLE_GAP."""
        return self.p_corrected <= ALPHA and abs(self.difference) > NOTABLE_GAP


@dataclass(frozen=True)
class Ratio:
    """Rate of the lowest group over that of the highest, with a 95 % interval (Katz et al. 1978).

    Below 0.8 it fails the four-fifths rule.
    """

    attribute: str
    outcome: str
    lowest: str
    highest: str
    ratio: float
    low: float
    high: float

    @property
    def passes_four_fifths(self) -> bool:
        """Whether the ratio satisfies the four-fifths rule of thumb of the US employment agencies."""
        return self.ratio >= FOUR_FIFTHS


@dataclass(frozen=True)
class OutcomeRates:
    """Outcome rates of a set of rows.

    rates: attribute -> group -> outcome -> rate.
    gaps: largest first.
    ratios: one for each attribute and outcome that can be compared.
    """

    rates: dict[str, dict[str, dict[str, OutcomeRate]]]
    gaps: list[Gap]
    ratios: list[Ratio]

    @property
    def largest_gap(self) -> float:
        """Largest absolute gap, 0..1; 0 if nothing could be compared."""
        return max((abs(gap.difference) for gap in self.gaps), default=0.0)

    @property
    def notable(self) -> list[Gap]:
        """Significant gaps larger than NOTABLE_GAP."""
        return [gap for gap in self.gaps if gap.is_notable]

    def as_json(self) -> dict[str, Any]:
        """Return the fields for a command's JSON and a manifest."""
        rates: dict[str, dict[str, dict[str, Any]]] = {}
        for attribute, groups in self.rates.items():
            rates[attribute] = {}
            for group, outcomes in groups.items():
                rates[attribute][group] = {outcome: asdict(rate) for outcome, rate in outcomes.items()}
        return {
            "largest_gap": self.largest_gap,
            "notable": len(self.notable),
            "rates": rates,
            "gaps": [{**asdict(gap), "notable": gap.is_notable} for gap in self.gaps],
            "selection_ratios": [{**asdict(ratio), "four_fifths": ratio.passes_four_fifths} for ratio in self.ratios],
        }


def measure_rates(
    people: Memberships, outcomes: Sequence[str | None], weights: Sequence[float] | None = None
) -> OutcomeRates:
    """Return the outcome rates of N rows by group.

    Rows without an outcome, or without a group of an attribute, are not counted there.
    weights: (N,) weights of the rows, or None. Rates, gaps and ratios use Kish's effective number of rows, so weights
    widen their intervals.
    """
    weight = np.ones(len(outcomes)) if weights is None else np.asarray(weights, float)
    outcome_counts = Counter(outcome for outcome in outcomes if outcome is not None)
    hits = {
        name: np.array([outcome == name for outcome in outcomes])
        for name, _ in outcome_counts.most_common(MOST_OUTCOMES)
    }
    has_outcome = np.array([outcome is not None for outcome in outcomes])
    rates: dict[str, dict[str, dict[str, OutcomeRate]]] = {}
    gaps: list[Gap] = []
    ratios: list[Ratio] = []
    for attribute, values in people.items():
        groups: dict[str, NDArray[np.bool_]] = {}
        for name in sorted({value for value in values if value}):
            members = has_outcome & np.array([value == name for value in values])
            if members.any():
                groups[name] = members
        rates[attribute] = {}
        for name, members in groups.items():
            rates[attribute][name] = {outcome: _rate(hit[members], weight[members]) for outcome, hit in hits.items()}
        compared = {name: members for name, members in groups.items() if members.sum() >= FEWEST}
        if len(compared) < 2:
            continue
        has_group = np.any(list(groups.values()), axis=0)
        # of two outcomes only one is compared: the gaps of the other are the same with opposite sign
        for outcome in list(hits)[: 1 if len(hits) == 2 else None]:
            for name, members in compared.items():
                names = attribute, name, outcome
                gaps.append(_gap(names, hits[outcome], members=members, others=has_group & ~members, weight=weight))
        sizes = {name: effective(weight[members]) for name, members in compared.items()}
        for outcome in hits:
            ratio = _ratio(attribute, outcome, {name: rates[attribute][name][outcome] for name in compared}, sizes)
            if ratio is not None:
                ratios.append(ratio)
    p_values = holm_correction([gap.p for gap in gaps])
    gaps = [replace(gap, p_corrected=p) for gap, p in zip(gaps, p_values, strict=True)]
    return OutcomeRates(rates, sorted(gaps, key=lambda gap: -abs(gap.difference)), ratios)


def _rate(hit: NDArray[np.bool_], weight: F64) -> OutcomeRate:
    total = float(weight.sum())
    if total <= 0:
        return OutcomeRate(0.0, 0.0, 0.0, 1.0)
    rate = float((hit * weight).sum()) / total
    return OutcomeRate(total, rate, *wilson(rate, effective(weight)))


def effective(weight: F64) -> float:
    """Return the effective number of rows for weights (N,): (sum w)^2 / sum w^2 (Kish 1965)."""
    squares = float((weight**2).sum())
    return float(weight.sum()) ** 2 / squares if squares else 0.0


def _gap(
    names: tuple[str, str, str],
    hit: NDArray[np.bool_],
    members: NDArray[np.bool_],
    others: NDArray[np.bool_],
    weight: F64,
) -> Gap:
    rate, others_rate = _rate(hit[members], weight[members]), _rate(hit[others], weight[others])
    sizes = effective(weight[members]), effective(weight[others])
    # z = |r_1 - r_2| / sqrt( r (1 - r) (1 / n_1 + 1 / n_2) ), with r the pooled rate and n the effective sizes;
    # p = 2 (1 - Phi(z)) = erfc(z / sqrt 2)
    pooled = (rate.rate * sizes[0] + others_rate.rate * sizes[1]) / max(sum(sizes), 1e-9)
    error = math.sqrt(max(pooled * (1 - pooled) * sum(1 / max(count, 1e-9) for count in sizes), 1e-12))
    p = math.erfc(abs(rate.rate - others_rate.rate) / error / math.sqrt(2))
    interval = newcombe(rate.rate, sizes[0], others_rate.rate, sizes[1])
    return Gap(*names, rate.rate, others_rate.rate, rate.rate - others_rate.rate, *interval, p)


def _ratio(attribute: str, outcome: str, rates: dict[str, OutcomeRate], sizes: dict[str, float]) -> Ratio | None:
    """Return the lowest rate over the highest; None where both are 0. sizes: effective rows of each group."""
    lowest = min(rates, key=lambda name: (rates[name].rate, name))
    highest = min(rates, key=lambda name: (-rates[name].rate, name))
    low, high = rates[lowest], rates[highest]
    if high.rate <= 0:
        return None
    ratio = low.rate / high.rate
    # log RR = log(x_1 / n_1) - log(x_2 / n_2), with standard error sqrt(1/x_1 - 1/n_1 + 1/x_2 - 1/n_2) (Katz et al.).
    # A count x of 0 becomes half a row, since a rate of 0 has no logarithm.
    counts = [sizes[lowest], sizes[highest]]
    hits = [max(rate.rate * count, 0.5) for rate, count in zip((low, high), counts, strict=True)]
    error = math.sqrt(sum(1 / hit - 1 / max(count, hit) for hit, count in zip(hits, counts, strict=True)))
    middle = math.log(hits[0] / max(counts[0], 1e-9)) - math.log(hits[1] / max(counts[1], 1e-9))
    return Ratio(
        attribute,
        outcome,
        lowest=lowest,
        highest=highest,
        ratio=ratio,
        low=math.exp(middle - Z * error),
        high=math.exp(middle + Z * error),
    )
