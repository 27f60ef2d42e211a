"""Can the two sides be told apart? A classifier two-sample test and the maximum mean discrepancy, on one kernel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sartor.curate.validate.options import Limits
from sartor.curate.validate.space import F32, Space
from sartor.curate.validate.verdicts import F64, Finding, finding_of

FOLDS = 5
_RIDGE = 1.0


def classifier(space: Space, members: F32, limits: Limits) -> Finding:
    """Classifier two-sample test (Lopez-Paz and Oquab 2017): AUC of kernel ridge on rows that it did not learn from.

    Units are kept whole in the folds. The held-out scores are linear in the labels, so every permutation is trained anew at the
    cost of one product.
    """
    scores = (members - members.mean(1, keepdims=True)) @ _hat(space).T
    values = _auc(scores, members)
    auc = float(values[0])
    detail = f"a classifier tells a synthetic row from a real one {auc:.0%} of the time; 50 % is chance"
    own = space.pool.is_synthetic
    # the rows that give the synthetic side away most
    telling = np.argsort(-np.where(own, scores[0], -np.inf))[: int(own.sum())]
    ids = [space.pool.rows[row].id for row in telling.tolist()]
    return finding_of("distinguishable", values, limits.distinguishable, detail, ids, effect=auc - 0.5)


def _hat(space: Space) -> F32:
    """(n, n): held-out scores of all rows are this times their labels."""
    units = space.pool.units
    fold = np.random.default_rng([space.seed, 3]).permutation(int(units.max()) + 1)[units] % FOLDS
    hat = np.zeros_like(space.kernel)
    for number in range(FOLDS):
        out, inside = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        if len(out) and len(inside):
            known = space.kernel[np.ix_(inside, inside)] + _RIDGE * np.eye(len(inside), dtype=np.float32)
            hat[np.ix_(out, inside)] = np.linalg.solve(known, space.kernel[np.ix_(inside, out)]).T
    return hat


def _auc(scores: NDArray[np.float32], members: F32) -> F64:
    """(B,) the chance that a member scores above a non-member."""
    ranks = np.empty(scores.shape, np.float32)
    places = np.broadcast_to(np.arange(1, scores.shape[1] + 1, dtype=np.float32), scores.shape)
    np.put_along_axis(ranks, np.argsort(scores, axis=1), places, axis=1)
    inside = members.sum(1, dtype=np.float64)
    outside = members.shape[1] - inside
    above = np.einsum("bn,bn->b", ranks, members, dtype=np.float64)
    return np.asarray((above - inside * (inside + 1) / 2) / (inside * outside))


def mmd(space: Space, members: F32, limits: Limits) -> Finding:
    """The unbiased squared maximum mean discrepancy (Gretton et al. 2012, lemma 6), over the mean squared distance of two rows.

    The effect is a part of reality's own spread: 0 for the same distribution.
    """
    kernel = space.kernel.copy()
    np.fill_diagonal(kernel, 0)
    toward = (members @ kernel).astype(np.float64)
    total, rows = float(kernel.sum(dtype=np.float64)), members.shape[1]
    inside, reached = np.einsum("bn,bn->b", toward, members), toward.sum(1)
    count = members.sum(1, dtype=np.float64)
    rest = rows - count
    values = (
        inside / np.maximum(count * (count - 1), 1)
        + (total - 2 * reached + inside) / np.maximum(rest * (rest - 1), 1)
        - 2 * (reached - inside) / (count * rest)
    )
    spread = max(1 - total / (rows * (rows - 1)), 1e-9)
    part = float(values[0]) / spread
    detail = f"the sides are apart by {part:.3f} of the spread of rows"
    return finding_of("mmd", values / spread, limits.mmd, detail, effect=part)
