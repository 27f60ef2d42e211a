"""The statistics of review: plans and bounds are exact, and intervals hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import hypergeom

from sartor.core import statistics
from sartor.core.errors import ConfigError
from sartor.curate.review import quality_control
from sartor.curate.review.quality_control import ReviewerAgreement, agreements
from sartor.curate.review.review_items import Decision


def missed(population: int, bad: int, looked_at: int) -> float:
    """The chance that a sample holds no bad row, by counting."""
    return math.comb(population - bad, looked_at) / math.comb(population, looked_at)


@pytest.mark.parametrize(("population", "error"), [(50, 0.1), (200, 0.02), (1000, 0.01), (7, 0.2), (100, 0.29)])
def test_the_plan_is_the_smallest_sample_that_does(population: int, error: float) -> None:
    count = quality_control.size(population, error, 0.95)
    bad = math.floor(error * population + 1e-9) + 1
    assert missed(population, bad, count) <= 0.05 < missed(population, bad, count - 1)
    assert quality_control.most_bad(population, count, 0, 0.95) <= bad - 1
    assert quality_control.most_bad(population, count - 1, 0, 0.95) >= bad


@pytest.mark.parametrize("allow", [0, 1, 3])
def test_what_is_allowed_still_keeps_the_bound(allow: int) -> None:
    count = quality_control.size(2000, 0.02, 0.9, allow)
    assert (
        quality_control.most_bad(2000, count, allow, 0.9) <= 40 < quality_control.most_bad(2000, count, allow + 1, 0.9)
    )


def test_the_bound_is_wrong_no_more_often_than_it_says() -> None:
    """For every number of bad rows in 60, over every sample of 25 that may be drawn."""
    bounds = [quality_control.most_bad(60, 25, found, 0.95) for found in range(26)]
    wrong = [sum(hypergeom.pmf(found, 60, bad, 25) for found in range(26) if bounds[found] < bad) for bad in range(61)]
    assert max(wrong) <= 0.05 + 1e-12 and max(wrong) > 0.03, "neither too bold nor a bound that says nothing"


def test_everything_looked_at_leaves_nothing_open() -> None:
    assert quality_control.most_bad(30, 30, 4, 0.95) == 4 and quality_control.size(3, 0.01, 0.95) == 3


def test_larger_sample_begins_with_the_smaller_one() -> None:
    """The draw depends on the seed and not on the order of the rows, and draws them evenly."""
    ids = [f"{number:032x}" for number in range(300)]
    assert quality_control.draw_ids(ids, 40, 1)[:10] == quality_control.draw_ids(reversed(ids), 10, 1)
    assert quality_control.draw_ids(ids, 40, 1) != quality_control.draw_ids(ids, 40, 2)
    picked = np.zeros(300)
    for seed in range(400):
        picked[[int(one, 16) for one in quality_control.draw_ids(ids, 30, seed)]] += 1
    assert abs(picked[:150].mean() - picked[150:].mean()) < 2 and picked.min() > 15 and picked.max() < 70


def test_numbers_that_mean_nothing_are_refused() -> None:
    for error, confidence, allow, population in (
        (0, 0.95, 0, 9),
        (0.1, 1, 0, 9),
        (0.1, 0.9, -1, 9),
        (0.1, 0.9, 0, 0),
        (0.01, 0.9, 5, 100),
    ):
        with pytest.raises(ConfigError) as caught:
            quality_control.size(population, error, confidence, allow)
        assert caught.value.remedy


def said(item: str, by: str, verdict: str, at: str = "1", settles: bool = False) -> Decision:
    return Decision(item, verdict, by, at, settles=settles)


def test_kappa_is_cohens() -> None:
    """20 of 50 both accept, 15 both reject, 5 and 10 differ: 0.7 observed, 0.5 by chance, kappa 0.4."""
    table = {("accept", "accept"): 20, ("accept", "reject"): 5, ("reject", "accept"): 10, ("reject", "reject"): 15}
    found = ReviewerAgreement(("a", "b"), 50, 35, table)
    assert found.kappa is not None
    assert found.by_chance == pytest.approx(0.5) and found.kappa["estimate"] == pytest.approx(0.4)
    low, high = statistics.interval(35, 50)
    assert (found.kappa["low"], found.kappa["high"]) == pytest.approx((2 * low - 1, 2 * high - 1))
    assert found.kappa["low"] < 0.4 < found.kappa["high"]


def test_kappa_of_few_items_is_uncertain() -> None:
    """Full agreement on six items has a wide interval; if only one verdict occurs, kappa is undefined."""
    few = ReviewerAgreement(("a", "b"), 6, 6, {("accept", "accept"): 3, ("reject", "reject"): 3})
    assert few.kappa is not None and few.kappa["estimate"] == 1.0 and few.kappa["low"] < 0.2
    assert ReviewerAgreement(("a", "b"), 6, 6, {("accept", "accept"): 6}).kappa is None


def test_what_was_said_first_counts_and_settling_does_not() -> None:
    about = [
        [
            said("1", "a", "accept"),
            said("1", "b", "reject"),
            said("1", "b", "accept", "2"),
            said("1", "c", "reject", "3", True),
        ],
        [said("2", "a", "accept"), said("2", "b", "accept")],
        [said("3", "a", "reject")],
    ]
    (found,) = agreements(about)
    assert (found.reviewers, found.items, found.agreed) == (("a", "b"), 2, 1)


def test_the_interval_of_kappa_holds_the_truth() -> None:
    """Two who agree beyond chance by a known kappa: at least nine in ten intervals of 95 % hold it, at 40 and at 200 items."""
    rng = np.random.default_rng(3)
    for items in (40, 200):
        held = 0
        for _ in range(400):
            mine = rng.random(items) < 0.6
            theirs = np.where(rng.random(items) < 0.5, mine, rng.random(items) < 0.6)  # kappa is 0.5
            names = {True: "accept", False: "reject"}
            table: dict[tuple[str, str], int] = {}
            for one, other in zip(mine, theirs, strict=True):
                key = names[bool(one)], names[bool(other)]
                table[key] = table.get(key, 0) + 1
            kappa = ReviewerAgreement(("a", "b"), items, int((mine == theirs).sum()), table).kappa
            held += kappa is not None and kappa["low"] <= 0.5 <= kappa["high"]
        assert held / 400 >= 0.9, (items, held)


def test_clopper_and_pearson() -> None:
    assert statistics.interval(0, 10) == pytest.approx((0.0, 0.3085), abs=1e-4)
    assert statistics.interval(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert statistics.interval(0, 0) == (0.0, 1.0) and statistics.clopper_pearson_upper(3, 3, 0.95) == 1.0
