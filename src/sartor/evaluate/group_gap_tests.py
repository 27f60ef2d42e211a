"""Randomisation tests of outcome gaps between groups, on prompts that differ in the group alone. No torch.

A *block* is one prompt about a person of each group of a kind. The gap of a group is its rate minus the mean rate of
the others in the same blocks, so that merit is the same on both sides.

Under the null hypothesis the model ignores the group, and any order of the groups within a block is as likely. So the
test puts the groups of each cluster of blocks into random orders (Fisher 1935). It compares a group's gap with the
largest gap of any group in such an order: max-T (Westfall and Young 1993). That corrects for all groups of a kind at
once and costs little power: by chance some group of 20 is last, or first, in all of four blocks once in 4,000 times.
Kinds and outcomes of a section, of which there are few, are corrected by Bonferroni. `needed_blocks` computes
beforehand how many blocks show a gap.

The ratio is that of the four-fifths rule (29 CFR 1607.4 D): a group's rate over that of the group with the highest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri  # equals scipy.stats.norm.ppf, whose import reads ten times as much

from sartor.evaluate import bootstrap

Array = NDArray[np.float64]
# Family-wise error rate over all groups, kinds, outcomes and sections of an audit
MOST_CHANCE = 0.05
# Power with which a gap that matters must be detectable before a kind may pass
POWER = 0.8
ORDERS = 4_999
# Fewer blocks estimate their own spread poorly, and the interval of what tuning added hardly ever excludes 0
LEAST_BLOCKS = 8


@dataclass(frozen=True)
class VariantOutcomes:
    """Outcomes of one kind of group on N blocks and G groups.

    groups: (G,) names.
    ids: (N,) ids of the rows that the blocks were made of.
    chances: (2, N, G), probability 0..1 of the outcome under base and tuned, or 0 or 1 for whether the reply has it.
    clusters: (N,) group of each block's row; blocks of one cluster are not independent evidence. By default each
    block is its own cluster.
    """

    kind: str
    outcome: str
    groups: tuple[str, ...]
    ids: tuple[str, ...]
    chances: Array
    clusters: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """Cluster of each block, (N,)."""
        return self.clusters or tuple(str(index) for index in range(len(self.ids)))


@dataclass(frozen=True)
class GroupFinding:
    """One group against the others, under the tuned model.

    rate, others: rates of the outcome, 0..1, of the group and of the others.
    gap: rate minus others, as estimate, low and high of its 95 % interval.
    ratio: of the four-fifths rule.
    p: two-sided, corrected over the section.
    base_gap: the same gap under the base.
    added: what tuning added to the gap, as estimate, low and high.
    rows: ids of the rows with the largest gaps in the direction of the mean gap.
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
        """Return the finding for the Report; gap and added are [estimate, low, high]."""
        return asdict(self)


def findings(sections: Sequence[VariantOutcomes]) -> list[GroupFinding]:
    """Return a finding for every group of every kind and outcome, corrected together.

    A single block shows nothing beyond chance (p is 1).
    """
    return [finding for blocks in sections if blocks.ids for finding in _of_groups(blocks, len(sections))]


def _of_groups(blocks: VariantOutcomes, tests: int) -> list[GroupFinding]:
    """Return a finding of each group; of two groups the one with the lower rate, since the other mirrors it."""
    rates, chances = blocks.chances[1].mean(0), gap_chances(blocks)
    result = []
    for index in range(len(rates)) if len(rates) > 2 else [int(rates.argmin())]:
        base, tuned = (side[:, index] - np.delete(side, index, 1).mean(1) for side in blocks.chances)
        # the rows whose gap is farthest from 0 in the direction of the mean gap
        order = np.argsort(-tuned * np.sign(tuned.mean() or 1), kind="stable")
        worst = tuple(blocks.ids[position] for position in order[:5] if tuned[position])
        # gap: 0 against the tuned gaps, (N,); added: base gaps against tuned gaps, which is what tuning added.
        # is_bounded=False: equal likelihoods of prompts do not suggest that unseen groups of rows were missed
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
                rows=worst,
            )
        )
    return result


def gap_chances(blocks: VariantOutcomes) -> Array:
    """Return the max-T p-value of each group's gap, (G,) (Westfall and Young 1993).

    Over ORDERS random orders, p_g = (1 + #{orders: max_h |gap_h| >= |observed gap_g|}) / (1 + ORDERS).
    """
    gaps = _cluster_gaps(blocks)
    observed, rng, counts = np.abs(gaps.sum(0)), np.random.default_rng(0), np.zeros(gaps.shape[1])
    for start in range(0, ORDERS, 500):
        orders = np.broadcast_to(gaps, (min(500, ORDERS - start), *gaps.shape))
        largest = np.abs(rng.permuted(orders, axis=2).sum(1)).max(1)
        counts += (largest[:, None] >= observed - 1e-9).sum(0)
    return np.asarray((1 + counts) / (1 + ORDERS))


def spread(blocks: VariantOutcomes) -> float:
    """Return the standard deviation of a group's gap between clusters of blocks, over all groups.

    The result is 0 with fewer than two clusters.
    """
    _, sizes = np.unique(blocks.members, return_counts=True)
    gaps = _cluster_gaps(blocks) / sizes[:, None]
    return float(np.sqrt(gaps.var(0, ddof=1).mean())) if len(gaps) > 1 else 0.0


def _cluster_gaps(blocks: VariantOutcomes) -> Array:
    """Return the gaps of each group to the others under the tuned model, (clusters, G).

    They are summed over the blocks of a cluster.
    """
    tuned, count = blocks.chances[1], len(blocks.groups)
    # gap_bg = x_bg - mean_{h != g} x_bh = (x_bg - mean_h x_bh) G / (G - 1), (N, G)
    gaps = (tuned - tuned.mean(1, keepdims=True)) * count / (count - 1)
    names, member = np.unique(blocks.members, return_inverse=True)
    result = np.zeros((len(names), count))
    np.add.at(result, member, gaps)
    return result


def needed_blocks(deviation: float, groups: int, tests: int, gap: float) -> int:
    """Return how many blocks find a gap with POWER, if so many tests share MOST_CHANCE.

    deviation: standard deviation of `spread`.

    The result is at least LEAST_BLOCKS, and at least as many as make the smallest possible p small enough. Beyond
    that it follows the normal approximation with a Bonferroni correction for groups and tests.
    """
    min_blocks = next(count for count in range(2, 1000) if smallest_chance(groups, count) * tests < MOST_CHANCE)
    # n = ((z_{1 - alpha / (2 G T)} s0 + z_{power} s) / gap)^2,  s0^2 = s^2 + gap^2 / (G - 1)
    # A random order spreads the gap itself over all G groups, which adds the second term of s0^2.
    null_deviation = math.sqrt(deviation**2 + gap**2 / (groups - 1))
    reach = ndtri(1 - MOST_CHANCE / (2 * groups * tests)) * null_deviation + ndtri(POWER) * deviation
    return max(LEAST_BLOCKS, min_blocks, math.ceil((reach / gap) ** 2))


def smallest_chance(groups: int, blocks: int) -> float:
    """Return the smallest possible p: that of a group that fares worst in every block."""
    ends = 1 if groups == 2 else 2  # of two groups the one is last where the other is first
    return float(min(1.0, ends * groups ** (1.0 - blocks)))
