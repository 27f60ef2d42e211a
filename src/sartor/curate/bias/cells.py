"""Group by outcome as a table of rows: which to drop, or how many to make, until every group has the same outcome rates."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

Cell = tuple[str, str]  # group, outcome


def table(values: Sequence[str | None], outcomes: Sequence[str | None]) -> dict[Cell, list[int]]:
    """(group, outcome) -> its rows, of the rows that have both; a cell without rows is there too."""
    found: dict[Cell, list[int]] = defaultdict(list)
    for place, (group, outcome) in enumerate(zip(values, outcomes, strict=True)):
        if group is not None and outcome is not None:
            found[group, outcome].append(place)
    groups, kinds = {cell[0] for cell in found}, {cell[1] for cell in found}
    return {(group, outcome): found.get((group, outcome), []) for group in sorted(groups) for outcome in sorted(kinds)}


def superfluous(cells: dict[Cell, list[int]], seed: int) -> list[int]:
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


def needed(cells: dict[Cell, list[int]]) -> dict[Cell, int]:
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
