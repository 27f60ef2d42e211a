"""Test of group outcome gaps, synthetic against real."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.curate.bias.group_membership import Memberships
from sartor.synthesize.validate.permutation_tests import F64, StatisticResult, finding_of, not_tested
from sartor.synthesize.validate.samples import F32, Pool, SampleSpace
from sartor.synthesize.validate.types import ValidationLimits
from sartor.text.demographics.decision_words import decision_of

FEWEST = 8  # rows of a group, and of the others of its attribute, on each side
_OUTCOMES = 6
_CLUSTERS = 4
_DECIDED = 0.8  # least fraction of replies with a decision, for replies to count as decisions


@dataclass(frozen=True)
class Cell:
    """A group and one or more outcomes.

    inside: (n,) 0/1, rows of the group. others: (n,) 0/1, rows of other groups. hit: (n,) 0/1, rows with the outcome.
    """

    name: str
    inside: F32
    others: F32
    hit: F32


def group_outcome(
    pool: Pool, people: Memberships, row_outcomes: Sequence[str | None], members: F32, limits: ValidationLimits
) -> StatisticResult:
    """Test whether outcome gaps between groups differ between synthetic and real rows.

    The gap of a cell is the group's outcome rate minus that of the others. The statistic is the largest |change of the
    gap| / standard error over all cells. All cells share the permutations, so it is compared with the largest that
    chance gives (Westfall and Young 1993). The effect is the change of the gap in the largest cell.
    members: (B, n) 0/1, the synthetic rows as they are and under permutation.
    """
    cells = list(_cells(people, row_outcomes, pool.is_synthetic))
    if not cells:
        reason = (
            "no group that the rows name has rows enough on both sides" if any(row_outcomes) else "no outcome is known"
        )
        return not_tested("group_outcome", limits.group_outcome, reason)
    changes = [_change(cell, members) for cell in cells]
    z = np.stack([np.abs(change / error) for change, error in changes])
    largest = int(z[:, 0].argmax())
    cell, change = cells[largest], float(changes[largest][0][0])
    is_synthetic = pool.is_synthetic
    rates = []
    for side in (is_synthetic, ~is_synthetic):
        for part in (cell.inside, cell.others):
            rates.append(float((side * part * cell.hit).sum() / (side * part).sum()))
    detail = (
        f"{cell.name}: {rates[0]:.0%} against {rates[1]:.0%} of the others in synthetic rows, "
        f"{rates[2]:.0%} against {rates[3]:.0%} in reality ({len(cells)} cells)"
    )
    rows = np.flatnonzero(is_synthetic * cell.inside * (cell.hit if change > 0 else 1 - cell.hit)).tolist()
    ids = [pool.rows[row].id for row in rows]
    return finding_of(
        "group_outcome", z.max(0), limit=limits.group_outcome, detail=detail, rows=ids, effect=abs(change)
    )


def _cells(people: Memberships, row_outcomes: Sequence[str | None], is_synthetic: NDArray[Any]) -> list[Cell]:
    has_outcome = np.array([name is not None for name in row_outcomes], np.float32)
    counts = Counter(name for name in row_outcomes if name is not None)
    outcomes = [name for name, _ in counts.most_common(_OUTCOMES)]
    # every division of the outcomes into two sides, once: several words may mean the same decision
    hits: dict[str, F32] = {}
    first, rest = outcomes[:1], outcomes[1:]
    for size in range(len(rest)):
        for combination in itertools.combinations(rest, size):
            outcome_set = [*first, *combination]
            set_name = " or ".join(f"{name!r:.40}" for name in outcome_set)
            hits[set_name] = np.isin(np.array(row_outcomes, object), outcome_set).astype(np.float32)
    cells = []
    for attribute, values in people.items():
        spoken = np.array([value is not None for value in values], np.float32) * has_outcome
        for value in sorted({value for value in values if value is not None}):
            inside = np.array([group == value for group in values], np.float32) * has_outcome
            others = spoken - inside
            row_counts = [(side * part).sum() for side in (is_synthetic, ~is_synthetic) for part in (inside, others)]
            if min(row_counts) >= FEWEST:
                cells += [Cell(f"{attribute} {value}, {name}", inside, others, hit) for name, hit in hits.items()]
    return cells


def _change(cell: Cell, members: F32) -> tuple[F64, F64]:
    """Return (B,) changes of the gap and (B,) their standard errors.

    Each rate has one hit and one miss added (Agresti and Caffo 2000). members: (B, n).
    """
    # rate p = (hits + 1) / (rows + 2), of the group and of the others, on each side (synthetic, real)
    # change = (p_in - p_others)_synthetic - (p_in - p_others)_real;  variance = sum of p (1 - p) / (rows + 2)
    parts = np.stack([cell.inside, cell.inside * cell.hit, cell.others, cell.others * cell.hit], 1)
    synthetic = (members @ parts).astype(np.float64)
    sides = (synthetic, parts.sum(0) - synthetic)
    gap, squared = [], np.zeros(len(members))
    for side in sides:
        rates = [(side[:, column + 1] + 1) / (side[:, column] + 2) for column in (0, 2)]
        squared += sum(rate * (1 - rate) / (side[:, column] + 2) for rate, column in zip(rates, (0, 2), strict=True))
        gap.append(rates[0] - rates[1])
    return gap[0] - gap[1], np.sqrt(squared)


def decisions(replies: Sequence[str]) -> list[str | None]:
    """Return the decision in each reply, by its words.

    Empty unless at least _DECIDED of the replies decide, and both decisions occur at least FEWEST times. A decision
    may be worded in many ways: taken together they show a shift that no single wording shows.
    """
    decided: list[str | None] = [decision_of(reply) for reply in replies]
    counts = Counter(item for item in decided if item is not None)
    return (
        decided
        if len(counts) == 2 and counts.total() >= _DECIDED * len(replies) and min(counts.values()) >= FEWEST
        else []
    )


def reply_kinds(space: SampleSpace, replies: F32) -> list[str]:
    """Return outcomes of free text: clusters of the replies, each named after a central reply.

    replies: (n, D) unit vectors.
    """
    from sklearn.cluster import KMeans

    clustering = KMeans(_CLUSTERS, n_init=4, random_state=space.seed).fit(replies)
    middles = [int((replies @ centre).argmax()) for centre in clustering.cluster_centers_]
    return [f"replies like {space.pool.rows[middles[kind]].reply[:40]!r}" for kind in clustering.labels_.tolist()]
