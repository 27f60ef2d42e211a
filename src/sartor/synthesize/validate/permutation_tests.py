"""Permutation p-values, effect limits and correction for several tests."""

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
    """Result of one test.

    effect: observed value minus what chance gives, in the unit of `limit`.
    p: one-sided, worse than chance. A test fails if p_corrected is at most alpha and the effect exceeds the limit.
    rows: ids of the first SHOWN_ROWS rows that cause the effect. detail: a sentence.
    draws: (1 + permutations,) p-value of each permutation, the observed one first; None for a test without
    permutations.
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
        """Return the fields for the command's JSON."""
        fields: dict[str, Any] = {}
        for key in _JSON_FIELDS:
            value = getattr(self, key)
            fields[key] = round(value, 6) if isinstance(value, float) else value
        return {**fields, "rows": list(self.rows), **self.more}


def not_tested(name: str, limit: float, reason: str) -> StatisticResult:
    """Return the result of a test that the rows do not allow, with the reason."""
    return StatisticResult(name, 0.0, effect=0.0, limit=limit, p=None, detail=reason)


def permuted(pool: Pool, permutations: int, seed: int) -> F32:
    """Return (1 + permutations, n) 0/1: the synthetic rows, as they are first and then under permutation.

    Whole units change sides. Rows of one unit are similar, and separating them would underestimate chance. Each draw
    has about as many synthetic rows as there are.
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
    """Return the test result for the values of a statistic that is larger the worse.

    values: (1 + permutations,), the observed one first.
    effect: by default the excess over the mean of the permutations.

    The observed value counts among the permutations (Phipson and Smyth 2010), so p is never 0.
    """
    statistic = float(values[0])
    # p of each value: the fraction of all values that are at least as large. float32 sums of the same membership in
    # another order may differ in the last digits
    slack = 1e-6 * np.maximum(1.0, np.abs(values))
    draws = np.asarray((len(values) - np.searchsorted(np.sort(values), values - slack)) / len(values))
    excess = statistic - float(values[1:].mean()) if effect is None else effect
    return StatisticResult(
        name,
        statistic,
        effect=excess,
        limit=limit,
        p=float(draws[0]),
        detail=detail,
        rows=tuple(rows)[:SHOWN_ROWS],
        draws=draws,
    )


def beyond_chance(values: F64) -> float:
    """Return a distance with the contribution of chance removed: sqrt(max(0, d^2 - mean of chance d^2)).

    Distances of independent causes add up by their squares. values: (1 + permutations,).
    """
    return float(np.sqrt(max(0.0, float(values[0]) ** 2 - float((values[1:] ** 2).mean()))))


def corrected_results(tests: Sequence[StatisticResult], alpha: float) -> list[StatisticResult]:
    """Return the tests with verdicts. If nothing is wrong, any test fails with probability at most `alpha`.

    Tests that permute are corrected together by the distribution of their smallest p under the shared permutations
    (Westfall and Young 1993), so redundant tests cost nothing. A test without permutations is corrected separately: of
    m tests it gets 1/m of alpha, and the others the rest (weighted Bonferroni).
    """
    tested = [index for index, test in enumerate(tests) if test.p is not None]
    draws_by_index: dict[int, F64] = {}
    for index in tested:
        draws = tests[index].draws
        if draws is not None:
            draws_by_index[index] = draws
    corrected = {index: min(1.0, (tests[index].p or 0.0) * len(tested)) for index in tested}
    if draws_by_index:
        shared = len(tested) / len(draws_by_index)
        joint = westfall_young(np.stack(list(draws_by_index.values())))
        corrected |= {index: min(1.0, p * shared) for index, p in zip(draws_by_index, joint.tolist(), strict=True)}
    results = []
    for index, test in enumerate(tests):
        p_corrected = corrected.get(index)
        if p_corrected is not None:
            is_failed = p_corrected <= alpha and test.effect > test.limit
            test = replace(test, p_corrected=p_corrected, verdict="fail" if is_failed else "pass")
        results.append(test)
    return results


def westfall_young(draws: F64) -> F64:
    """Return (m,) corrected p-values of m tests.

    draws: (m, B) their p-values under the same permutations, the observed one first.

    Step-down min-p (Westfall and Young 1993, algorithm 2.8): each p is compared with the smallest p that the tests
    with no smaller observed p reach in a permutation.
    """
    # tests in order of observed p, p_(1) <= ... <= p_(m):
    #   corrected p_(i) = max_{j <= i} P_b( min_{k >= j} p_(k, b) <= p_(j) )
    order = np.argsort(draws[:, 0], kind="stable")
    smallest = np.minimum.accumulate(draws[order[::-1]], axis=0)[::-1]
    stepped = np.maximum.accumulate((smallest <= smallest[:, :1]).mean(1))
    corrected = np.empty(len(draws))
    corrected[order] = stepped
    return corrected
