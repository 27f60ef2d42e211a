"""Mitigation of outcome gaps: reweighing, resampling and counterfactual pairs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sartor.core.records import Example, Message, Part, digest
from sartor.curate.bias.group_membership import Memberships, origins_of, sexes_of
from sartor.text.demographics import group_terms
from sartor.text.demographics.group_terms import Kind

STEP = "counterfactual"
_OTHER = {"female": "male", "male": "female"}
_PRONOUN = {"female": "she", "male": "he"}
_KINDS: dict[str, Kind] = {"age": "age", "nationality": "nationality", "disability": "disability"}
ATTRIBUTES = ("sex", "name_origin", *_KINDS)


def counterfactuals(row: Example, attributes: Sequence[str]) -> Iterator[tuple[Example, str]]:
    """Yield (copy, change) for each attribute of ATTRIBUTES by which the row names a single group.

    The digest of the row chooses the new group. Nothing is yielded for a row whose grammar or sense cannot be kept
    (`text/demographics/group_terms.py`), nor for a row that names several groups.
    """
    for attribute in attributes:
        named_groups = {group for message in row.messages for group in _named(message.text, attribute)}
        other_groups = [group for group in _groups(attribute) if group not in named_groups]
        if len(named_groups) != 1 or not other_groups:
            continue
        target_group = other_groups[int(digest([row.id, attribute])[:8], 16) % len(other_groups)]
        if (changed := _changed(row, attribute, target_group)) is not None:
            yield changed, f"{attribute}: {next(iter(named_groups))} to {target_group}"


def substituted(
    rows: Sequence[Example], outcomes: Sequence[str | None], attributes: Sequence[str], seed: int = 0
) -> tuple[list[Example], int]:
    """Return the rows rewritten about the groups assigned to them, and the number of rows that failed.

    A row fails, and stays as it is for that attribute, if grammar or sense would be lost or if it names several
    groups. Within each outcome, all groups of an attribute are assigned equally often, so the outcome does not depend
    on the group. With three groups or more, one counterfactual copy of each row leaves part of a gap; this leaves
    none.
    """
    new_rows, failed_rows = list(rows), set[int]()
    for attribute in attributes:
        group_names, rng = _groups(attribute), np.random.default_rng([seed, ATTRIBUTES.index(attribute)])
        row_groups = []
        for row in rows:
            row_groups.append({group for message in row.messages for group in _named(message.text, attribute)})
        for outcome in dict.fromkeys(outcomes):
            indices = [index for index, groups in enumerate(row_groups) if groups and outcomes[index] == outcome]
            first = int(rng.integers(len(group_names)))
            for offset, index in enumerate(rng.permutation(indices).astype(int).tolist()):
                target_group = group_names[(first + offset) % len(group_names)]
                if row_groups[index] == {target_group}:
                    continue
                changed = None
                if len(row_groups[index]) == 1:
                    changed = _changed(new_rows[index], attribute, target_group)
                if changed is None:
                    failed_rows.add(index)
                else:
                    new_rows[index] = _of_parent(changed, rows[index])
    return new_rows, len(failed_rows)


def _of_parent(row: Example, parent: Example) -> Example:
    """Set the original row as the only parent.

    Intermediate rows between two attributes are in no Dataset, so no origin may name them.
    """
    origins = tuple(dataclasses.replace(origin, parents=(parent.id,)) for origin in row.origins)
    return dataclasses.replace(row, origins=origins, steps=(*parent.steps, STEP))


def _groups(attribute: str) -> tuple[str, ...]:
    if attribute == "sex":
        return tuple(_OTHER)
    if attribute == "name_origin":
        return tuple(dict.fromkeys(name.rpartition("_")[0] for name in group_terms.groups("names")))
    return group_terms.groups(_KINDS[attribute])


def _named(text: str, attribute: str) -> set[str]:
    if attribute == "sex":
        return sexes_of(text)
    if attribute == "name_origin":
        return origins_of(text)
    return {item.group for item in group_terms.mentions(text, _KINDS[attribute])}


def _changed(row: Example, attribute: str, target_group: str) -> Example | None:
    messages = _swapped(row.messages, attribute, target_group)
    rejected = _swapped(row.rejected, attribute, target_group)
    if messages is None or rejected is None or messages == row.messages:
        return None
    origins = tuple(
        dataclasses.replace(origin, parents=(row.id,), step=f"{STEP}:{attribute}") for origin in row.origins
    )
    return dataclasses.replace(row, messages=messages, rejected=rejected, origins=origins, steps=(*row.steps, STEP))


def _swapped(messages: Sequence[Message], attribute: str, target_group: str) -> tuple[Message, ...] | None:
    new_messages = []
    for message in messages:
        parts = []
        for part in message.content:
            text: str | None = part.text
            if _named(part.text, attribute) - {target_group}:
                text = _turned(part.text, attribute, target_group)
            if text is None:
                return None
            parts.append(Part("text", text) if part.kind == "text" else part)
        new_messages.append(dataclasses.replace(message, content=tuple(parts)))
    return tuple(new_messages)


def _turned(text: str, attribute: str, target_group: str) -> str | None:
    """Return the text rewritten about `target_group`; None if the rewrite would not be sound."""
    names = [item.group for item in group_terms.mentions(text, "names") if item.form == "first"]
    if attribute == "sex":
        # a swap of pronouns also swaps first names; without pronouns only the names are swapped
        if group_terms.mentions(text, "pronouns"):
            return group_terms.swap(text, "pronouns", _PRONOUN[target_group])
        origins = {name.rpartition("_")[0] for name in names}
        if len(origins) != 1:
            return None
        return group_terms.swap(text, "names", f"{origins.pop()}_{target_group}")
    if attribute == "name_origin":
        sexes = {name.rpartition("_")[2] for name in names}
        if len(sexes) != 1:
            return None
        return group_terms.swap(text, "names", f"{target_group}_{sexes.pop()}")
    return group_terms.swap(text, _KINDS[attribute], target_group)


Cell = tuple[str, str]  # group, outcome


def table(values: Sequence[str | None], outcomes: Sequence[str | None]) -> dict[Cell, list[int]]:
    """Return (group, outcome) -> indices of its rows, for rows that have both. Empty cells are included."""
    cells: dict[Cell, list[int]] = defaultdict(list)
    for index, (group, outcome) in enumerate(zip(values, outcomes, strict=True)):
        if group is not None and outcome is not None:
            cells[group, outcome].append(index)
    groups, kinds = {cell[0] for cell in cells}, {cell[1] for cell in cells}
    return {(group, outcome): cells.get((group, outcome), []) for group in sorted(groups) for outcome in sorted(kinds)}


def rows_to_drop(cells: dict[Cell, list[int]], seed: int) -> list[int]:
    """Return the fewest rows to drop so that every group gets the outcome rates of all rows together.

    The rows are drawn by seed. A group without any row of some outcome is not changed, since dropping rows cannot give
    it the rates.
    """
    # A group may keep at most s = min_o n(group, o) / r(o) rows, with r(o) the overall rate of outcome o:
    # then s * r(o) <= n(group, o) for every o.
    rates, rng = _rates(cells), np.random.default_rng(seed)
    to_drop: list[int] = []
    for group in dict.fromkeys(cell[0] for cell in cells):
        group_cells = {outcome: rows for (name, outcome), rows in cells.items() if name == group}
        if not all(group_cells.values()):
            continue
        size = min(len(rows) / rates[outcome] for outcome, rows in group_cells.items())
        for outcome, rows in group_cells.items():
            retained = set(rng.permutation(rows)[: max(1, round(size * rates[outcome]))].tolist())
            to_drop += [row for row in rows if row not in retained]
    return sorted(to_drop)


def rows_to_add(cells: dict[Cell, list[int]]) -> dict[Cell, int]:
    """Return the fewest rows to add to each cell so that every group gets the overall outcome rates."""
    # A group needs s = max_o n(group, o) / r(o) rows: then s * r(o) >= n(group, o) for every outcome o.
    rates = _rates(cells)
    to_add = {}
    for group in dict.fromkeys(cell[0] for cell in cells):
        size = max(len(rows) / rates[outcome] for (name, outcome), rows in cells.items() if name == group)
        for outcome, rate in rates.items():
            missing = math.ceil(size * rate - 1e-9) - len(cells[group, outcome])
            if missing > 0:
                to_add[group, outcome] = missing
    return to_add


def _rates(cells: dict[Cell, list[int]]) -> dict[str, float]:
    counts = Counter[str]()
    for (_, outcome), rows in cells.items():
        counts[outcome] += len(rows)
    return {outcome: count / counts.total() for outcome, count in counts.items()}


ROUNDS, CLOSE = 50, 1e-6
# (attribute, group, outcome) -> factor of a row's weight
Factors = dict[tuple[str, str, str], float]


def reweighing_factors(people: Memberships, outcomes: Sequence[str | None], weights: Sequence[float]) -> Factors:
    """Return P(group) P(outcome) / P(group, outcome) for each cell, over the rows that have both.

    With several attributes, each is made independent of the outcome in turn until all are (raking, Deming and Stephan
    1940).
    """
    factors: Factors = {}
    current_weights = [float(weight) for weight in weights]
    for _ in range(ROUNDS):
        largest_change = 0.0
        for attribute, values in people.items():
            cell_factors = _independence_factors(values, outcomes, current_weights)
            for (group, outcome), factor in cell_factors.items():
                key = attribute, group, outcome
                factors[key] = factors.get(key, 1.0) * factor
                largest_change = max(largest_change, abs(factor - 1))
            pairs = zip(current_weights, values, outcomes, strict=True)
            current_weights = [
                weight * cell_factors.get((group or "", outcome or ""), 1.0) for weight, group, outcome in pairs
            ]
        if largest_change < CLOSE:
            break
    return factors


def _independence_factors(
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
    # factor(g, o) = P(g) P(o) / P(g, o) = w(g) w(o) / (W w(g, o)), with W the total weight
    return {cell: groups[cell[0]] * kinds[cell[1]] / (total * weight) for cell, weight in cells.items() if weight > 0}


def weight_factor(factors: Factors, groups: Mapping[str, str | None], outcome: str | None) -> float:
    """Return the factor for the weight of one row. groups: attribute -> group of the row."""
    product = 1.0
    for attribute, group in groups.items():
        product *= factors.get((attribute, group or "", outcome or ""), 1.0)
    return product
