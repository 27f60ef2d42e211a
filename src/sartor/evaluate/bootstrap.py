"""Confidence intervals over groups, from an exact sign-flip test.

The test flips the signs of the differences of whole groups (Fisher 1935). Let D(J) be the difference on a set J of
groups. To test the value t, the test flips the signs of d_g - t for the groups g in J. The flipped sum is at least
the observed one exactly where D(J) <= t. So the values that the test does not reject lie between order statistics of
D(J) over sets J (Hartigan 1969, JASA 64, "typical values"). Verdict and interval are one computation and cannot
disagree.

Sign flips are exact for differences with a symmetric distribution. They reject too often where a long tail on one
side was not sampled (log-normal differences: 15 % false verdicts at a nominal 2.5 %). Two corrections widen the
interval therefore. The first is a handicap for one unseen group that lies further out than any observed group. The
second applies where most groups stand at one end of the observed range: it adds the largest fraction of unseen groups
that chance may have hidden. docs/decisions/021-few-groups.md lists what was tried, with false verdicts and power.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sartor.core.splits import FEW_GROUPS, LEAST_GROUPS, least_groups

SETS = 9_999
CONFIDENCE = 0.95
_TAIL = (1 - CONFIDENCE) / 2
# With so many groups, their mean is taken to lie between the lowest and the highest group
AGREEING_GROUPS = 13
# Groups whose differences lie within this fraction of the range of scores count as equal
NEAR = 0.05
# Up to the first number of groups every set is enumerated; up to the second the drawn sets are cached
_MOST_ENUMERATED, _MOST_KEPT = 13, 256
# Step of a group's weight in the numerical derivative of the infinitesimal jackknife
_STEP = 1e-4
# Differences closer than this are equal
_ALIKE = 1e-6
# At least so many drawn sets lie beyond the end of an interval; a smaller level draws more sets
_BEYOND = 20
# With fewer groups than `LEAST_GROUPS` the interval reaches as far as the scores allow, at least this far
LEAST_WIDTH = 1.0

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]


@dataclass(frozen=True)
class Comparison:
    """Values of one metric on both sides, and the interval of their difference (tuned minus base)."""

    base: float
    tuned: float
    difference: float
    low: float
    high: float

    def verdict(self, *, higher_is_better: bool = True) -> Literal["better", "worse", "cannot tell"]:
        """Return "better" or "worse" where the interval excludes 0, else "cannot tell".

        A difference or an end that is not finite gives "cannot tell".
        """
        is_finite = math.isfinite(self.difference) and math.isfinite(self.low) and math.isfinite(self.high)
        if not is_finite or self.low <= 0 <= self.high:
            return "cannot tell"
        return "better" if (self.low > 0) == higher_is_better else "worse"


@dataclass(frozen=True)
class FlipTest:
    """Options of the sign-flip test.

    tail: one-sided level of each end of the interval.
    seed: seed of the drawn sets of groups.
    """

    tail: float = _TAIL
    seed: int = 0


def paired_bootstrap(
    base: Sequence[float],
    tuned: Sequence[float],
    groups: Sequence[str],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    *,
    is_bounded: bool | None = None,
    tail: float = _TAIL,
) -> Comparison:
    """Compare the means of two sides that were scored on the same rows.

    base, tuned, groups, weights: (N,). The means are weighted by `weights` (tokens per row); by default each row
    counts 1.
    is_bounded: whether no score can lie outside -1..1; by default whether none of these does. Losses are not bounded.
    tail: one-sided level of each end of the interval.

    A mean is the simplest statistic of `corpus_bootstrap`, which computes the interval.
    """
    base_scores, tuned_scores = np.asarray(base, float), np.asarray(tuned, float)
    weight = np.ones_like(base_scores) if weights is None else np.asarray(weights, float)
    before, after = (np.stack([weight * scores, weight], 1) for scores in (base_scores, tuned_scores))
    scores = np.concatenate([base_scores, tuned_scores])
    largest = float(np.abs(scores).max())
    is_bounded = largest <= 1 if is_bounded is None else is_bounded
    widest = max(LEAST_WIDTH, largest, float(np.ptp(scores)))
    return corpus_bootstrap(
        before, after, groups, _mean, widest=widest, is_bounded=is_bounded, test=FlipTest(tail, seed)
    )


def _mean(sums: Array) -> Array:
    """Return the weighted means, (R,), of `sums`, (R, 2): weighted scores and weights."""
    return np.asarray(sums[:, 0] / sums[:, 1])


def corpus_bootstrap(
    base: Array,
    tuned: Array,
    groups: Sequence[str],
    statistic: Statistic,
    *,
    widest: float = 1.0,
    is_bounded: bool = True,
    test: FlipTest | None = None,
) -> Comparison:
    """Compare two sides by a statistic of the whole set that is a function of sums over rows.

    Examples are macro-F1 and the word error rate.

    base, tuned: (N, K), what each row adds to the sums.
    groups: (N,).
    statistic: maps sums (R, K) to values (R,).
    widest: the largest difference that the scores allow.
    is_bounded: whether no unseen row could differ by more.

    A set holds whole groups, never single rows: rows of one group fail together, and drawing them apart would make
    the interval too narrow. With fewer groups than can reach the level, the interval is -widest..widest. If the
    difference is not finite, the interval is -inf..inf.
    """
    test = test or FlipTest()
    tail = test.tail
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    count = len(names)
    sums = [np.zeros((count, side.shape[1])) for side in (base, tuned)]
    for side, rows in zip(sums, (base, tuned), strict=True):
        np.add.at(side, member, rows)

    def differences(chosen: Array) -> Array:
        """Return the differences, (R,), on sets of groups `chosen`, (R, groups) of 0 and 1."""
        before, after = (statistic(chosen @ side) for side in sums)
        return after - before

    before, after = (float(statistic(side.sum(0, keepdims=True))[0]) for side in sums)
    difference = after - before
    if not math.isfinite(difference):  # a loss overflowed, which bounds nothing
        return Comparison(before, after, difference, low=-math.inf, high=math.inf)
    if count < least_groups(tail):
        return Comparison(before, after, difference, low=-widest, high=widest)
    # infinitesimal jackknife (Efron 1982, ch. 6), one pseudo-value per group g of n, (groups,):
    #   v_g = D + n dD/dw_g,  dD/dw_g ~ (D(w_g + step) - D(w_g - step)) / (2 step)
    # For a mean over groups of equal size v_g is the group's own difference; a larger group counts more.
    minus, plus = (
        statistic(sums[1].sum(0) + step * sums[1]) - statistic(sums[0].sum(0) + step * sums[0])
        for step in (-_STEP, _STEP)
    )
    pseudo_values = difference + count * (plus - minus) / (2 * _STEP)
    with np.errstate(invalid="ignore", divide="ignore"):  # empty sets, or groups without weight: 0 / 0
        group_differences = statistic(sums[1]) - statistic(sums[0])
        values, sizes = np.concatenate([(differences(chosen), chosen.sum(1)) for chosen in _sets(count, test)], 1)
    low = _lower_end(pseudo_values, values, sizes, tail)
    high = -_lower_end(-pseudo_values, -values, sizes, tail)
    if statistic is _mean and count >= _agreeing_groups(tail):
        # A mean lies between those of single groups; macro-F1 does not. The chance that all of so many groups lie on
        # one side of the true mean is under a third of the level, for log-normal differences too
        low, high = max(low, float(np.nanmin(group_differences))), min(high, float(np.nanmax(group_differences)))
    if is_bounded and count < FEW_GROUPS:
        low = min(low, _unseen(pseudo_values, difference, widest, tail))
        high = max(high, -_unseen(-pseudo_values, -difference, widest, tail))
    # keep the estimate inside its interval, which rounding or a statistic other than a mean may have left
    low, high = min(max(low, -widest), difference), max(min(high, widest), difference)
    return Comparison(before, after, difference, low=low, high=high)


def _agreeing_groups(tail: float) -> int:
    """Return the number of groups whose lowest and highest hold the mean, except with chance `tail` / 3.

    The mean of a log-normal (sigma 1) lies at its quantile Phi(1/2) = 0.69. So all of n groups lie below it with
    probability 0.69^n.
    """
    return max(AGREEING_GROUPS, math.ceil(AGREEING_GROUPS + math.log(tail / _TAIL) / math.log(0.69)))


def _lower_end(pseudo_values: Array, values: Array, sizes: Array, tail: float) -> float:
    """Return the largest value below which the test rejects every value.

    pseudo_values: (groups,).
    values: (sets,), differences D(J) on sets J of groups.
    sizes: (sets,), number of groups |J| of each set.
    """
    count, handicap = len(pseudo_values), _handicap(pseudo_values)
    values, sizes = values[sizes > 0], sizes[sizes > 0]
    values = np.where(np.isfinite(values), values, -np.inf)
    # p(t) = #{J: D(J) <= t} / total. The empty set, which flips nothing, always counts; drawn sets count it as one
    # more (Phipson & Smyth 2010).
    # low is the order statistic number floor(tail * total) of D(J) - h / (2 |J|), with the handicap h.
    total = 2**count if count <= _MOST_ENUMERATED else _drawn_sets(tail) + 1
    rank = max(math.floor(tail * total + 1e-9) - (total - len(values)), 0)
    unadjusted, low = (float(np.partition(ends, rank)[rank]) for ends in (values, values - handicap / (2 * sizes)))
    # Differences of one size or 0, as for replies that are right or wrong, have mean 0 only if both signs are equally
    # likely. So the test is exact at 0 and only there: a quarter of the unadjusted end is kept.
    return max(low, unadjusted / 4) if unadjusted > 0 and _is_of_one_size(pseudo_values) else low


def _drawn_sets(tail: float) -> int:
    """Return how many sets to draw for a level, so that at least _BEYOND of them lie beyond it."""
    return max(SETS, math.ceil(_BEYOND / tail) - 1)


def _sets(count: int, test: FlipTest) -> Iterator[Array]:
    """Yield sets of groups as slices (R, count) of 0 and 1, which bounds the memory.

    Up to _MOST_ENUMERATED groups every set is yielded, else drawn ones.
    """
    drawn = _drawn_sets(test.tail)
    if count <= _MOST_ENUMERATED or (count <= _MOST_KEPT and drawn == SETS):
        sets = _cached_sets(count, test.seed)
        yield from (sets[start : start + 500].astype(float) for start in range(0, len(sets), 500))
        return
    rng = np.random.default_rng(test.seed)
    yield from (_drawn(rng, min(500, drawn - start), count).astype(float) for start in range(0, drawn, 500))


@functools.lru_cache(maxsize=4)
def _cached_sets(count: int, seed: int) -> NDArray[np.bool_]:
    """Return sets of groups, (sets, count), cached for the next comparison.

    The same sets serve all groups of people in an audit and all metrics of a Report.
    """
    if count <= _MOST_ENUMERATED:
        return ((np.arange(2**count)[:, None] >> np.arange(count)) & 1).astype(bool)
    return _drawn(np.random.default_rng(seed), SETS, count)


def _drawn(rng: np.random.Generator, sets: int, count: int) -> NDArray[np.bool_]:
    """Draw sets of groups, (sets, count), each group with probability 1/2."""
    return rng.integers(0, 2, (sets, count), dtype=np.int8).astype(bool)


def _handicap(pseudo_values: Array) -> float:
    """Return how far one unseen group may lower the sum: over twice the distance from median to minimum.

    The factor is 2.25 + 12 / n for n groups: the lowest of few groups does not lie far out. Both numbers were
    measured (docs/decisions/021-few-groups.md).
    """
    return float((2.25 + 12 / len(pseudo_values)) * (np.median(pseudo_values) - pseudo_values.min()))


def _is_of_one_size(pseudo_values: Array) -> bool:
    """Return whether every difference is 0 or of one and the same absolute value."""
    sizes = np.abs(pseudo_values)
    return bool(np.all((sizes < _ALIKE) | (sizes > sizes.max() - _ALIKE)))


def _unseen(pseudo_values: Array, difference: float, widest: float, tail: float) -> float:
    """Return the lower end if as many unseen groups as chance may hide score as badly as possible.

    It applies only where at least half of the groups lie within NEAR of the lowest value: no tail shows there how
    much lower others lie. Otherwise the result is inf. A fraction u of such groups stays unseen in all of n with
    probability (1 - u)^n, the upper limit for 0 in n (Clopper & Pearson 1934).
    """
    if 2 * (pseudo_values < pseudo_values.min() + NEAR * widest).sum() < len(pseudo_values):
        return math.inf
    # (1 - u)^n = tail  =>  u = 1 - tail^(1/n);  end = D (1 - u) - widest u
    hidden_fraction = 1 - tail ** (1 / len(pseudo_values))
    return float(difference * (1 - hidden_fraction) - widest * hidden_fraction)


def groups_needed(difference: float, low: float, high: float, groups: int) -> int:
    """Return about how many groups would exclude 0, if the difference stays as it is.

    The result is 0 if the interval excludes 0 already or the difference is 0.
    """
    if not difference or not low <= 0 <= high:
        return 0
    # the half width shrinks with 1 / sqrt(n): n' = n (half / difference)^2
    half = difference - low if difference > 0 else high - difference
    return max(LEAST_GROUPS, groups + 1, math.ceil(groups * (half / difference) ** 2))
