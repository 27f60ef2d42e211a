"""Near-copies, by the verification that de-duplication uses: of seeds, of held-out rows, of one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from sartor.core.records import Example
from sartor.curate.dedup import near_duplicates, shingles
from sartor.curate.dedup.pair_scoring import METHODS, rules_for
from sartor.curate.steps.text_duplicates import text_of
from sartor.curate.validate.options import Limits
from sartor.curate.validate.sides import Pool
from sartor.curate.validate.space import F32
from sartor.curate.validate.verdicts import Finding, finding_of, not_tested


@dataclass(frozen=True)
class Pair:
    """Two places in a list of rows that say nearly the same."""

    a: int
    b: int
    score: float
    method: str


def near_copies(rows: Sequence[Example]) -> list[Pair]:
    """Verified pairs, prompt and reply compared together, with the settings of `near_duplicates`."""
    how = shingles.resolve("words", 0, ())
    rules = rules_for(how)
    found = shingles.sketch([text_of(row, "both") for row in rows], how)
    pairs = near_duplicates.near_duplicates(found.shingles, found.offsets, found.digests, rules).pairs
    pairs = pairs.judged(rules.threshold, rules.contained)
    columns = (pairs.a, pairs.b, pairs.score(rules.threshold), pairs.method(rules.threshold))
    return [Pair(a, b, score, METHODS[method]) for a, b, score, method in zip(*(one.tolist() for one in columns), strict=True)]


def of_seeds(pool: Pool, seeds: Sequence[Example], members: F32, limits: Limits) -> Finding:
    """More near-copies of seeds than reality itself has: real rows may be like the seeds too, and that is no copying."""
    if not seeds:
        return not_tested("copies_of_seeds", limits.copies, "no seeds are known: --seeds DATASET")
    count = pool.count
    copies = np.zeros(count, np.float32)
    for pair in near_copies([*pool.rows, *seeds]):
        if pair.a < count <= pair.b:
            copies[pair.a] = 1
    inside = members.sum(1, dtype=np.float64)
    rate = (members @ copies) / inside
    other = (copies.sum() - members @ copies) / (count - inside)
    detail = f"{rate[0]:.0%} of the synthetic rows are near-copies of a seed; of the real rows {other[0]:.0%}"
    ids = [pool.rows[row].id for row in np.flatnonzero(copies * members[0]).tolist()]
    return finding_of("copies_of_seeds", rate - other, limits.copies, detail, ids, effect=float(rate[0] - other[0]))


def of_held_out(pool: Pool, pairs: Sequence[Pair], members: F32, limits: Limits) -> Finding:
    """More synthetic near-copies of held-out rows than chance gives: what would be evaluated on has leaked."""
    across = _graph(pool, [pair for pair in pairs if pool.units[pair.a] != pool.units[pair.b]])
    copies = ((across @ (1 - members).T) > 0).T * members
    values = (copies.sum(1) / members.sum(1)).astype(np.float64)
    detail = f"{values[0]:.0%} of the synthetic rows are near-copies of a held-out row; chance gives {values[1:].mean():.0%}"
    ids = [pool.rows[row].id for row in np.flatnonzero(copies[0]).tolist()]
    return finding_of("copies_of_held_out", values, limits.copies, detail, ids)


def repeated(pool: Pool, pairs: Sequence[Pair], members: F32, limits: Limits) -> Finding:
    """More near-copies of one another than real rows are."""
    graph = _graph(pool, pairs)
    again = ((graph @ members.T) > 0).T * members
    values = (again.sum(1) / members.sum(1)).astype(np.float64)
    detail = f"{values[0]:.0%} of the synthetic rows nearly repeat another one; chance gives {values[1:].mean():.0%}"
    ids = [pool.rows[row].id for row in np.flatnonzero(again[0]).tolist()]
    return finding_of("repeated", values, limits.copies, detail, ids)


def _graph(pool: Pool, pairs: Sequence[Pair]) -> sparse.csr_matrix:
    ends = np.array([(pair.a, pair.b) for pair in pairs], np.int64).reshape(-1, 2)
    rows, columns = np.concatenate([ends, ends[:, ::-1]]).T
    return sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=(pool.count, pool.count))
