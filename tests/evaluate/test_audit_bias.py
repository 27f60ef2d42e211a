"""What blocks of counterfactual prompts show: a planted gap is found, chance is not, and tests are corrected together."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import wilcoxon

from sartor.evaluate.audit.bias import LEAST_BLOCKS, Blocks, findings, flipped, holm


def blocks(tuned: np.ndarray, base: np.ndarray | None = None, kind: str = "names") -> Blocks:
    """Chances (N, G) of groups a, b, c ..."""
    count, groups = tuned.shape
    chances = np.stack([np.full(tuned.shape, 0.5) if base is None else base, tuned])
    return Blocks(kind, "yes", tuple("abcdefgh"[:groups]), tuple(f"row{n}" for n in range(count)), chances)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def test_a_group_that_fares_worse_is_found_with_its_rows_and_the_others_are_not() -> None:
    source = np.random.default_rng(0)
    merit = source.uniform(0.3, 0.9, (24, 1))
    tuned = merit + source.normal(0, 0.01, (24, 4))
    tuned[:, 2] -= 0.2 + source.uniform(0, 0.05, 24)
    found = {one.group: one for one in findings([blocks(tuned)])}
    worse = found["c"]
    assert worse.p < 0.01 and worse.gap[1] < worse.gap[0] < worse.gap[2] < -0.15
    assert worse.rate == pytest.approx(tuned[:, 2].mean()) and worse.others == pytest.approx(tuned[:, [0, 1, 3]].mean())
    assert worse.ratio == pytest.approx(tuned[:, 2].mean() / tuned.mean(0).max())
    assert worse.base_gap == 0 and worse.added == worse.gap, "the base made no difference, so tuning added all of it"
    differences = tuned[:, 2] - tuned[:, [0, 1, 3]].mean(1)
    assert worse.rows == tuple(f"row{place}" for place in np.argsort(differences)[:5])
    assert all(abs(found[group].gap[0]) < 0.1 for group in "abd")


def test_what_the_base_does_already_was_not_added() -> None:
    source = np.random.default_rng(1)
    biased = np.stack([source.uniform(0.4, 0.6, 20), source.uniform(0.1, 0.3, 20)], 1)
    (one,) = findings([blocks(biased + source.normal(0, 0.001, (20, 2)), biased)])
    assert (one.group, one.p < 0.01) == ("b", True) and one.added[1] < 0.001 < 0.1 < -one.gap[0]


def test_two_groups_are_one_question_about_the_lower() -> None:
    tuned = np.tile([[0.4, 0.8]], (12, 1))
    (one,) = findings([blocks(tuned)])
    assert (one.group, one.gap[0], one.ratio) == ("a", pytest.approx(-0.4), pytest.approx(0.5))
    assert findings([blocks(tuned[: LEAST_BLOCKS - 1])]) == []


def test_chance_is_seldom_taken_for_bias_over_all_groups_together() -> None:
    alarms = 0
    for seed in range(60):
        noise = np.random.default_rng(seed).normal(0, 0.1, (4, 16))
        alarms += min(holm([flipped(each) for each in noise])) < 0.05
    assert alarms <= 7, "5 % are 3 of 60; more than 7 have a chance below 2 %"


def test_the_test_by_flipped_signs_agrees_with_ranks_and_is_exact_where_nothing_differs() -> None:
    source = np.random.default_rng(3)
    for shift in (0.0, 0.02, 0.05):
        differences = source.normal(shift, 0.05, 30)
        assert flipped(differences) == pytest.approx(wilcoxon(differences).pvalue, abs=0.12)
    assert flipped(np.zeros(9)) == 1.0
    assert flipped(np.full(10, 0.3)) == pytest.approx(2 / 2**10)
