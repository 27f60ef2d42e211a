"""The acceptance of a person's adapter, by a device's rule and by a server's: what cannot be told never passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sartor.core.errors import SourceError
from sartor.edge.owner.adaptation import AdaptationSettings
from sartor.evaluate import training_facts
from sartor.learn import personal_tuning
from sartor.learn.personal_tuning import acceptance_rule, gate_fields
from sartor.personalization.acceptance import (
    AcceptanceResult,
    AcceptanceRule,
    JudgedRows,
    PairedLosses,
    accept,
    too_few_rows,
)
from sartor.serving.team_config import PersonalTerms
from sartor.tune.recipe import Data

DEVICE, SERVER = AdaptationSettings("faq", Path()).rule, acceptance_rule(PersonalTerms())
BETTER, SAME = [1.0] * 8, [2.0] * 8

both = pytest.mark.parametrize("rule", [DEVICE, SERVER], ids=["device", "server"])


def pair(after: Sequence[float], tokens: Sequence[int] = ()) -> PairedLosses:
    """Losses after a tuning, of rows in groups of their own; before, each was 2."""
    rows: list[Any] = [SimpleNamespace(supervised_tokens=count) for count in tokens or [5] * len(after)]
    return PairedLosses(JudgedRows(rows, [str(index) for index in range(len(after))]), [2.0] * len(after), after)


def result(private: Sequence[float], probe: Sequence[float], rule: AcceptanceRule) -> AcceptanceResult:
    return accept(pair(private), pair(probe), rule)


def test_losses_are_weighted_by_tokens() -> None:
    comparison = pair([1.0] * 8 + [2.0] * 8, [3] * 8 + [1] * 8).compare()
    assert (comparison.base, comparison.tuned, comparison.difference) == (2.0, 1.25, -0.75)


@both
def test_a_loss_that_is_no_number_does_not_pass(rule: AcceptanceRule) -> None:
    assert result(BETTER, SAME, rule).why == ""
    assert result([*BETTER[1:], math.nan], SAME, rule).why
    assert result(BETTER, [*SAME[1:], math.nan], rule).why


def test_own_rows_must_improve_on_a_device_alone() -> None:
    assert result(SAME, SAME, SERVER).why == ""
    assert result(SAME, SAME, DEVICE).why.startswith("on the person's own rows: cannot tell (")
    assert result([2.5] * 8, SAME, DEVICE).why.startswith("on the person's own rows: worse (+")
    refusal = "on the person's own rows it may be worse by 0.500 nats a token; the limit is 0.05"
    assert result([2.5] * 8, SAME, SERVER).why == refusal


@both
def test_a_probe_that_got_worse_is_refused_with_numbers(rule: AcceptanceRule) -> None:
    refusal = f"on 8 rows of the probe it may be worse by 0.500 nats a token; the limit is {rule.probe_max_nats:g}"
    assert result(BETTER, [2.5] * 8, rule).why == refusal


@both
def test_too_few_prompts_say_so_and_what_would_do(rule: AcceptanceRule) -> None:
    for prompts in (2, 5):
        too_few = f"the probe has {prompts} prompts, and 6 are the least that tell"
        reason = result(BETTER, [2.0] * prompts, rule).why
        assert reason == f"cannot tell whether the probe's loss has risen: {too_few}: {rule.more_probe}"
    assert result(BETTER, [2.0] * 6, rule).why == ""
    drifted = [2.0 + 0.001 * index for index in range(training_facts.CANARIES)]
    assert result(BETTER, drifted, rule).why == ""


@both
def test_a_probe_is_checked_before_anything_is_tuned(rule: AcceptanceRule) -> None:
    assert rule.probe_problem(list("abcdef")) == ""
    assert rule.probe_problem(list("abcdaa")).startswith("the probe has 4 prompts, and 6 are the least that tell: ")
    assert AcceptanceRule(0.0, 1.0, "").probe_problem(list("ab")) == "", "so wide a limit holds for two"


def test_a_server_raises_for_a_probe_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = SimpleNamespace(base=SimpleNamespace(chat=None), recipe=SimpleNamespace(data=Data("rows")))
    release: Any = SimpleNamespace(path=tmp_path, manifest={"canaries": []})
    stack: Any = SimpleNamespace(resident=base)
    for groups, problem in (("a", "has 1 held-out rows that can be used here"), ("abcd", "the probe has 4 prompts")):
        monkeypatch.setattr(
            personal_tuning, "encode_probe", lambda rows, chat, most, groups=groups: pair([2.0] * len(groups)).rows
        )
        with pytest.raises(SourceError, match=problem):
            personal_tuning.probe_rows(release, stack, SERVER)


def test_five_rows_and_six_held_out_prompts_are_enough() -> None:
    assert too_few_rows(5, list("abcdef")) == ""
    assert too_few_rows(4, list("abcdef")).startswith("4 rows to tune on and 6 held-out prompts are too few")
    assert too_few_rows(5, list("abcdee")).endswith("5 held-out prompts are too few: 5 and 6 are needed")


def test_gate_fields_are_those_of_the_registry() -> None:
    fields = gate_fields(result(BETTER, SAME, SERVER))
    assert list(fields) == ["own", "elsewhere", "verdict", "why", "unit"]
    assert (fields["own"]["tuned"], fields["elsewhere"]["tuned"], fields["verdict"]) == (1.0, 2.0, "better")
