"""A lower bound of epsilon, by attack: where members are told from others this well, epsilon is at least this (95 %).

`one_run`: coins decide which of m canaries are trained on, once; their scores are guessed from (Steinke, Nasr, Jagielski 2023,
arXiv:2305.08846). `many_runs`: one row is in or out of each of many runs (Jagielski et al. 2020, arXiv:2006.07709). The rows of
one run are no independent runs, so its rates must not go into the second.

A bound below the claim proves nothing; one above it refutes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

from sartor.core.errors import ConfigError

CONFIDENCE = 0.95
MOST_EPSILON = 60.0


@dataclass(frozen=True)
class Audit:
    """epsilon_low: with 95 % confidence; most: if every guess were right. trials: canaries, or runs."""

    epsilon_low: float
    most: float
    right: int
    guesses: int
    trials: int
    delta: float

    def __str__(self) -> str:
        return (
            f"audit: {self.right} of {self.guesses} guesses right on {self.trials} canaries, so epsilon is at least "
            f"{self.epsilon_low:.2f} at delta {self.delta:g} (95 % confidence; could have shown {self.most:.2f})"
        )


def coins(canaries: int, seed: int) -> NDArray[np.bool_]:
    """Which canaries are trained on: each with a fair coin of its own."""
    return np.random.default_rng(seed).random(canaries) < 0.5


def one_run(scores: Sequence[float], is_in: Sequence[bool], delta: float, guess_fraction: float = 0.5) -> Audit:
    """scores (m,): higher for canaries that seem to have been trained on; is_in: the coins.

    Half of the guesses are the highest, taken for in, half the lowest, taken for out. guess_fraction: of m, chosen before
    anybody looked. Raises ConfigError for fewer than 10 canaries.
    """
    values, truth = np.asarray(scores, float), np.asarray(is_in, bool)
    if len(values) != len(truth) or len(values) < 10 or not 0 < guess_fraction <= 1 or not np.isfinite(values).all():
        problem = f"{len(values)} scores and {len(truth)} coins, guess_fraction {guess_fraction}"
        raise ConfigError(problem, "finite scores of at least 10 canaries, each with its coin; guess_fraction in 0..1")
    each = max(1, int(len(values) * guess_fraction / 2))
    order = np.argsort(values, kind="stable")
    right = int(truth[order[-each:]].sum() + (~truth[order[:each]]).sum())
    low, most = (_least_epsilon(len(values), 2 * each, count, delta) for count in (right, 2 * each))
    return Audit(low, most, right, 2 * each, len(values), delta)


def many_runs(scores_in: Sequence[float], scores_out: Sequence[float], delta: float, threshold: float) -> Audit:
    """Scores of one row in runs with it and in runs without. threshold: above it is a guess of in; chosen on other runs.

    Raises ConfigError without runs.
    """
    found, false = (int((np.asarray(scores, float) > threshold).sum()) for scores in (scores_in, scores_out))
    runs, others = len(scores_in), len(scores_out)
    if not (runs and others):
        raise ConfigError(f"{runs} runs with the row and {others} without", "both are needed")
    low, most = _of_rates(found, runs, false, others, delta), _of_rates(runs, runs, 0, others, delta)
    return Audit(low, most, found + others - false, runs + others, runs + others, delta)


def _of_rates(found: int, runs: int, false: int, others: int, delta: float) -> float:
    """Both rates at the ends of intervals that hold together with 95 %: each is one-sided with half of the rest."""
    low = float(binomtest(found, runs).proportion_ci(CONFIDENCE, "exact").low)
    high = float(binomtest(false, others).proportion_ci(CONFIDENCE, "exact").high)
    ratios = [(low - delta) / high, (1 - high - delta) / (1 - low)]
    return max(0.0, *(math.log(ratio) for ratio in ratios if ratio > 0))


def _least_epsilon(trials: int, guesses: int, right: int, delta: float) -> float:
    """The largest epsilon that so many right guesses refute."""
    if _chance(trials, guesses, right, 0.0, delta) >= 1 - CONFIDENCE:
        return 0.0
    low, high = 0.0, MOST_EPSILON
    while high - low > 1e-4:
        middle = (low + high) / 2
        is_refuted = _chance(trials, guesses, right, middle, delta) < 1 - CONFIDENCE
        low, high = (middle, high) if is_refuted else (low, middle)
    return low


def _chance(trials: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Of so many right guesses or more, at most, under (epsilon, delta): theorem 5.2 there.

    Guesses are at best right as independent coins of e^epsilon / (1 + e^epsilon); delta lets some of the canaries be told
    outright, which is worth most where it lifts a likely count over `right`.
    """
    coin = 1 / (1 + math.exp(-epsilon))
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, coin))  # of right - i .. right - 1, for i = 1 ..
    lifted = float((below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, float(binom.sf(right - 1, guesses, coin)) + 2 * trials * delta * lifted)
