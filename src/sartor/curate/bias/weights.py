"""Weights that make group and outcome independent (reweighing: Kamiran and Calders 2012)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from sartor.curate.bias.membership import Memberships

ROUNDS, CLOSE = 50, 1e-6
# (attribute, group, outcome) -> what a row's weight is multiplied by
Factors = dict[tuple[str, str, str], float]


def factors(people: Memberships, outcomes: Sequence[str | None], weights: Sequence[float]) -> Factors:
    """P(group) P(outcome) / P(group, outcome) of each cell, over the rows that have both.

    Of several attributes each is made independent in turn until all are (raking, Deming and Stephan 1940).
    """
    found: Factors = {}
    now = [float(weight) for weight in weights]
    for _ in range(ROUNDS):
        moved = 0.0
        for attribute, values in people.items():
            step = _of_one(values, outcomes, now)
            for (group, outcome), factor in step.items():
                key = attribute, group, outcome
                found[key] = found.get(key, 1.0) * factor
                moved = max(moved, abs(factor - 1))
            pairs = zip(now, values, outcomes, strict=True)
            now = [weight * step.get((group or "", outcome or ""), 1.0) for weight, group, outcome in pairs]
        if moved < CLOSE:
            break
    return found


def _of_one(
    values: Sequence[str | None], outcomes: Sequence[str | None], weights: Sequence[float]
) -> dict[tuple[str, str], float]:
    cells: dict[tuple[str, str], float] = defaultdict(float)
    for group, outcome, weight in zip(values, outcomes, weights, strict=True):
        if group is not None and outcome is not None:
            cells[group, outcome] += weight
    groups, kinds = Counter[str](), Counter[str]()
    for (group, outcome), weight in cells.items():
        groups[group] += weight  # type: ignore[assignment]
        kinds[outcome] += weight  # type: ignore[assignment]
    total = sum(cells.values())
    return {cell: groups[cell[0]] * kinds[cell[1]] / (total * weight) for cell, weight in cells.items() if weight > 0}


def weight_of(found: Factors, said: Mapping[str, str | None], outcome: str | None) -> float:
    """What the weight of a row is multiplied by. said: attribute -> its group."""
    product = 1.0
    for attribute, group in said.items():
        product *= found.get((attribute, group or "", outcome or ""), 1.0)
    return product
