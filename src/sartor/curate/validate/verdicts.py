"""From statistics under permutation to verdicts: p, effect, limit, and Holm's correction over the whole family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sartor.core.family import holm
from sartor.curate.validate.sides import Pool

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
Verdict = Literal["pass", "fail", "not tested"]
SHOWN_ROWS = 50


@dataclass(frozen=True)
class Finding:
    """One test. `effect` is what was found less what chance gives, in the unit of `limit`; p is one-sided: worse than chance.

    `fail` needs both: p_corrected of at most alpha, and an effect over the limit. rows: ids of rows that make the effect, the
    first SHOWN_ROWS. detail: a sentence.
    """

    name: str
    statistic: float
    effect: float
    limit: float
    p: float | None
    detail: str
    rows: tuple[str, ...] = ()
    p_corrected: float | None = None
    verdict: Verdict = "not tested"
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the command's JSON."""
        said = {key: _rounded(value) for key, value in asdict(self).items() if key not in ("name", "more")}
        return {**said, "rows": list(self.rows), **self.more}


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def not_tested(name: str, limit: float, why: str) -> Finding:
    """A test that the rows do not allow, and why."""
    return Finding(name, 0.0, 0.0, limit, None, why)


def permuted(pool: Pool, permutations: int, seed: int) -> F32:
    """(1 + permutations, n) of 0 and 1: which rows are the synthetic ones. The first row is as it is.

    Whole units change sides: rows of one unit are alike, and moving them apart would make chance look smaller than it is. Each
    draw has about as many synthetic rows as there are.
    """
    rng = np.random.default_rng([seed, 1])
    sizes = np.bincount(pool.units)
    wanted = int(pool.is_synthetic.sum())
    found = np.empty((1 + permutations, pool.count), np.float32)
    found[0] = pool.is_synthetic
    for draw in range(1, 1 + permutations):
        order = rng.permutation(len(sizes))
        ends = sizes[order].cumsum()
        cut = int(np.searchsorted(ends - sizes[order] / 2, wanted))
        chosen = np.zeros(len(sizes), np.float32)
        chosen[order[: min(max(cut, 1), len(sizes) - 1)]] = 1
        found[draw] = chosen[pool.units]
    return found


def finding_of(
    name: str, values: F64, limit: float, detail: str, rows: Sequence[str] = (), effect: float | None = None
) -> Finding:
    """A test of (1 + permutations,) values of a statistic that is larger the worse; the first is the one found.

    effect: by default the excess over the permutations' mean. p counts the found one among the permutations (Phipson and
    Smyth 2010), so it is never 0.
    """
    found, chance = float(values[0]), values[1:]
    # float32 sums of one membership in another order may differ in the last digits
    p = (1 + int((chance >= found - 1e-6 * max(1.0, abs(found))).sum())) / len(values)
    excess = found - float(chance.mean()) if effect is None else effect
    return Finding(name, found, excess, limit, p, detail, tuple(rows)[:SHOWN_ROWS])


def beyond_chance(values: F64) -> float:
    """A distance with what chance adds taken out: distances of independent causes add up by their squares."""
    return float(np.sqrt(max(0.0, float(values[0]) ** 2 - float((values[1:] ** 2).mean()))))


def judged(tests: Sequence[Finding], alpha: float) -> list[Finding]:
    """The tests with their verdicts. Holm's step-down (Holm 1979) over those that have a p: at most `alpha` false alarms of the
    whole family, however the tests depend on one another.
    """
    family = {place: test.p for place, test in enumerate(tests) if test.p is not None}
    corrected = dict(zip(family, holm(list(family.values())), strict=True))
    return [_with_verdict(test, corrected.get(place), alpha) for place, test in enumerate(tests)]


def _with_verdict(test: Finding, p: float | None, alpha: float) -> Finding:
    if p is None:
        return test
    return replace(test, p_corrected=p, verdict="fail" if p <= alpha and test.effect > test.limit else "pass")
