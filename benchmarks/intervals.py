"""False verdicts and power of the interval over groups (`sartor.evaluate.bootstrap`), and of what was tried before it.

    python benchmarks/intervals.py --json                # the table of docs/decisions/021-few-groups.md
    python benchmarks/intervals.py --json --small        # Sartor's method alone, 20 draws: shows that it runs

Differences of groups are drawn with mean 0 from each distribution; a verdict of "better" or "worse" is false, at a
nominal 2.5 % each. `false_verdicts` has the larger of the two in per cent, by method, distribution and number of
groups; `power` how often an effect, in standard deviations of a group's difference, is told.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import parts
import smallest
from numpy.typing import NDArray
from results import print_result
from scipy.stats import t as student

from sartor.evaluate import bootstrap

Array = NDArray[np.float64]
Interval = Callable[[Array], tuple[float, float]]
GROUPS = (2, 3, 5, 8, 12, 20, 50)
EFFECTS = (0.5, 1.0, 2.0)
TAIL, RESAMPLES = 0.025, 1_999
# with `--small`
SMALL_TRIALS, SMALL_GROUPS = 20, (5, 8, 20)
DRAWS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, count: rng.normal(size=count),
    "binary": lambda rng, count: rng.choice([-1.0, 1.0], count),
    "rare_binary": lambda rng, count: (rng.random(count) < 0.3) - 0.3,
    "heavy_tailed": lambda rng, count: rng.standard_t(2, count),
    "log_normal": lambda rng, count: rng.lognormal(0, 1, count) - math.exp(0.5),
}


def sartor(each: Array) -> tuple[float, float]:
    """The interval that Reports have."""
    found = bootstrap.paired_bootstrap(np.zeros(len(each)), each, [str(number) for number in range(len(each))])
    return found.low, found.high


def percentile(each: Array) -> tuple[float, float]:
    """The percentile bootstrap, which Reports had at f346d1e."""
    if len(each) < 2:
        return -math.inf, math.inf
    means = each[_resamples(len(each))].mean(1)
    low, high = np.quantile(means, [TAIL, 1 - TAIL])
    return float(low), float(high)


def bootstrap_t(each: Array) -> tuple[float, float]:
    """The studentised bootstrap (Efron and Tibshirani 1993, ch. 12.5)."""
    drawn = each[_resamples(len(each))]
    errors = drawn.std(1, ddof=1) / math.sqrt(len(each))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.clip(np.nan_to_num((drawn.mean(1) - each.mean()) / errors), -1e9, 1e9)
    low, high = np.quantile(ratios, [TAIL, 1 - TAIL], method="inverted_cdf")
    error = float(each.std(ddof=1)) / math.sqrt(len(each))
    return float(each.mean() - high * error), float(each.mean() - low * error)


def flipped(each: Array) -> tuple[float, float]:
    """Flipped signs without a handicap: the means of sets of groups (Hartigan 1969)."""
    return _ends(each, 0.0)


def student_t(each: Array) -> tuple[float, float]:
    """Student's interval."""
    reach = float(student.ppf(1 - TAIL, len(each) - 1) * each.std(ddof=1)) / math.sqrt(len(each))
    return float(each.mean()) - reach, float(each.mean()) + reach


def range_handicap(each: Array) -> tuple[float, float]:
    """Flipped signs with a handicap of the whole range, whichever side it lies on."""
    return _ends(each, float(np.ptp(each)))


METHODS: dict[str, Interval] = {
    "sartor": sartor,
    "percentile": percentile,
    "bootstrap_t": bootstrap_t,
    "student": student_t,
    "flipped": flipped,
    "range_handicap": range_handicap,
}


def _resamples(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def _ends(each: Array, handicap: float) -> tuple[float, float]:
    chosen = np.random.default_rng(0).integers(0, 2, (RESAMPLES, len(each))).astype(float)
    if len(each) <= 11:
        chosen = ((np.arange(2 ** len(each))[:, None] >> np.arange(len(each))) & 1).astype(float)
    sizes = chosen.sum(1)
    means, sizes = (chosen @ each)[sizes > 0] / sizes[sizes > 0], sizes[sizes > 0]
    total = 2 ** len(each) if len(each) <= 11 else RESAMPLES + 1
    place = math.floor(TAIL * total) - (total - len(means))
    if place < 0:
        return -math.inf, math.inf
    low = np.sort(means - handicap / (2 * sizes))[place]
    return float(low), float(np.sort(means + handicap / (2 * sizes))[-1 - place])


def false_percent(method: Interval, name: str, count: int, trials: int) -> float:
    """The larger of the per cent of trials that say better, and of those that say worse."""
    rng = np.random.default_rng(count)
    ends = [method(DRAWS[name](rng, count)) for _ in range(trials)]
    return round(100 * max(sum(low > 0 for low, _ in ends), sum(high < 0 for _, high in ends)) / trials, 2)


def false_percents(method: str, name: str, groups: Sequence[int], trials: int) -> dict[str, float]:
    """Return `false_percent` of a method and a distribution, by number of groups."""
    return {str(count): false_percent(METHODS[method], name, count, trials) for count in groups}


def power_percents(method: str, effect: float, groups: Sequence[int], trials: int) -> dict[str, float]:
    """Return `power_percent` of a method and an effect, by number of groups."""
    return {str(count): power_percent(METHODS[method], effect, count, trials) for count in groups}


def power_percent(method: Interval, effect: float, count: int, trials: int) -> float:
    """Per cent of trials that tell an effect of normal differences."""
    rng = np.random.default_rng(count)
    return round(100 * sum(method(rng.normal(effect, 1, count))[0] > 0 for _ in range(trials)) / trials, 1)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="(always: the last line is one JSON object)")
    smallest.add_argument(parser)
    parser.add_argument("--trials", type=int, default=1_000)
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    asked = parser.parse_args()
    if asked.small:
        asked.trials, asked.groups, asked.methods = SMALL_TRIALS, SMALL_GROUPS, ["sartor"]
    began = time.monotonic()
    said: dict[str, Any] = {
        "false_verdicts": {
            method: {
                name: parts.run(
                    f"{method}: false verdicts, {name}",
                    functools.partial(false_percents, method, name, asked.groups, asked.trials),
                )
                for name in DRAWS
            }
            for method in asked.methods
        },
        "power": {
            method: {
                str(effect): parts.run(
                    f"{method}: power, effect {effect}",
                    functools.partial(power_percents, method, effect, asked.groups, asked.trials),
                )
                for effect in EFFECTS
            }
            for method in asked.methods
        },
        "trials": asked.trials,
        "absent": {
            name: smallest.LEFT_OUT if asked.small else "not asked for"
            for name in METHODS
            if name not in asked.methods
        },
    }
    print_result({**said, "wall_s": round(time.monotonic() - began, 1)})


if __name__ == "__main__":
    main()
