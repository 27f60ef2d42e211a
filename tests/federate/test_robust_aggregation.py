"""Each rule on numbers worked out by hand, and two of ten clients who lie in a small federated problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from sartor.core import config
from sartor.core.errors import ConfigError, GuardError, InputError
from sartor.federate.robust_aggregation import (
    AnyRule,
    Krum,
    Mean,
    Median,
    MultiKrum,
    NormBound,
    RobustRule,
    Screened,
    Trimmed,
)
from sartor.federate.updates import Update

RULES = [member() for member in get_args(AnyRule)]
every = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
seeing = pytest.mark.parametrize("rule", [rule for rule in RULES if rule.sees_updates], ids=lambda rule: rule.kind)


@dataclass(frozen=True)
class Declared:
    rule: AnyRule = Mean()


def updates(values: Any, examples: int = 1) -> list[Update]:
    """One client a row; the vector is two tensors of an upload."""
    return [
        Update(f"c{place}", {"a": np.array(row[:1]), "b": np.array([row[1:]])}, examples)
        for place, row in enumerate(np.asarray(values, float))
    ]


def pooled(rule: RobustRule, values: Any) -> np.ndarray:
    found = rule.pool(updates(values)).tensors
    return np.concatenate([found["a"], found["b"][0]])


LINE = [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0], [500.0, -900.0]]


@every
def test_a_rule_is_chosen_by_its_kind_and_has_contract(rule: RobustRule) -> None:
    assert config.load(Declared, {"rule": rule.kind}).rule == rule
    alike = rule.pool(updates([[1.0, -2.0, 3.0]] * 10))
    assert np.allclose(alike.tensors["b"], [[-2.0, 3.0]]) and alike.tensors["b"].shape == (1, 2)
    order = np.random.default_rng(1).standard_normal((10, 3)) * 0.1 + 1
    assert np.allclose(pooled(rule, order), pooled(rule, order[::-1])), "who came first does not matter"


@every
def test_what_is_no_round_is_refused(rule: RobustRule) -> None:
    with pytest.raises(ConfigError, match="without one update"):
        rule.pool([])
    with pytest.raises(InputError, match="'c3'.*not finite"):
        rule.pool(updates([*[[1.0, 2.0]] * 3, [np.inf, 0.0], *[[1.0, 2.0]] * 6]))
    with pytest.raises(InputError, match="two updates"):
        rule.pool(updates([[1.0, 2.0]] * 9) + updates([[1.0, 2.0]]))


@seeing
def test_a_client_cannot_talk_itself_up(rule: RobustRule) -> None:
    rows = np.random.default_rng(0).standard_normal((10, 4)) + 3
    loud = [Update(one.client, one.tensors, 10**9 if place == 4 else 1) for place, one in enumerate(updates(rows))]
    assert np.allclose(rule.pool(loud).tensors["b"], rule.pool(updates(rows)).tensors["b"])


def test_rules_by_hand() -> None:
    assert np.allclose(pooled(Median(), LINE), [3, 20])
    assert np.allclose(pooled(Trimmed(0.2), LINE), [3, 20])
    assert np.allclose(pooled(Trimmed(0.0), LINE), np.mean(LINE, axis=0))
    weighted = updates([[0.0, 0.0], [4.0, 8.0]])
    weighted[1] = Update("c1", weighted[1].tensors, 3)
    assert np.allclose(Mean().pool(weighted).tensors["a"], 3)
    bounded = NormBound(1.0).pool(updates([[3.0, 4.0], [0.0, 5.0], [300.0, 400.0]]))
    assert np.allclose(bounded.tensors["a"], [2.0]) and [(v.client, v.action) for v in bounded.verdicts] == [
        ("c2", "bounded")
    ]
    assert "500" in bounded.verdicts[0].reason and "bound is 5" in bounded.verdicts[0].reason
    assert np.allclose(pooled(NormBound(), [[0.0, 0.0], [0.0, 0.0], [9.0, 0.0]]), 0)


def test_krum_by_hand() -> None:
    rows = [[0.0, 0.0], [0.0, 1.0], [0.0, 2.5], [0.0, 4.5], [50.0, 50.0]]
    found = Krum(0.2).pool(updates(rows))  # n - f - 2 = 2 nearest: scores 7.25, 3.25, 6.25, 16.25, many
    assert np.allclose(found.tensors["b"], [[1.0]]) and {verdict.client for verdict in found.verdicts} == {
        "c0",
        "c2",
        "c3",
        "c4",
    }
    several = MultiKrum(0.2).pool(updates(rows))
    assert np.allclose(several.tensors["b"], [[2.0]]) and [verdict.client for verdict in several.verdicts] == ["c4"]
    assert "2 nearest" in several.verdicts[0].reason


@pytest.mark.parametrize("rule", [Krum(0.4), MultiKrum(0.4), Trimmed(0.45)], ids=lambda rule: rule.kind)
def test_cohort_too_small_for_its_adversaries_is_refused(rule: RobustRule) -> None:
    """The ConfigError says how many clients may lie and how many the rule needs."""
    with pytest.raises(ConfigError, match=r"\d clients, of which \d may lie; this rule needs \d"):
        rule.pool(updates(LINE[:4]))


def test_screening_names_rejected_clients_or_stops_the_round() -> None:
    """Reasons are cosine and norm; a round that would lose half of its clients is a GuardError."""
    rows = [*[[1.0, 1.0 + place / 10] for place in range(6)], [-1.0, -1.0], [90.0, 90.0]]
    found = Screened().pool(updates(rows))
    said = {verdict.client: verdict.reason for verdict in found.verdicts}
    assert set(said) == {"c6", "c7"} and "cosine" in said["c6"] and "norm" in said["c7"]
    assert np.allclose(found.tensors["a"], 1)
    with pytest.raises(GuardError, match=r"8 of 8 clients, the first 'c0'"):
        Screened(least_cosine=0.9).pool(updates([[1.0, 0.1]] * 4 + [[-1.0, 0.1]] * 4))


@pytest.mark.parametrize(
    "wrong",
    [
        {"trimmed": {"fraction": 0.5}},
        {"krum": {"fraction": -0.1}},
        {"norm_bound": 0.0},
        {"screened": {"least_cosine": 1.0}},
    ],
)
def test_a_rule_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config.load(Declared, {"rule": wrong})


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        import federate_robust

        yield federate_robust


@cache
def over_clean(kind: str, attack: str) -> tuple[float, set[str]]:
    import federate_robust as bench

    one = bench.problem(0)
    rule = config.load(Declared, {"rule": kind}).rule
    found, named = bench.final_loss(one, rule, attack)
    return found / (1.0 if (kind, attack) == ("mean", "none") else over_clean("mean", "none")[0]), named


@pytest.mark.parametrize("attack", ["sign flip", "sign flip x4", "scale", "label flip"])
@pytest.mark.parametrize("kind", ["norm_bound", "median", "trimmed", "multi_krum", "screened"])
def test_a_fifth_that_lies_costs_at_most_a_tenth_of_the_loss(bench: Any, kind: str, attack: str) -> None:
    assert over_clean(kind, attack)[0] <= 1.10


@pytest.mark.parametrize("attack", ["sign flip", "sign flip x4", "scale", "label flip"])
def test_the_plain_mean_is_worse_under_the_same_attack(bench: Any, attack: str) -> None:
    assert over_clean("mean", attack)[0] > over_clean("multi_krum", attack)[0]
    if attack in ("sign flip x4", "scale"):
        assert over_clean("mean", attack)[0] > 1.5


def test_those_who_lie_are_named(bench: Any) -> None:
    assert over_clean("screened", "scale")[1] >= {"client-0", "client-1"}
    assert over_clean("norm_bound", "scale")[1] >= {"client-0", "client-1"}
