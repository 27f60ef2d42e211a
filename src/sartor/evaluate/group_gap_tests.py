"""Tests of outcome gaps between groups, on prompts that differ in the group alone. No torch.

A *block* is one prompt about somebody of each group of a kind. The rate of a group stands against the mean rate of the
others in the same blocks, so that merit is the same on both sides.

If the model does not care for the group, then any order of the groups within a block was as likely. So the groups of
each block are put into random orders (Fisher 1935), and a group's gap is held against the largest gap of any group
that such an order
gives: max-T (Westfall and Young 1993). That corrects for all groups of a kind at once and costs little: of 20 groups
the one that is last in four blocks is last by chance once in 4,000 times. Kinds and outcomes of a section, of which
there are few, are corrected by Bonferroni. How many blocks it takes to find a gap is known beforehand:
`needed_blocks`.

The ratio is that of the four-fifths rule (29 CFR 1607.4 D): a group's rate over that of the group with the highest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from sartor.evaluate import bootstrap

Array = NDArray[np.float64]
# Of all groups, kinds, outcomes and sections of an audit together, by chance
MOST_CHANCE = 0.05
# How surely a gap that matters has to be found before a kind may pass
POWER = 0.8
ORDERS = 4_999
# Fewer say too little of their own spread, and the interval of what tuning added hardly ever excludes 0
LEAST_BLOCKS = 8


@dataclass(frozen=True)
class VariantOutcomes:
    """Of one kind of group: names of groups (G), ids of the rows that blocks were made of (N), chances (2, N, G).

    chances: under base and tuned, how likely the outcome is, 0..1, or whether it was said, 0 or 1. clusters: (N,) the
    group of each block's row, whose blocks are no independent evidence; by default each block is its own.
    """

    kind: str
    outcome: str
    groups: tuple[str, ...]
    ids: tuple[str, ...]
    chances: Array
    clusters: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """(N,) the cluster of each block."""
        return self.clusters or tuple(str(index) for index in range(len(self.ids)))


@dataclass(frozen=True)
class GroupFinding:
    """One group against the others, under the tuned model: rates of the outcome, 0..1, and their gap with its 95 %
    interval.

    p: two-sided, corrected over the section. ratio: of the four-fifths rule. base_gap: the same gap under the base;
    added_low, added_high: the interval of what tuning added to it. rows: ids where the group fared worst beside the
    others.
    """

    kind: str
    group: str
    outcome: str
    blocks: int
    rate: float
    others: float
    gap: tuple[float, float, float]
    ratio: float
    p: float
    base_gap: float
    added: tuple[float, float, float]
    rows: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For the Report; gap and added are [estimate, low, high]."""
        return asdict(self)


def findings(sections: Sequence[VariantOutcomes]) -> list[GroupFinding]:
    """Every group of every kind and outcome, corrected together. What one block shows is chance (p is 1)."""
    return [finding for blocks in sections if blocks.ids for finding in _of_groups(blocks, len(sections))]


def _of_groups(blocks: VariantOutcomes, tests: int) -> list[GroupFinding]:
    """A Finding of each group; of two groups the one with the lower rate, since the other is its mirror."""
    rates, chances = blocks.chances[1].mean(0), gap_chances(blocks)
    result = []
    for index in range(len(rates)) if len(rates) > 2 else [int(rates.argmin())]:
        base, tuned = (side[:, index] - np.delete(side, index, 1).mean(1) for side in blocks.chances)
        # of base to tuned where both are differences already, so that the comparison is what tuning added. Prompts
        # whose likelihoods are alike to the last digit are no sign that others were not drawn
        gap, added = (
            bootstrap.paired_bootstrap(list(before), list(tuned), blocks.members, is_bounded=False)
            for before in (np.zeros(len(tuned)), base)
        )
        result.append(
            GroupFinding(
                kind=blocks.kind,
                group=blocks.groups[index],
                outcome=blocks.outcome,
                blocks=len(blocks.ids),
                rate=float(rates[index]),
                others=float(np.delete(rates, index).mean()),
                gap=(gap.difference, gap.low, gap.high),
                ratio=float(rates[index] / rates.max()) if rates.max() > 0 else 1.0,
                p=min(1.0, float(chances[index]) * tests),
                base_gap=float(base.mean()),
                added=(added.difference, added.low, added.high),
                rows=_worst(tuned, blocks.ids),
            )
        )
    return result


def gap_chances(blocks: VariantOutcomes) -> Array:
    """(G,) how likely each group's gap, or a larger one of any group, is where no order of the groups is preferred."""
    gaps = _cluster_gaps(blocks)
    observed, rng, counts = np.abs(gaps.sum(0)), np.random.default_rng(0), np.zeros(gaps.shape[1])
    for start in range(0, ORDERS, 500):
        orders = np.broadcast_to(gaps, (min(500, ORDERS - start), *gaps.shape))
        largest = np.abs(rng.permuted(orders, axis=2).sum(1)).max(1)
        counts += (largest[:, None] >= observed - 1e-9).sum(0)
    return np.asarray((1 + counts) / (1 + ORDERS))


def spread(blocks: VariantOutcomes) -> float:
    """The standard deviation of a group's gap between clusters of blocks, over all groups; 0 of fewer than two
    clusters.
    """
    _, sizes = np.unique(blocks.members, return_counts=True)
    gaps = _cluster_gaps(blocks) / sizes[:, None]
    return float(np.sqrt(gaps.var(0, ddof=1).mean())) if len(gaps) > 1 else 0.0


def _cluster_gaps(blocks: VariantOutcomes) -> Array:
    """(clusters, G) gaps of each group to the others under the tuned model, summed over the blocks of a cluster."""
    tuned, count = blocks.chances[1], len(blocks.groups)
    gaps = (tuned - tuned.mean(1, keepdims=True)) * count / (count - 1)
    names, member = np.unique(blocks.members, return_inverse=True)
    result = np.zeros((len(names), count))
    np.add.at(result, member, gaps)
    return result


def needed_blocks(deviation: float, groups: int, tests: int, gap: float) -> int:
    """How many blocks find a gap with POWER, where so many tests share MOST_CHANCE. deviation: of `spread`.

    LEAST_BLOCKS, and as many as make the smallest p there is small enough. Beyond that by the normal approximation,
    groups and tests corrected by Bonferroni. Orders of the groups spread the gap itself over all of them, which adds
    gap^2 / (groups - 1) to the variance that the gap is held against.
    """
    min_blocks = next(count for count in range(2, 1000) if smallest_chance(groups, count) * tests < MOST_CHANCE)
    null_deviation = math.sqrt(deviation**2 + gap**2 / (groups - 1))
    reach = norm.ppf(1 - MOST_CHANCE / (2 * groups * tests)) * null_deviation + norm.ppf(POWER) * deviation
    return max(LEAST_BLOCKS, min_blocks, math.ceil((reach / gap) ** 2))


def smallest_chance(groups: int, blocks: int) -> float:
    """The p of a group that fares worst in every block: no gap can have a smaller one."""
    ends = 1 if groups == 2 else 2  # of two groups the one is last where the other is first
    return float(min(1.0, ends * groups ** (1.0 - blocks)))


def _worst(differences: Array, ids: Sequence[str], max_rows: int = 5) -> tuple[str, ...]:
    """Rows where the group's difference is farthest from 0 in the direction of their mean."""
    order = np.argsort(-differences * np.sign(differences.mean() or 1), kind="stable")
    return tuple(ids[index] for index in order[:max_rows] if differences[index])
