"""Group outcome gaps, synthetic against real."""

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
_DECIDED = 0.8  # of the replies: then they are decisions, and their words are taken for them


@dataclass(frozen=True)
class Cell:
    """A group and one or more outcomes. inside, others, hit: (n,) of 0 and 1: rows of it, of other groups, with the outcome."""

    name: str
    inside: F32
    others: F32
    hit: F32


def group_outcome(
    pool: Pool, people: Memberships, named: Sequence[str | None], members: F32, limits: ValidationLimits
) -> StatisticResult:
    """The gap of a group's outcome rate to that of the others, synthetic less real, over its standard error; the largest cell.

    All cells share the permutations, so the largest of them is held against the largest that chance gives (Westfall and Young
    1993). The effect is the change of the gap in that cell.
    """
    cells = list(_cells(people, named, pool.is_synthetic))
    if not cells:
        why = "no group that the rows name has rows enough on both sides" if any(named) else "no outcome is known"
        return not_tested("group_outcome", limits.group_outcome, why)
    found = [_change(cell, members) for cell in cells]
    z = np.stack([np.abs(change / error) for change, error in found])
    largest = int(z[:, 0].argmax())
    cell, change = cells[largest], float(found[largest][0][0])
    own = pool.is_synthetic
    rates = [_rate(cell, side) for side in (own, ~own)]
    detail = (
        f"{cell.name}: {rates[0][0]:.0%} against {rates[0][1]:.0%} of the others in synthetic rows, "
        f"{rates[1][0]:.0%} against {rates[1][1]:.0%} in reality ({len(cells)} cells)"
    )
    rows = np.flatnonzero(own * cell.inside * (cell.hit if change > 0 else 1 - cell.hit)).tolist()
    ids = [pool.rows[row].id for row in rows]
    return finding_of("group_outcome", z.max(0), limits.group_outcome, detail, ids, effect=abs(change))


def _cells(people: Memberships, named: Sequence[str | None], own: NDArray[Any]) -> list[Cell]:
    known = np.array([name is not None for name in named], np.float32)
    outcomes = [name for name, _ in Counter(name for name in named if name is not None).most_common(_OUTCOMES)]
    hits = {
        " or ".join(f"{name!r:.40}" for name in some): np.isin(np.array(named, object), some).astype(np.float32)
        for some in _sets(outcomes)
    }
    cells = []
    for attribute, values in people.items():
        spoken = np.array([value is not None for value in values], np.float32) * known
        for value in sorted({value for value in values if value is not None}):
            inside = np.array([one == value for one in values], np.float32) * known
            others = spoken - inside
            if min((side * some).sum() for side in (own, ~own) for some in (inside, others)) >= FEWEST:
                cells += [Cell(f"{attribute} {value}, {name}", inside, others, hit) for name, hit in hits.items()]
    return cells


def _sets(outcomes: Sequence[str]) -> list[list[str]]:
    """Every way to call some outcomes one and the rest the other, each once: several words may say the same decision."""
    first, rest = outcomes[:1], outcomes[1:]
    return [[*first, *some] for size in range(len(rest)) for some in itertools.combinations(rest, size)]


def _change(cell: Cell, members: F32) -> tuple[F64, F64]:
    """((B,) change of the gap, (B,) its standard error), each rate with one hit and one miss added (Agresti and Caffo 2000)."""
    parts = np.stack([cell.inside, cell.inside * cell.hit, cell.others, cell.others * cell.hit], 1)
    synthetic = (members @ parts).astype(np.float64)
    sides = (synthetic, parts.sum(0) - synthetic)
    gap, squared = [], np.zeros(len(members))
    for side in sides:
        rates = [(side[:, place + 1] + 1) / (side[:, place] + 2) for place in (0, 2)]
        squared += sum(rate * (1 - rate) / (side[:, place] + 2) for rate, place in zip(rates, (0, 2), strict=True))
        gap.append(rates[0] - rates[1])
    return gap[0] - gap[1], np.sqrt(squared)


def _rate(cell: Cell, side: NDArray[Any]) -> tuple[float, float]:
    return tuple(float((side * some * cell.hit).sum() / (side * some).sum()) for some in (cell.inside, cell.others))  # type: ignore[return-value]


def decisions(replies: Sequence[str]) -> list[str | None]:
    """What each reply decides, by its words; empty where fewer than _DECIDED of them decide anything, or all the same.

    One decision is said in many words: taken together they show a shift that none shows alone.
    """
    found: list[str | None] = [decision_of(reply) for reply in replies]
    counts = Counter(one for one in found if one is not None)
    return found if len(counts) == 2 and counts.total() >= _DECIDED * len(replies) and min(counts.values()) >= FEWEST else []


def reply_kinds(space: SampleSpace, replies: F32) -> list[str]:
    """Outcomes of free text: clusters of the (n, D) vectors of the replies, each called by a reply from its middle."""
    from sklearn.cluster import KMeans

    found = KMeans(_CLUSTERS, n_init=4, random_state=space.seed).fit(replies)
    middles = [int((replies @ centre).argmax()) for centre in found.cluster_centers_]
    return [f"replies like {space.pool.rows[middles[kind]].reply[:40]!r}" for kind in found.labels_.tolist()]
