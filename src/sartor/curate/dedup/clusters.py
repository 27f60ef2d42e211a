"""Duplicate clusters, their survivors, and limits on removals.

Similarity is not transitive: in a chain a ~ b ~ c the ends may be dissimilar. Rows are therefore taken in order of
rank, and each remaining row removes the rows that are verified duplicates of *it*. No row is removed for one that it
was not compared with. The survivors are the lexicographically first maximal independent set of the graph of pairs, so
the result depends only on pairs and rank.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import GuardError
from sartor.curate.dedup.pair_scoring import EXACT, METHODS, DuplicateRules, ScoredPairs
from sartor.curate.dedup.shingles import F32, I64, U8


def components(count: int, a: I64, b: I64, labels: I64 | None = None) -> I64:
    """Return (count,) the least row of each row's connected component.

    a, b: (P,) pairs that connect rows. labels: (count,) an earlier result to extend.

    Hooking and pointer jumping (Shiloach and Vishkin 1982): the number of rounds grows with the logarithm of the
    longest chain.
    """
    labels = np.arange(count) if labels is None else labels
    if not len(a):
        return labels
    parent = labels.copy()
    while True:
        left, right = parent[a], parent[b]
        differs = left != right
        if not differs.any():
            return parent
        a, b = a[differs], b[differs]
        low, high = np.minimum(left[differs], right[differs]), np.maximum(left[differs], right[differs])
        np.minimum.at(parent, high, low)
        while True:
            grandparent = parent[parent]
            if np.array_equal(grandparent, parent):
                break
            parent = grandparent


def rank_positions(rank: NDArray[Any], labels: I64 | None = None) -> I64:
    """Return (N,) the position of each row by rank, highest first; among equals the first read comes first.

    labels: (N,) classes of rows, or None. With it, each row gets the best position of its class.
    """
    order = np.lexsort((np.arange(len(rank)), -np.asarray(rank, np.float64)))
    positions = np.empty(len(order), np.int64)
    positions[order] = np.arange(len(order))
    if labels is None:
        return positions
    best = np.full(len(positions), len(positions), np.int64)
    np.minimum.at(best, labels, positions)
    return best[labels]


@dataclass(frozen=True)
class Removals:
    """R removed rows, ascending. All arrays are (R,).

    kept_rows: the row kept in place of each of `rows`.
    score, method: similarity of the two, and the measure that gave it.
    """

    rows: I64
    kept_rows: I64
    score: F32
    method: U8

    @property
    def clusters(self) -> int:
        """Number of survivors for which a row was removed."""
        return len(np.unique(self.kept_rows))

    @property
    def largest_cluster(self) -> int:
        """Rows of the largest cluster, including its survivor; 0 without clusters."""
        return int(np.unique(self.kept_rows, return_counts=True)[1].max()) + 1 if len(self.kept_rows) else 0

    def by_method(self) -> dict[str, int]:
        """Return the number of removed rows by method."""
        return {
            name: int(count)
            for name, count in zip(METHODS, np.bincount(self.method, minlength=3), strict=True)
            if count
        }


def resolve_clusters(pairs: ScoredPairs, rank: NDArray[Any], rules: DuplicateRules) -> Removals:
    """Return the removals that the pairs require under the rules.

    rank: (N,) of two duplicates the higher is kept; among equals the first read.

    Rows of equal content act as one row, of which the best is kept. `check_removals` applies the limits.
    """
    duplicates = pairs.judged(rules.threshold, rules.contained)
    positions = rank_positions(rank)
    exact_pairs = duplicates.select(duplicates.exact)
    row_at = np.argsort(positions)
    best = row_at[rank_positions(rank, components(len(rank), exact_pairs.a, exact_pairs.b))]
    exact_rows = np.flatnonzero(best != np.arange(len(best)))
    near_pairs = duplicates.select(~duplicates.exact)
    a, b = best[near_pairs.a], best[near_pairs.b]
    removed, kept_rows, edge = _stars(a, b, positions)
    survivors = np.arange(len(rank))
    survivors[removed] = kept_rows
    scores, methods = np.ones(len(rank), np.float32), np.full(len(rank), EXACT, np.uint8)
    scores[removed] = near_pairs.score(rules.threshold)[edge]
    methods[removed] = near_pairs.method(rules.threshold)[edge]
    # rows equal to a removed row are removed for the same survivor, with the same evidence
    row_survivors = survivors[best]
    rows = np.union1d(removed, exact_rows)
    return Removals(rows, row_survivors[rows], scores[best[rows]], methods[best[rows]])


def _stars(a: I64, b: I64, positions: I64) -> tuple[I64, I64, I64]:
    """Return removed rows, the row kept for each, and the index of the deciding pair, (R,) each.

    a, b: (P,) pairs. positions: (N,) position of each row by rank.
    """
    swap = positions[a] > positions[b]
    better, worse = np.where(swap, b, a), np.where(swap, a, b)
    order = np.lexsort((positions[worse], positions[better]))
    removed: dict[int, tuple[int, int]] = {}
    for kept_row, row, edge in zip(better[order].tolist(), worse[order].tolist(), order.tolist(), strict=True):
        # pairs are in order of rank: every pair that could remove `kept_row` has been processed
        if kept_row not in removed and row not in removed and kept_row != row:
            removed[row] = (kept_row, edge)
    rows = np.fromiter(removed, np.int64, len(removed))
    ends = np.array(list(removed.values()), np.int64).reshape(-1, 2)
    return rows, ends[:, 0], ends[:, 1]


@dataclass(frozen=True)
class RemovalLimits:
    """Limits on removals, beyond which the run stops.

    source_fraction: of one source, by one cluster. A cluster that takes three quarters of a file is a template, the
    wrong field, or a source that copies another; only its owner knows which.
    fraction: of all rows. So many are removed if `text_field` names a field of few values.
    min_rows: clusters that take fewer rows of a source are never checked.
    allow: sources that may be removed wholly.
    in_recipe: the limits are options of a step, not flags; remedies are worded accordingly.
    rerun: the command that takes the limits, for remedies of `sartor rethreshold`, which takes none.
    """

    source_fraction: float = 0.75
    fraction: float = 0.9
    min_rows: int = 10
    allow: Collection[str] = ()
    in_recipe: bool = False
    rerun: str = ""

    def option(self, name: str, value: str = "") -> str:
        """Return an option as the user would write it."""
        if not self.in_recipe:
            return f"--{name} {shlex.quote(value)}" if value else f"--{name}"
        key = name.replace("-", "_")
        return f"`{key}: [{value}]` of the step" if value else f"{key} of the step"

    def remedy(self, change: str) -> str:
        """Return what to do about removals beyond the limits. change: of the options, for rows that are duplicates."""
        other = "a higher --threshold" if self.rerun else "another text field or a higher threshold"
        change = f"{self.rerun} with {change}" if self.rerun else change
        return f"look at the two rows: if they are no duplicates, {other}; if they are, {change}"


def check_removals(
    removals: Removals,
    sources: NDArray[np.integer[Any]],
    names: Sequence[str],
    limits: RemovalLimits,
    describe: Callable[[int], str] = str,
) -> None:
    """Raise GuardError if removals exceed the limits.

    sources: (N,) source number of each row. names: name of each source.
    describe: returns a readable label for a row number.
    """
    if len(removals.rows) < limits.min_rows:
        return
    sizes = np.bincount(sources, minlength=len(names))
    keys, first, counts = np.unique(
        sources[removals.rows].astype(np.int64) * (len(sources) + 1) + removals.kept_rows,
        return_index=True,
        return_counts=True,
    )
    source = keys // (len(sources) + 1)
    allowed = np.isin(source, [index for index, name in enumerate(names) if name in limits.allow])
    exceeds = (counts > limits.source_fraction * sizes[source]) & (counts >= limits.min_rows) & ~allowed
    if exceeds.any():
        worst = int(np.flatnonzero(exceeds)[np.argmax(counts[exceeds])])
        name = names[source[worst]]
        raise GuardError(
            f"one cluster would remove {counts[worst]:,} of the {sizes[source[worst]]:,} rows of {name}; more than "
            f"the fraction {limits.source_fraction:g} may not go without asking; "
            f"{_example(removals, int(first[worst]), describe)}",
            limits.remedy(f"{limits.option('allow', name)} or a higher {limits.option('max-source-fraction')}"),
        )
    is_exempt = np.isin(sources[removals.rows], [index for index, name in enumerate(names) if name in limits.allow])
    removed_count = int((~is_exempt).sum())
    if removed_count > limits.fraction * len(sources):
        raise GuardError(
            f"{removed_count:,} of {len(sources):,} rows would be removed; more than the fraction {limits.fraction:g} "
            "may not go without asking; "
            f"{_example(removals, int(np.flatnonzero(~is_exempt)[0]), describe)}",
            limits.remedy(f"a higher {limits.option('max-fraction')}"),
        )


def _example(removals: Removals, index: int, describe: Callable[[int], str]) -> str:
    method, score = METHODS[removals.method[index]], removals.score[index]
    removed_label, kept_label = describe(int(removals.rows[index])), describe(int(removals.kept_rows[index]))
    return f"for instance row {removed_label} for row {kept_label} ({method}, {score:.2f})"
