"""Permutation p values, effect limits, family correction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sartor.synthesize.validate.samples import Pool

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]
Verdict = Literal["pass", "fail", "not tested"]
SHOWN_ROWS = 50
_JSON_FIELDS = ("statistic", "effect", "limit", "p", "detail", "rows", "p_corrected", "verdict")


@dataclass(frozen=True)
class StatisticResult:
    """One test. `effect` is what was found less what chance gives, in the unit of `limit`; p is one-sided: worse than
    chance.

    `fail` needs both: p_corrected of at most alpha, and an effect over the limit. rows: ids of rows that make the
    effect, the
    first SHOWN_ROWS. detail: a sentence. draws: (1 + permutations,) the p that each permutation would have, the found
    one first; None of a test that permutes nothing.
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
    draws: F64 | None = field(default=None, repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """For the command's JSON."""
        fields = {key: _rounded(getattr(self, key)) for key in _JSON_FIELDS}
        return {**fields, "rows": list(self.rows), **self.more}


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def not_tested(name: str, limit: float, reason: str) -> StatisticResult:
    """A test that the rows do not allow, and why."""
    return StatisticResult(name, 0.0, 0.0, limit, None, reason)


def permuted(pool: Pool, permutations: int, seed: int) -> F32:
    """(1 + permutations, n) of 0 and 1: which rows are the synthetic ones. The first row is as it is.

    Whole units change sides: rows of one unit are alike, and moving them apart would make chance look smaller than it
    is. Each draw has about as many synthetic rows as there are.
    """
    rng = np.random.default_rng([seed, 1])
    sizes = np.bincount(pool.units)
    n_synthetic = int(pool.is_synthetic.sum())
    result = np.empty((1 + permutations, pool.count), np.float32)
    result[0] = pool.is_synthetic
    for draw in range(1, 1 + permutations):
        order = rng.permutation(len(sizes))
        cumulative_sizes = sizes[order].cumsum()
        cut = int(np.searchsorted(cumulative_sizes - sizes[order] / 2, n_synthetic))
        chosen = np.zeros(len(sizes), np.float32)
        chosen[order[: min(max(cut, 1), len(sizes) - 1)]] = 1
        result[draw] = chosen[pool.units]
    return result


def finding_of(
    name: str, values: F64, limit: float, detail: str, rows: Sequence[str] = (), effect: float | None = None
) -> StatisticResult:
    """A test of (1 + permutations,) values of a statistic that is larger the worse; the first is the one found.

    effect: by default the excess over the permutations' mean. p counts the found one among the permutations (Phipson
    and Smyth 2010), so it is never 0.
    """
    statistic = float(values[0])
    draws = _as_large(values)
    excess = statistic - float(values[1:].mean()) if effect is None else effect
    return StatisticResult(
        name, statistic, excess, limit, float(draws[0]), detail, tuple(rows)[:SHOWN_ROWS], draws=draws
    )


def _as_large(values: F64) -> F64:
    """(B,) of each value, the fraction of all that are as large."""
    # float32 sums of one membership in another order may differ in the last digits
    slack = 1e-6 * np.maximum(1.0, np.abs(values))
    return np.asarray((len(values) - np.searchsorted(np.sort(values), values - slack)) / len(values))


def beyond_chance(values: F64) -> float:
    """A distance with what chance adds taken out: distances of independent causes add up by their squares."""
    return float(np.sqrt(max(0.0, float(values[0]) ** 2 - float((values[1:] ** 2).mean()))))


def corrected_results(tests: Sequence[StatisticResult], alpha: float) -> list[StatisticResult]:
    """The tests with their verdicts: of a set in which nothing is wrong, at most a fraction `alpha` fails any test.

    Tests that permute are corrected together by what their smallest p is under the permutations that all of them share
    (Westfall and Young 1993), so tests that say the same cost nothing. One that does not permute is an alarm of its
    own: of m tests it has 1/m of alpha, and the others the rest (Bonferroni, weighted).
    """
    tested = [index for index, test in enumerate(tests) if test.p is not None]
    with_draws = [index for index in tested if tests[index].draws is not None]
    corrected = {index: min(1.0, (tests[index].p or 0.0) * len(tested)) for index in tested}
    if with_draws:
        shared = len(tested) / len(with_draws)
        joint = westfall_young(np.stack([draws for index in with_draws if (draws := tests[index].draws) is not None]))
        corrected |= {index: min(1.0, p * shared) for index, p in zip(with_draws, joint.tolist(), strict=True)}
    return [_with_verdict(test, corrected.get(index), alpha) for index, test in enumerate(tests)]


def westfall_young(draws: F64) -> F64:
    """(m,) corrected p of m tests, of their (m, B) p under the same permutations, the found one first.

    Step-down min-p (Westfall and Young 1993, algorithm 2.8): each p against the smallest that the tests which are no
    better than it reach in a permutation.
    """
    order = np.argsort(draws[:, 0], kind="stable")
    smallest = np.minimum.accumulate(draws[order[::-1]], axis=0)[::-1]
    stepped = np.maximum.accumulate((smallest <= smallest[:, :1]).mean(1))
    corrected = np.empty(len(draws))
    corrected[order] = stepped
    return corrected


def _with_verdict(test: StatisticResult, p: float | None, alpha: float) -> StatisticResult:
    if p is None:
        return test
    return replace(test, p_corrected=p, verdict="fail" if p <= alpha and test.effect > test.limit else "pass")
