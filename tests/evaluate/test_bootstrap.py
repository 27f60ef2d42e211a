"""Intervals cover what they claim, and scorers score."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from sartor.core.splits import LEAST_GROUPS
from sartor.evaluate import bootstrap
from sartor.evaluate.scorers import exact_match, f1


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        base = (rng.random(120) < 0.3).astype(float)
        tuned = (rng.random(120) < 0.6).astype(float)
        found = bootstrap.paired_bootstrap(base, tuned, [str(n) for n in range(120)], seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert covered >= 52  # 57 of 60 expected; below 52 with probability under 1 %


def test_rows_of_one_group_do_not_count_as_independent() -> None:
    rng = np.random.default_rng(1)
    by_group = rng.random(12) < 0.5
    tuned = np.repeat(by_group, 20).astype(float)
    base = np.zeros(240)
    alone = bootstrap.paired_bootstrap(base, tuned, [str(n) for n in range(240)])
    grouped = bootstrap.paired_bootstrap(base, tuned, [str(n // 20) for n in range(240)])
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)


def test_verdicts() -> None:
    groups = [str(n) for n in range(50)]
    better = bootstrap.paired_bootstrap([0.0] * 50, [1.0] * 50, groups)
    assert (better.verdict(), better.difference) == ("better", 1.0)
    assert better.verdict(higher_is_better=False) == "worse"
    assert bootstrap.paired_bootstrap([0.0, 1.0] * 25, [1.0, 0.0] * 25, groups).verdict() == "cannot tell"


def test_weights_make_a_mean_over_tokens() -> None:
    found = bootstrap.paired_bootstrap([1.0, 3.0], [1.0, 3.0], ["a", "b"], weights=[3.0, 1.0])
    assert found.base == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("reply", "reference", "exact", "overlap"),
    [
        ("yes", "yes ", 1, 1),
        ("Yes", "yes", 0, 1),
        ("", "", 1, 1),
        ("", "yes", 0, 0),
        ('{"a":"b c"}', '{"a":"b d"}', 0, 0.5),
        ("no", "yes", 0, 0),
    ],
)
def test_scorers(reply: str, reference: str, exact: float, overlap: float) -> None:
    assert exact_match(reply, reference) == exact
    assert f1(reply, reference) == pytest.approx(overlap, abs=0.2)


Draw = Callable[[np.random.Generator, int], np.ndarray]
# differences of groups with mean 0
NULLS: dict[str, Draw] = {
    "normal": lambda rng, count: rng.normal(size=count),
    "binary": lambda rng, count: rng.choice([-1.0, 1.0], count),
    "binary scores": lambda rng, count: (rng.random(count) < 0.4) * 1.0 - (rng.random(count) < 0.4),
    "rare binary": lambda rng, count: (rng.random(count) < 0.3) - 0.3,
    "heavy-tailed": lambda rng, count: rng.standard_t(2, count),
    "log-normal": lambda rng, count: rng.lognormal(0, 1, count) - math.exp(0.5),
}
GROUPS = (2, 3, 5, 8, 12, 20, 50)


def verdicts(draw: Draw, count: int, trials: int) -> tuple[float, float]:
    """Fractions of trials that say "better" and "worse" of `count` groups."""
    rng, said = np.random.default_rng(count), []
    names = [str(number) for number in range(count)]
    for _ in range(trials):
        differences = draw(rng, count)
        found = bootstrap.paired_bootstrap(np.zeros(count), differences, names)
        assert found.low <= found.difference <= found.high
        said.append(found.verdict())
    return said.count("better") / trials, said.count("worse") / trials


@pytest.mark.parametrize("name", NULLS)
@pytest.mark.parametrize("count", GROUPS)
def test_no_difference_is_seldom_told(name: str, count: int) -> None:
    """At a nominal 2.5 % on either side. More than 13 of 200 have a chance below 0.1 % at 2.5 %, and 12 % at 5 %."""
    assert max(verdicts(NULLS[name], count, 200)) <= 13 / 200


@pytest.mark.circle
@pytest.mark.parametrize("name", NULLS)
@pytest.mark.parametrize("count", GROUPS)
def test_no_difference_is_told_at_most_in_three_of_100(name: str, count: int) -> None:
    assert max(verdicts(NULLS[name], count, 2_000 if count > 5 else 200)) <= 0.03


@pytest.mark.parametrize(
    ("count", "effect", "least"), [(8, 4.0, 0.8), (12, 2.0, 0.75), (20, 1.25, 0.75), (50, 0.75, 0.9)]
)
def test_an_effect_is_still_told(count: int, effect: float, least: float) -> None:
    """effect: in standard deviations of a group's difference."""
    better, worse = verdicts(lambda rng, groups: rng.normal(effect, 1, groups), count, 100)
    assert better >= least and worse == 0


def test_replies_are_told_as_exactly_as_by_mcnemar() -> None:
    """Of right and wrong replies: at 0 the test is that of flipped signs alone, whatever has not changed."""
    for count, better in ((6, 6), (20, 6), (60, 8)):
        gained = bootstrap.paired_bootstrap(
            [0.0] * count, [1.0] * better + [0.0] * (count - better), [str(n) for n in range(count)]
        )
        assert gained.verdict() == "better"
        short = bootstrap.paired_bootstrap(
            [0.0] * count, [1.0] * 5 + [0.0] * (count - 5), [str(n) for n in range(count)]
        )
        assert short.verdict() == "cannot tell", "of five flips one in 32 is as extreme"
    mixed = [1.0] * 12 + [-1.0] * 2 + [0.0] * 26  # McNemar's exact p is .0129, two-sided
    assert bootstrap.paired_bootstrap([0.0] * 40, mixed, [str(n) for n in range(40)]).verdict() == "better"
    mixed[:3] = [-1.0, 0.0, 0.0]  # 9 against 3: .146
    assert bootstrap.paired_bootstrap([0.0] * 40, mixed, [str(n) for n in range(40)]).verdict() == "cannot tell"


@pytest.mark.parametrize("count", range(1, 6))
def test_under_six_groups_nothing_can_be_told(count: int) -> None:
    found = bootstrap.paired_bootstrap([0.0] * count, [1.0] * count, [str(number) for number in range(count)])
    assert (found.low, found.high, found.verdict()) == (-1.0, 1.0, "cannot tell")
    assert bootstrap.groups_needed(found.difference, found.low, found.high, count) >= LEAST_GROUPS == 6


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.8])
def test_the_interval_covers_a_true_difference_of_few_groups(chance: float) -> None:
    """A share of groups is mended, the rest stays as it was: the interval is not only right about 0."""
    rng = np.random.default_rng(4)
    for count in (8, 20, 50):
        names, missed = [str(number) for number in range(count)], [0, 0]
        for _ in range(150):
            found = bootstrap.paired_bootstrap(np.zeros(count), (rng.random(count) < chance) * 1.0, names)
            missed = [missed[0] + (found.low > chance), missed[1] + (found.high < chance)]
        assert max(missed) <= 10, "3.75 expected at a nominal 2.5 %; more than 10 with probability 0.2 %"


def test_groups_of_unlike_size_are_judged_by_the_mean_over_rows() -> None:
    """The interval is of the estimate that is told, and no more eager than the level."""
    sizes = np.array([1, 1, 2, 3, 5, 8, 8, 5, 3, 2, 4, 6])
    names = [str(number) for number in np.repeat(np.arange(12), sizes)]
    rng, told = np.random.default_rng(9), 0
    for _ in range(300):
        differences = np.repeat(rng.normal(size=12), sizes)
        found = bootstrap.paired_bootstrap(np.zeros(len(names)), differences, names)
        assert found.difference == pytest.approx(differences.mean())
        told += found.verdict() != "cannot tell"
    assert told <= 24, "15 expected at a nominal 5 %"
    better = bootstrap.paired_bootstrap(np.zeros(len(names)), np.repeat(rng.normal(4, 1, 12), sizes), names)
    assert better.low > 0


def test_what_most_groups_share_may_hide_others() -> None:
    """Eight groups that all lost a little: one in three of such groups may have gained, and was not drawn."""
    found = bootstrap.paired_bootstrap([0.3] * 8, [0.0] * 8, list("abcdefgh"))
    assert found.verdict() == "cannot tell"
    hidden = 1 - 0.025 ** (1 / 8)
    assert found.high == pytest.approx(-0.3 * (1 - hidden) + hidden)
    losses = bootstrap.paired_bootstrap([0.3] * 8, [0.0] * 8, list("abcdefgh"), is_bounded=False)
    assert losses.verdict() == "worse", "of a loss nobody knows how much it may gain"


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("groups", [2, 8, 20])
def test_what_is_no_number_is_never_better(broken: float, groups: int) -> None:
    found = bootstrap.paired_bootstrap(
        [2.0] * groups, [1.0] * (groups - 1) + [broken], [str(n) for n in range(groups)], is_bounded=False
    )
    assert found.verdict() == found.verdict(higher_is_better=False) == "cannot tell"
    assert (found.low, found.high) == (-math.inf, math.inf), "it is within no limit"
    by_hand = bootstrap.Comparison(2.0, broken, broken, math.nan, -1.0)
    assert by_hand.verdict(higher_is_better=False) == "cannot tell"


@pytest.mark.parametrize("noise", [1e-4, 0.01])
@pytest.mark.parametrize("count", [7, 10, 15])
def test_what_nearly_all_groups_share_may_hide_others_too(count: int, noise: float) -> None:
    """Nine of ten groups lose a little, one of ten gains as much as all of them lose: on average nothing."""

    def draw(rng: np.random.Generator, groups: int) -> np.ndarray:
        return np.where(rng.random(groups) < 0.1, 0.45, -0.05) + rng.normal(0, noise, groups)

    assert max(verdicts(draw, count, 60)) <= 6 / 60, (
        "more than 6 have a chance of 0.2 % at 2.5 %; it was 15 to 30 % once"
    )
