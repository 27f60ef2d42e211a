"""Reweighing, resampling and counterfactual pairs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sartor.core.records import Example, Message, Origin, Part, digest
from sartor.curate.bias.group_membership import Memberships, origins_of, sexes_of
from sartor.text.demographics import group_terms
from sartor.text.demographics.group_terms import Kind

STEP = "counterfactual"
_OTHER = {"female": "male", "male": "female"}
_PRONOUN = {"female": "she", "male": "he"}
_KINDS: dict[str, Kind] = {"age": "age", "nationality": "nationality", "disability": "disability"}
ATTRIBUTES = ("sex", "name_origin", *_KINDS)


def counterfactuals(row: Example, attributes: Sequence[str]) -> Iterator[tuple[Example, str]]:
    """(copy, what was changed) of a row for each attribute of ATTRIBUTES by which it names somebody.

    Which other group it is then about is drawn by the row's digest. Nothing comes of a row in which grammar or sense cannot be
    kept (`text/demographics/group_terms.py`), nor of one that speaks of people of several groups.
    """
    for attribute in attributes:
        there = {one for message in row.messages for one in _named(message.text, attribute)}
        others = [group for group in _groups(attribute) if group not in there]
        if len(there) != 1 or not others:
            continue
        to = others[int(digest([row.id, attribute])[:8], 16) % len(others)]
        if (changed := _changed(row, attribute, to)) is not None:
            yield changed, f"{attribute}: {next(iter(there))} to {to}"


def substituted(
    rows: Sequence[Example], outcomes: Sequence[str | None], attributes: Sequence[str], seed: int = 0
) -> tuple[list[Example], int]:
    """(each row about somebody of the group that is dealt to it, of ATTRIBUTES by which it names somebody; how many rows could
    not be so, since grammar or sense would be lost or the row speaks of several groups, and stay as they are).

    The rows of one outcome are dealt all groups of an attribute equally often, so that the outcome says nothing of the group.
    Where a copy of each row about one other group leaves a part of a gap between three groups or more, this leaves none.
    """
    new, stuck = list(rows), set[int]()
    for attribute in attributes:
        known, rng = _groups(attribute), np.random.default_rng([seed, ATTRIBUTES.index(attribute)])
        named = [{one for message in row.messages for one in _named(message.text, attribute)} for row in rows]
        for outcome in dict.fromkeys(outcomes):
            places = [place for place, there in enumerate(named) if there and outcomes[place] == outcome]
            first = int(rng.integers(len(known)))
            for turn, place in enumerate(rng.permutation(places).astype(int).tolist()):
                to = known[(first + turn) % len(known)]
                if named[place] == {to}:
                    continue
                changed = _changed(new[place], attribute, to) if len(named[place]) == 1 else None
                new[place] = _of_parent(changed, rows[place]) if changed else new[place]
                stuck |= {place} if changed is None else set()
    return new, len(stuck)


def _of_parent(row: Example, parent: Example) -> Example:
    """Made of the parent, whatever it was between one attribute and the next: that stands in no Dataset."""
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
    return {one.group for one in group_terms.mentions(text, _KINDS[attribute])}


def _changed(row: Example, attribute: str, to: str) -> Example | None:
    messages, rejected = _swapped(row.messages, attribute, to), _swapped(row.rejected, attribute, to)
    if messages is None or rejected is None or messages == row.messages:
        return None
    origins = tuple(dataclasses.replace(origin, parents=(row.id,), step=f"{STEP}:{attribute}") for origin in row.origins)
    return dataclasses.replace(row, messages=messages, rejected=rejected, origins=origins, steps=(*row.steps, STEP))


def _swapped(messages: Sequence[Message], attribute: str, to: str) -> tuple[Message, ...] | None:
    found = []
    for message in messages:
        parts = []
        for part in message.content:
            text = _turned(part.text, attribute, to) if _named(part.text, attribute) - {to} else part.text
            if text is None:
                return None
            parts.append(Part("text", text) if part.kind == "text" else part)
        found.append(dataclasses.replace(message, content=tuple(parts)))
    return tuple(found)


def _turned(text: str, attribute: str, to: str) -> str | None:
    """The text about somebody of the group `to`; None where that cannot be said well."""
    names = [one.group for one in group_terms.mentions(text, "names") if one.form == "first"]
    if attribute == "sex":
        # pronouns take the first names along; a text of names alone has only those to turn
        if group_terms.mentions(text, "pronouns"):
            return group_terms.swap(text, "pronouns", _PRONOUN[to])
        origins = {name.rpartition("_")[0] for name in names}
        return group_terms.swap(text, "names", f"{origins.pop()}_{to}") if len(origins) == 1 else None
    if attribute == "name_origin":
        sexes = {name.rpartition("_")[2] for name in names}
        return group_terms.swap(text, "names", f"{to}_{sexes.pop()}") if len(sexes) == 1 else None
    return group_terms.swap(text, _KINDS[attribute], to)


def is_counterfactual(origin: Origin) -> bool:
    """Whether a row with that origin is such a copy."""
    return origin.step.startswith(STEP)


Cell = tuple[str, str]  # group, outcome


def table(values: Sequence[str | None], outcomes: Sequence[str | None]) -> dict[Cell, list[int]]:
    """(group, outcome) -> its rows, of the rows that have both; a cell without rows is there too."""
    found: dict[Cell, list[int]] = defaultdict(list)
    for place, (group, outcome) in enumerate(zip(values, outcomes, strict=True)):
        if group is not None and outcome is not None:
            found[group, outcome].append(place)
    groups, kinds = {cell[0] for cell in found}, {cell[1] for cell in found}
    return {(group, outcome): found.get((group, outcome), []) for group in sorted(groups) for outcome in sorted(kinds)}


def rows_to_drop(cells: dict[Cell, list[int]], seed: int) -> list[int]:
    """The fewest rows, drawn by seed, without which every group has the outcome rates of all rows together.

    A group without any row of an outcome goes as a whole but for nothing: no rows could be dropped to mend that, so it stays.
    """
    rates, rng, gone = _rates(cells), np.random.default_rng(seed), []
    for group in dict.fromkeys(cell[0] for cell in cells):
        own = {outcome: rows for (name, outcome), rows in cells.items() if name == group}
        if not all(own.values()):
            continue
        size = min(len(rows) / rates[outcome] for outcome, rows in own.items())
        for outcome, rows in own.items():
            stay = set(rng.permutation(rows)[: max(1, round(size * rates[outcome]))].tolist())
            gone += [row for row in rows if row not in stay]
    return sorted(gone)


def rows_to_add(cells: dict[Cell, list[int]]) -> dict[Cell, int]:
    """The fewest rows to add to each cell so that every group has the outcome rates of all rows together."""
    rates = _rates(cells)
    found = {}
    for group in dict.fromkeys(cell[0] for cell in cells):
        size = max(len(rows) / rates[outcome] for (name, outcome), rows in cells.items() if name == group)
        for outcome, rate in rates.items():
            if (more := math.ceil(size * rate - 1e-9) - len(cells[group, outcome])) > 0:
                found[group, outcome] = more
    return found


def _rates(cells: dict[Cell, list[int]]) -> dict[str, float]:
    counts = Counter[str]()
    for (_, outcome), rows in cells.items():
        counts[outcome] += len(rows)
    return {outcome: count / counts.total() for outcome, count in counts.items()}


ROUNDS, CLOSE = 50, 1e-6
# (attribute, group, outcome) -> what a row's weight is multiplied by
Factors = dict[tuple[str, str, str], float]


def reweighing_factors(people: Memberships, outcomes: Sequence[str | None], weights: Sequence[float]) -> Factors:
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
