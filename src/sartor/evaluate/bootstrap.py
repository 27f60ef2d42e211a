"""Intervals over groups by an exact test of flipped signs.

The test flips the signs of whole groups (Fisher 1935). Flipping the groups of a set J turns the sum of all differences
to or below 0 exactly where the difference on J alone is not above 0. So the values that the test does not reject lie
between order statistics of the differences on sets of groups (Hartigan 1969, JASA 64, "typical values"): verdict and
interval are one computation and cannot disagree.

Flipped signs are exact for differences that are as likely with the other sign, and too eager where a long tail on one
side was not drawn (log-normal differences: 15 % false verdicts at a nominal 2.5 %). Two things are taken off
therefore: a handicap of one group that was not seen and lies further out than any that was, and, where most groups
stand at one end of what was seen, as large a fraction of unseen groups as chance may have hidden.
docs/decisions/021-few-groups.md has what was tried, with false verdicts and power.
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
# Of so many groups a mean lies between the lowest and the highest
AGREEING_GROUPS = 13
# Groups whose differences are within so much of the range of scores say the same
NEAR = 0.05
# Up to so many groups every set of them is looked at; up to so many the drawn sets are kept for the next comparison
_MOST_ENUMERATED, _MOST_KEPT = 13, 256
# A group's weight is moved by so much, to see what it says
_STEP = 1e-4
# Differences that are closer are one
_ALIKE = 1e-6
# So many drawn sets lie beyond the end of an interval at least: for rarer ends more sets are drawn
_BEYOND = 20
# The interval of fewer groups than `LEAST_GROUPS` reaches as far as the scores allow, which is taken to be this at
# least
LEAST_WIDTH = 1.0

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]


@dataclass(frozen=True)
class Comparison:
    """Means of both sides, and the interval of their difference (tuned minus base)."""

    base: float
    tuned: float
    difference: float
    low: float
    high: float

    def verdict(self, *, higher_is_better: bool = True) -> Literal["better", "worse", "cannot tell"]:
        """What the interval says: it lies on one side of 0, or it does not. What is not a finite number says
        nothing.
        """
        is_finite = math.isfinite(self.difference) and math.isfinite(self.low) and math.isfinite(self.high)
        if not is_finite or self.low <= 0 <= self.high:
            return "cannot tell"
        return "better" if (self.low > 0) == higher_is_better else "worse"


@dataclass(frozen=True)
class FlipTest:
    """One-sided level of each end of the interval, and the seed of the drawn sets."""

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
    """Compare two sides scored on the same rows. Inputs: (N,) each; `weights` makes the means weighted (tokens per
    row).

    is_bounded: whether no score can lie outside of -1..1, by default whether none does; losses are not. tail:
    one-sided level of each end of the interval. See `corpus_bootstrap`, of which a mean is the plainest case.
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
    """Compare two sides by a statistic of the whole set that is a function of sums over rows: macro-F1, a word error
    rate.

    base, tuned: (N, K) what each row adds to the sums. statistic: (R, K) sums -> (R,) values. widest: the largest
    difference that the scores allow; is_bounded: whether no row that was not seen could differ by more.
    Whole groups are in a set or not, never single rows: rows of one group fail together, and drawing them apart would
    make the interval too narrow. With fewer groups than can reach the level every difference that the scores allow is
    possible:
    -widest..widest.
    """
    test = test or FlipTest()
    tail = test.tail
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    count = len(names)
    sums = [np.zeros((count, side.shape[1])) for side in (base, tuned)]
    for side, rows in zip(sums, (base, tuned), strict=True):
        np.add.at(side, member, rows)

    def differences(chosen: Array) -> Array:
        """(R, groups) of 0 and 1 -> (R,) differences on the chosen groups."""
        before, after = (statistic(chosen @ side) for side in sums)
        return after - before

    before, after = (float(statistic(side.sum(0, keepdims=True))[0]) for side in sums)
    difference = after - before
    if not math.isfinite(difference):  # a loss that overflowed: anything may be
        return Comparison(before, after, difference, -math.inf, math.inf)
    if count < least_groups(tail):
        return Comparison(before, after, difference, -widest, widest)
    # what each group says of the difference, by the infinitesimal jackknife (Efron 1982, ch. 6): of a mean over groups
    # of one size its own difference, in a larger group the more
    minus, plus = (
        statistic(sums[1].sum(0) + step * sums[1]) - statistic(sums[0].sum(0) + step * sums[0])
        for step in (-_STEP, _STEP)
    )
    pseudo_values = difference + count * (plus - minus) / (2 * _STEP)
    with np.errstate(invalid="ignore", divide="ignore"):  # sets of nothing, or of groups without weight: 0 / 0
        group_differences = statistic(sums[1]) - statistic(sums[0])
        values, sizes = np.concatenate([(differences(chosen), chosen.sum(1)) for chosen in _sets(count, test)], 1)
    low = _lower_end(pseudo_values, values, sizes, tail)
    high = -_lower_end(-pseudo_values, -values, sizes, tail)
    if statistic is _mean and count >= _agreeing_groups(tail):
        # A mean lies between those of single groups; macro-F1 does not. That all of so many groups lie on one side of
        # the truth has a chance under a third of the level, for log-normal differences too
        low, high = max(low, float(np.nanmin(group_differences))), min(high, float(np.nanmax(group_differences)))
    if is_bounded and count < FEW_GROUPS:
        low = min(low, _unseen(pseudo_values, difference, widest, tail))
        high = max(high, -_unseen(-pseudo_values, -difference, widest, tail))
    # the estimate is always in its interval: where rounding, or a statistic that is no mean, left it out too
    low, high = min(max(low, -widest), difference), max(min(high, widest), difference)
    return Comparison(before, after, difference, low, high)


def _agreeing_groups(tail: float) -> int:
    """Return the number of groups of which the lowest and the highest hold a mean between them, but for a third of
    `tail`.

    The mean of a log-normal (sigma 1) lies at its quantile Phi(1/2) = 0.69: n groups lie below it with probability
    0.69^n.
    """
    return max(AGREEING_GROUPS, math.ceil(AGREEING_GROUPS + math.log(tail / _TAIL) / math.log(0.69)))


def _lower_end(pseudo_values: Array, values: Array, sizes: Array, tail: float) -> float:
    """The largest value below which the test rejects.

    pseudo_values: (groups,) pseudo-values. values: (sets,) differences on sets of groups; sizes: (sets,) how many
    groups each has.
    """
    count, handicap = len(pseudo_values), _handicap(pseudo_values)
    values, sizes = values[sizes > 0], sizes[sizes > 0]
    values = np.where(np.isfinite(values), values, -np.inf)
    # the empty set, where nothing is flipped, is as extreme as what was seen; among drawn sets it counts as one more
    # (Phipson & Smyth 2010)
    total = 2**count if count <= _MOST_ENUMERATED else _drawn_sets(tail) + 1
    rank = max(math.floor(tail * total + 1e-9) - (total - len(values)), 0)
    unadjusted, low = (float(np.partition(ends, rank)[rank]) for ends in (values, values - handicap / (2 * sizes)))
    # Of differences of one size, or none, as of a reply that is right or wrong, the mean is 0 only where both signs
    # are as
    # likely: at 0 flipped signs are exact. Elsewhere they are not: only a part of what they find stands.
    return max(low, unadjusted / 4) if unadjusted > 0 and _is_of_one_size(pseudo_values) else low


def _drawn_sets(tail: float) -> int:
    """Return how many sets are drawn for a level: so that some lie beyond it."""
    return max(SETS, math.ceil(_BEYOND / tail) - 1)


def _sets(count: int, test: FlipTest) -> Iterator[Array]:
    """(R, count) of 0 and 1: every set of groups, or drawn ones, in slices so that they are not gigabytes."""
    drawn = _drawn_sets(test.tail)
    if count <= _MOST_ENUMERATED or (count <= _MOST_KEPT and drawn == SETS):
        sets = _cached_sets(count, test.seed)
        yield from (sets[start : start + 500].astype(float) for start in range(0, len(sets), 500))
        return
    rng = np.random.default_rng(test.seed)
    yield from (_drawn(rng, min(500, drawn - start), count).astype(float) for start in range(0, drawn, 500))


@functools.lru_cache(maxsize=4)
def _cached_sets(count: int, seed: int) -> NDArray[np.bool_]:
    """The same sets serve many comparisons: of all groups of people in an audit, of all metrics of a Report."""
    if count <= _MOST_ENUMERATED:
        return ((np.arange(2**count)[:, None] >> np.arange(count)) & 1).astype(bool)
    return _drawn(np.random.default_rng(seed), SETS, count)


def _drawn(rng: np.random.Generator, sets: int, count: int) -> NDArray[np.bool_]:
    return rng.integers(0, 2, (sets, count), dtype=np.int8).astype(bool)


def _handicap(pseudo_values: Array) -> float:
    """What one unseen group may take from the sum: over twice as far below the median as the farthest group that was
    seen.

    More where groups are few, since the farthest of few is not far out. Both numbers were measured (decision 021).
    """
    return float((2.25 + 12 / len(pseudo_values)) * (np.median(pseudo_values) - pseudo_values.min()))


def _is_of_one_size(pseudo_values: Array) -> bool:
    sizes = np.abs(pseudo_values)
    return bool(np.all((sizes < _ALIKE) | (sizes > sizes.max() - _ALIKE)))


def _unseen(pseudo_values: Array, difference: float, widest: float, tail: float) -> float:
    """The lower end if groups below all that were seen are as many as chance may hide, and as bad as the scores allow.

    Only where half of the groups or more share the lowest value, but for NEAR of the range: there no tail tells how
    much lower others lie. A fraction u of such groups stays unseen in all of n with probability (1 - u)^n (of 0 in n,
    Clopper & Pearson 1934).
    """
    if 2 * (pseudo_values < pseudo_values.min() + NEAR * widest).sum() < len(pseudo_values):
        return math.inf
    hidden_fraction = 1 - tail ** (1 / len(pseudo_values))
    return float(difference * (1 - hidden_fraction) - widest * hidden_fraction)


def groups_needed(difference: float, low: float, high: float, groups: int) -> int:
    """About how many groups would exclude 0, if the difference stays as it is. 0 where it is excluded, or there is
    none.
    """
    if not difference or not low <= 0 <= high:
        return 0
    half = difference - low if difference > 0 else high - difference
    return max(LEAST_GROUPS, groups + 1, math.ceil(groups * (half / difference) ** 2))
