"""Intervals cover what they claim, and scorers score."""

from __future__ import annotations

import numpy as np
import pytest

from sartor.evaluate import compare
from sartor.evaluate.scorers import exact_match, f1


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        base = (rng.random(120) < 0.3).astype(float)
        tuned = (rng.random(120) < 0.6).astype(float)
        found = compare.paired(base, tuned, [str(n) for n in range(120)], seed=trial)
        covered += found.low <= 0.3 <= found.high
    assert covered >= 52  # 57 of 60 expected; below 52 with probability under 1 %


def test_rows_of_one_group_do_not_count_as_independent() -> None:
    rng = np.random.default_rng(1)
    by_group = rng.random(12) < 0.5
    tuned = np.repeat(by_group, 20).astype(float)
    base = np.zeros(240)
    alone = compare.paired(base, tuned, [str(n) for n in range(240)])
    grouped = compare.paired(base, tuned, [str(n // 20) for n in range(240)])
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)


def test_verdicts() -> None:
    groups = [str(n) for n in range(50)]
    better = compare.paired([0.0] * 50, [1.0] * 50, groups)
    assert (better.verdict(), better.difference) == ("better", 1.0)
    assert better.verdict(higher_is_better=False) == "worse"
    assert compare.paired([0.0, 1.0] * 25, [1.0, 0.0] * 25, groups).verdict() == "cannot tell"


def test_one_group_gives_no_interval() -> None:
    found = compare.paired([0.0], [1.0], ["g"])
    assert (found.low, found.high, found.verdict()) == (-1.0, 1.0, "cannot tell")


def test_weights_make_a_mean_over_tokens() -> None:
    found = compare.paired([1.0, 3.0], [1.0, 3.0], ["a", "b"], weights=[3.0, 1.0])
    assert found.base == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("reply", "reference", "exact", "overlap"),
    [("yes", "yes ", 1, 1), ("Yes", "yes", 0, 1), ("", "", 1, 1), ("", "yes", 0, 0), ('{"a":"b c"}', '{"a":"b d"}', 0, 0.5),
     ("no", "yes", 0, 0)],
)  # fmt: skip
def test_scorers(reply: str, reference: str, exact: float, overlap: float) -> None:
    assert exact_match(reply, reference) == exact
    assert f1(reply, reference) == pytest.approx(overlap, abs=0.2)
