"""Duplicate clusters, survivors and removal guards.

Pairs are similar, and similarity is not transitive: of a chain a ~ b ~ c the ends may be unlike. So rows are taken in the
order of their rank, and one that is still there takes away those that are verified to be like *it*. Nobody goes for a row
that it was not held against. The survivors are the lexicographically first maximal independent set of the graph of pairs, so
the result depends on nothing but pairs and rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import GuardError
from sartor.curate.dedup.pair_scoring import EXACT, METHODS, DuplicateRules, ScoredPairs
from sartor.curate.dedup.shingles import F32, I64, U8


def components(count: int, a: I64, b: I64, labels: I64 | None = None) -> I64:
    """(count,) the least row of each row's component, joining `labels` (an earlier result) by the pairs (a, b).

    Hooking and pointer jumping (Shiloach and Vishkin 1982): rounds grow with the logarithm of the longest chain.
    """
    labels = np.arange(count) if labels is None else labels
    if not len(a):
        return labels
    parent = labels.copy()
    while True:
        left, right = parent[a], parent[b]
        apart = left != right
        if not apart.any():
            return parent
        a, b = a[apart], b[apart]
        low, high = np.minimum(left[apart], right[apart]), np.maximum(left[apart], right[apart])
        np.minimum.at(parent, high, low)
        while True:
            up = parent[parent]
            if np.array_equal(up, parent):
                break
            parent = up


def rank_positions(rank: NDArray[Any], labels: I64 | None = None) -> I64:
    """(N,) the place of each row by rank, the highest first, of equals the first read; with `labels`, the best of its class."""
    order = np.lexsort((np.arange(len(rank)), -np.asarray(rank, np.float64)))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    if labels is None:
        return place
    best = np.full(len(place), len(place), np.int64)
    np.minimum.at(best, labels, place)
    return best[labels]


@dataclass(frozen=True)
class Removals:
    """R removed rows, ascending: (R,) each. `kept` is the row that stays for one of `rows`, `score` and `method` of the two."""

    rows: I64
    kept: I64
    score: F32
    method: U8

    @property
    def clusters(self) -> int:
        """Survivors that took somebody's place."""
        return len(np.unique(self.kept))

    @property
    def largest_cluster(self) -> int:
        """Rows of the largest cluster, its survivor among them; 0 without clusters."""
        return int(np.unique(self.kept, return_counts=True)[1].max()) + 1 if len(self.kept) else 0

    def by_method(self) -> dict[str, int]:
        """How many rows went by which measure."""
        return {name: int(count) for name, count in zip(METHODS, np.bincount(self.method, minlength=3), strict=True) if count}


def resolve_clusters(pairs: ScoredPairs, rank: NDArray[Any], rules: DuplicateRules) -> Removals:
    """The removals that pairs ask for under the rules. `rank` (N,): of two alike the higher stays, of equals the first read.

    Rows of equal content are one row whose best stays. Raises nothing; see `guard`.
    """
    judged = pairs.judged(rules.threshold, rules.contained)
    place = rank_positions(rank)
    twins = judged.where(judged.exact)
    row_at = np.argsort(place)
    best = row_at[rank_positions(rank, components(len(rank), twins.a, twins.b))]
    exact_rows = np.flatnonzero(best != np.arange(len(best)))
    near = judged.where(~judged.exact)
    a, b = best[near.a], best[near.b]
    removed, kept, edge = _stars(a, b, place)
    fate = np.arange(len(rank))
    fate[removed] = kept
    scores, methods = np.ones(len(rank), np.float32), np.full(len(rank), EXACT, np.uint8)
    scores[removed] = near.score(rules.threshold)[edge]
    methods[removed] = near.method(rules.threshold)[edge]
    # twins of a removed row go for the same survivor, by the same evidence
    kept_for = fate[best]
    rows = np.union1d(removed, exact_rows)
    return Removals(rows, kept_for[rows], scores[best[rows]], methods[best[rows]])


def _stars(a: I64, b: I64, place: I64) -> tuple[I64, I64, I64]:
    """Removed rows, the row that each is removed for, and the pair that says so."""
    swap = place[a] > place[b]
    better, worse = np.where(swap, b, a), np.where(swap, a, b)
    order = np.lexsort((place[worse], place[better]))
    gone: dict[int, tuple[int, int]] = {}
    for keep, go, edge in zip(better[order].tolist(), worse[order].tolist(), order.tolist(), strict=True):
        # by the order of the pairs, whatever could remove `keep` has been seen
        if keep not in gone and go not in gone and keep != go:
            gone[go] = (keep, edge)
    rows = np.fromiter(gone, np.int64, len(gone))
    ends = np.array(list(gone.values()), np.int64).reshape(-1, 2)
    return rows, ends[:, 0], ends[:, 1]


@dataclass(frozen=True)
class RemovalLimits:
    """What may be removed without asking.

    `source_fraction`: of one source, by one cluster; a cluster that takes three quarters of a file is a template, the wrong
    field, or a source that is another's copy, and only its owner knows which. `fraction`: of all rows; so much goes when
    `text_field` names a field of few values. Clusters that take fewer than `least` rows of a source are never asked about.
    `allow`: sources that may go wholly. `in_recipe`: the limits are a step's options, not flags; the remedies say them so.
    """

    source_fraction: float = 0.75
    fraction: float = 0.9
    least: int = 10
    allow: Collection[str] = ()
    in_recipe: bool = False

    def option(self, name: str, value: str = "") -> str:
        """An option as the person who waits would write it."""
        if self.in_recipe:
            return f"`{name.replace('-', '_')}: [{value}]` of the step" if value else f"{name.replace('-', '_')} of the step"
        return f"--{name} {value}".rstrip()


def check_removals(
    removals: Removals,
    sources: NDArray[np.integer[Any]],
    names: Sequence[str],
    limits: RemovalLimits,
    say: Callable[[int], str] = str,
) -> None:
    """Raise GuardError where removals go beyond the limits.

    `sources` (N,) numbers the source of each row, `names` says them; `say` tells a person which row a number is.
    """
    if len(removals.rows) < limits.least:
        return
    sizes = np.bincount(sources, minlength=len(names))
    keys, first, counts = np.unique(
        sources[removals.rows].astype(np.int64) * (len(sources) + 1) + removals.kept, return_index=True, return_counts=True
    )
    source = keys // (len(sources) + 1)
    allowed = np.isin(source, [place for place, name in enumerate(names) if name in limits.allow])
    over = (counts > limits.source_fraction * sizes[source]) & (counts >= limits.least) & ~allowed
    if over.any():
        worst = int(np.flatnonzero(over)[np.argmax(counts[over])])
        name = names[source[worst]]
        raise GuardError(
            f"one cluster would remove {counts[worst]:,} of the {sizes[source[worst]]:,} rows of {name}; more than "
            f"the fraction {limits.source_fraction:g} may not go without asking; {_example(removals, int(first[worst]), say)}",
            "look at the two rows: if they are no duplicates, another text field or a higher threshold; if they are, "
            f"{limits.option('allow', name)} or a higher {limits.option('max-source-fraction')}",
        )
    free = np.isin(sources[removals.rows], [place for place, name in enumerate(names) if name in limits.allow])
    gone = int((~free).sum())
    if gone > limits.fraction * len(sources):
        raise GuardError(
            f"{gone:,} of {len(sources):,} rows would be removed; more than the fraction {limits.fraction:g} "
            "may not go without asking; "
            f"{_example(removals, int(np.flatnonzero(~free)[0]), say)}",
            "look at the two rows: if they are no duplicates, another text field or a higher threshold; if they are, a higher "
            f"{limits.option('max-fraction')}",
        )


def _example(removals: Removals, place: int, say: Callable[[int], str]) -> str:
    method, score = METHODS[removals.method[place]], removals.score[place]
    gone, kept = say(int(removals.rows[place])), say(int(removals.kept[place]))
    return f"for instance row {gone} for row {kept} ({method}, {score:.2f})"
