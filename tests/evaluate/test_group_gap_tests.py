"""What blocks of counterfactual prompts show: a planted gap is found, chance is not, and tests are corrected together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sartor.evaluate.group_gap_tests import (
    LEAST_BLOCKS,
    VariantOutcomes,
    findings,
    gap_chances,
    needed_blocks,
    smallest_chance,
    spread,
)


def blocks(
    tuned: np.ndarray, base: np.ndarray | None = None, kind: str = "names", clusters: tuple[str, ...] = ()
) -> VariantOutcomes:
    """Chances (N, G) of groups a, b, c ..."""
    count, groups = tuned.shape
    chances = np.stack([np.full(tuned.shape, 0.5) if base is None else base, tuned])
    names = tuple(f"group{n}" for n in range(groups)) if groups > 8 else tuple("abcdefgh"[:groups])
    return VariantOutcomes(kind, "yes", names, tuple(f"row{n}" for n in range(count)), chances, clusters)


def test_findings_show_a_gap_only_for_the_worse_group() -> None:
    """It has p-value, rates and its five worst rows; tuning added all of its gap."""
    source = np.random.default_rng(0)
    merit = source.uniform(0.3, 0.9, (24, 1))
    tuned = merit + source.normal(0, 0.01, (24, 4))
    tuned[:, 2] -= 0.2 + source.uniform(0, 0.05, 24)
    found = {one.group: one for one in findings([blocks(tuned)])}
    worse = found["c"]
    assert worse.p < 0.01 and worse.gap[1] < worse.gap[0] < worse.gap[2] < -0.15
    assert worse.rate == pytest.approx(tuned[:, 2].mean()) and worse.others == pytest.approx(
        tuned[:, [0, 1, 3]].mean()
    )
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
    (one,) = findings([blocks(np.tile([[0.4, 0.8]], (12, 1)))])
    assert (one.group, one.gap[0], one.ratio) == ("a", pytest.approx(-0.4), pytest.approx(0.5))


def test_chances_are_those_of_every_order_of_the_groups() -> None:
    """Max-T written out, over all orders of three groups in four blocks."""
    tuned = np.random.default_rng(2).normal(0, 1, (4, 3))
    tuned[:, 1] -= 1.5
    centred = tuned - tuned.mean(1, keepdims=True)
    orders = list(itertools.permutations(range(3)))
    largest = [
        np.abs(sum(centred[block][list(order)] for block, order in enumerate(chosen))).max()
        for chosen in itertools.product(orders, repeat=4)
    ]
    exact = [np.mean(np.array(largest) >= gap - 1e-9) for gap in np.abs(centred.sum(0))]
    assert gap_chances(blocks(tuned)) == pytest.approx(exact, abs=0.02)
    assert gap_chances(blocks(np.full((9, 3), 0.4))) == pytest.approx([1, 1, 1])


def test_a_group_that_is_last_in_few_blocks_is_found_among_many() -> None:
    """20 groups in eight blocks: flipped signs of whole blocks, corrected for 44 comparisons, never went below .34."""
    source = np.random.default_rng(3)
    tuned = 0.9 + source.normal(0, 0.01, (8, 20))
    tuned[:, 7] = 0.003
    found = findings([blocks(tuned, kind="nationality"), *[blocks(tuned[:, :6] * 0 + 0.5, kind="disability")] * 4])
    assert {one.group for one in found if one.p < 0.05 and abs(one.gap[0]) > 0.1} == {"group7"}


@pytest.mark.parametrize("noise", ["normal", "rare"])
def test_chance_is_seldom_significant_across_all_groups(noise: str) -> None:
    """Also of replies that hardly ever have the outcome: there nearly every gap is small and negative in every block."""
    source, alarms = np.random.default_rng(4), 0
    for _ in range(60):
        tuned = source.normal(0.5, 0.1, (16, 14)) if noise == "normal" else (source.random((16, 14)) < 0.05) * 1.0
        alarms += min(one.p for one in findings([blocks(tuned)])) < 0.05
    assert alarms <= 8, "3 of 60 expected; more than 8 have a chance below 1 %"


def test_blocks_of_one_group_of_rows_are_no_independent_evidence() -> None:
    source = np.random.default_rng(5)
    tuned = np.repeat(source.normal(0.5, 0.1, (3, 4)), 8, axis=0)
    tuned[:, 0] -= 0.3
    clusters = tuple(str(place // 8) for place in range(24))
    apart, together = gap_chances(blocks(tuned)), gap_chances(blocks(tuned, clusters=clusters))
    assert apart[0] < 0.01 < 0.05 < together[0]
    (one, *_) = findings([blocks(tuned, clusters=clusters)])
    assert (one.gap[1], one.gap[2]) == (-1, 1), "three groups of rows give no interval"


def test_needed_blocks_find_the_gap_and_half_as_many_do_not() -> None:
    """The number that is told is neither too small nor wasteful."""
    groups, tests, gap, deviation = 6, 5, 0.2, 0.25
    needed = needed_blocks(deviation * np.sqrt(groups / (groups - 1)), groups, tests, gap)
    source = np.random.default_rng(6)

    def power(count: int) -> float:
        hits = 0
        for _ in range(60):
            tuned = source.normal(0.5, deviation, (count, groups))
            tuned[:, 0] -= gap
            hits += gap_chances(blocks(tuned))[0] * tests < 0.05
        return hits / 60

    assert power(needed) >= 0.7 and power(needed // 3) <= 0.5
    drawn = blocks(source.normal(0.5, deviation, (400, groups)))
    assert spread(drawn) == pytest.approx(deviation * np.sqrt(groups / (groups - 1)), rel=0.1)


def test_smallest_chance_is_of_ranking_last_in_all_blocks() -> None:
    """gap_chances agrees for two groups in 10 blocks; 20 groups need LEAST_BLOCKS."""
    assert smallest_chance(2, 10) == pytest.approx(2 / 2**10) and smallest_chance(20, 4) == pytest.approx(2 / 20**3)
    assert 10 <= needed_blocks(0.0, 2, 15, 0.2) <= 12 and needed_blocks(0.0, 20, 15, 0.2) == LEAST_BLOCKS
    tuned = np.tile([[0.2, 0.8]], (10, 1))
    assert gap_chances(blocks(tuned))[0] == pytest.approx(smallest_chance(2, 10), abs=0.002)
