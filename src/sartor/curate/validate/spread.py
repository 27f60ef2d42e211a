"""Which real regions have no synthetic neighbour, and which synthetic rows have no real one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.curate.validate.options import Limits
from sartor.curate.validate.space import F32, Space
from sartor.curate.validate.verdicts import Finding, finding_of

# by chance so few rows have no neighbour of the other side
_CHANCE = 0.04
_FEWEST, _MOST = 3, 100


def coverage(space: Space, members: F32, limits: Limits) -> Finding:
    """Real rows none of whose k nearest is synthetic: 1 - coverage (Naeem et al. 2020), k by how many are synthetic.

    Near is what is about the same: among neighbours by single words are rows of every topic, and a lost one stays unseen.
    """
    synthetic = float(space.pool.is_synthetic.mean())
    alone = _alone(space.neighbours(_k(synthetic, len(members[0])), coarse=True), members)
    outside = 1 - members
    values = (alone * outside).sum(1) / outside.sum(1)
    bare = np.flatnonzero(alone[0] * outside[0])
    detail = f"{values[0]:.0%} of the real rows have no synthetic neighbour; chance gives {values[1:].mean():.0%}"
    ids = [space.pool.rows[row].id for row in bare.tolist()]
    found = finding_of("coverage", values.astype(np.float64), limits.coverage, detail, ids)
    return replace(found, more={"regions": _regions(space, alone[0])})


def novelty(space: Space, members: F32, limits: Limits) -> Finding:
    """Synthetic rows none of whose k nearest is real: 1 - precision in the sense of Kynkaanniemi et al. 2019, k as above."""
    real = 1 - float(space.pool.is_synthetic.mean())
    alone = _alone(space.neighbours(_k(real, len(members[0]))), 1 - members)
    values = (alone * members).sum(1) / members.sum(1)
    ids = [space.pool.rows[row].id for row in np.flatnonzero(alone[0] * members[0]).tolist()]
    detail = f"{values[0]:.0%} of the synthetic rows have no real neighbour; chance gives {values[1:].mean():.0%}"
    return finding_of("novelty", values.astype(np.float64), limits.novelty, detail, ids)


def _k(other: float, rows: int) -> int:
    """How many neighbours to look at so that one of the other side, a fraction `other` of all, is among them nearly always."""
    return min(max(_FEWEST, math.ceil(math.log(_CHANCE) / math.log(1 - other))), _MOST, rows - 1)


def _alone(neighbours: Any, members: F32) -> F32:
    """(B, n) 1 where none of a row's neighbours, (n, n) of 0 and 1, is a member."""
    return ((neighbours @ members.T) == 0).T.astype(np.float32)


def _regions(space: Space, alone: F32) -> list[dict[str, Any]]:
    """Topics of real rows, the least covered first: how many rows, which part is covered, and a row from its middle."""
    real = ~space.pool.is_synthetic
    found = []
    topics = space.topics[-1]
    for topic in np.unique(topics[real]).tolist():
        rows = np.flatnonzero(real & (topics == topic))
        middle = rows[np.argmax(space.vectors[rows] @ space.vectors[rows].mean(0))]
        found.append(
            {
                "real": len(rows),
                "synthetic": int((space.pool.is_synthetic & (topics == topic)).sum()),
                "covered": round(1 - float(alone[rows].mean()), 4),
                "example": space.pool.rows[int(middle)].id,
            }
        )
    return sorted(found, key=lambda one: (one["covered"], -one["real"]))


def outside(vectors: F32, real_vectors: F32, real_units: NDArray[Any], rate: float) -> dict[int, str]:
    """Synthetic rows that are farther from reality than real rows are: row -> a sentence.

    A row's p is the fraction of real rows whose nearest of another unit is as far (conformal, Bates et al. 2023); rows at or
    below `rate` are named, or of few real rows those that are farther than all.
    """
    own = real_vectors @ real_vectors.T
    own[real_units[:, None] == real_units[None, :]] = -1
    usual = np.sort(own.max(1))
    nearest = np.concatenate([(part @ real_vectors.T).max(1) for part in np.array_split(vectors, max(1, len(vectors) // 1000))])
    p = (1 + np.searchsorted(usual, nearest, side="right")) / (len(usual) + 1)
    named = np.flatnonzero(p <= max(rate, 1 / (len(usual) + 1)))
    said = "likeness {:.2f} to the nearest real row; {:.1%} of the real rows are so far from the others"
    return {int(row): said.format(nearest[row], p[row]) for row in named}
