"""`rules` drop and replace as a person's regular expressions say; mistakes are found when the recipe is read."""

from __future__ import annotations

import time
from typing import Any

import pytest

from rows import applied, reason, row, step_of
from sartor.core.config import dump, load
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, Message
from sartor.curate.recipe import CurateRecipe
from sartor.curate.steps.regex_rules import RegexRules


def rules(*found: dict[str, Any]) -> RegexRules:
    """The step with some rules."""
    return step_of(RegexRules, rules=list(found))  # type: ignore[no-any-return]


def texts_after(step: RegexRules, example: Example) -> list[str]:
    """The texts of the messages after the step."""
    outcome = applied(step, example)
    assert isinstance(outcome, Example)
    return [message.text for message in outcome.messages]


def test_a_drop_says_which_rule_and_what_matched() -> None:
    step = rules({"match": "never"}, {"match": r"(?i)lorem\s+ipsum", "name": "filler"})
    drop = applied(step, row("q", "Some LOREM  ipsum here"))
    assert (
        isinstance(drop, Drop)
        and (drop.reason, drop.step) == ("rule:filler", "rules")
        and "LOREM  ipsum" in drop.detail
    )
    assert reason(step, row("q", "never")) == "rule:1"
    assert reason(step, row("q", "fine")) == ""


def test_a_field_is_looked_at_alone() -> None:
    example = row("be X", "X?", "no", "X", roles=("system", "user", "assistant", "assistant"))
    for field, expected in (("system", 0), ("prompt", 1), ("reply", 3)):
        assert (
            texts_after(rules({"match": "X", "action": "replace", "with": "Y", "field": field}), example)[
                expected
            ].count("Y")
            == 1
        )
    assert texts_after(rules({"match": "X|no", "action": "replace", "with": "Y", "field": "replies"}), example) == [
        "be X",
        "X?",
        "Y",
        "Y",
    ]
    assert texts_after(rules({"match": "X", "action": "replace", "with": "Y"}), example) == ["be Y", "Y?", "no", "Y"]


def test_replacement_uses_groups_and_feeds_the_next_rule() -> None:
    step = rules(
        {"match": r"(\w+) (?P<last>\w+)", "action": "replace", "with": r"\g<last> \1"},
        {"match": "^bar", "action": "replace", "with": "BAR"},
    )
    assert texts_after(step, row("q", "foo bar")) == ["q", "BAR foo"]


def test_an_unmatched_row_is_the_very_same_object() -> None:
    example = row("q", "a")
    assert applied(rules({"match": "b", "action": "replace"}), example) is example


def test_replacement_that_leaves_nothing_drops_the_row() -> None:
    """An emptied system message is removed without dropping its row."""
    step = rules({"match": "promo", "action": "replace"})
    assert reason(step, row("q", " promo ")) == "nothing_left"
    assert reason(step, row("promo", "a")) == "nothing_left"
    assert reason(step, row("q", "a", rejected=(Message.of("assistant", "promo"),))) == "nothing_left"
    assert texts_after(step, row("promo", "q", "a", roles=("system", "user", "assistant"))) == ["q", "a"]


def test_a_pattern_that_backtracks_without_end_is_a_counted_drop(impatient: float) -> None:
    step = rules({"match": "(.*?,){25}x"})
    started = time.process_time()
    assert reason(step, row("q", "," * 80)) == "rule_timeout"
    assert time.process_time() - started < 5 * impatient
    assert reason(step, row("q", "a, b")) == ""


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"match": "a("}, "character 3"),
        ({"match": "[a"}, "unterminated"),
        ({"match": "*"}, "nothing to repeat"),
        ({"match": "(a)", "action": "replace", "with": r"\2"}, "group"),
        ({"match": "(?i)(a)", "action": "replace", "with": r"\g<x>"}, "group"),
        ({"match": ""}, "empty"),
        ({"match": "a", "with": "b"}, "action: replace"),
        ({"match": "a", "action": "remove"}, "drop | replace"),
        ({"match": "a", "name": "A B"}, "name"),
        ({"match": "a", "wiht": "b"}, "with"),
        ({"action": "drop"}, "match"),
    ],
)
def test_invalid_rule_is_refused_with_its_position(rule: dict[str, str], said: str) -> None:
    """Loading the recipe raises ConfigError, which names steps[1].rules[1]."""
    recipe = {"sources": [{"path": "x"}], "steps": ["length", {"rules": [{"match": "fine"}, rule]}]}
    with pytest.raises(ConfigError) as caught:
        load(CurateRecipe, recipe)
    assert said in str(caught.value) and "steps[1].rules[1]" in str(caught.value)


def test_a_rule_comes_back_from_a_manifest_as_it_was() -> None:
    step = rules({"match": "(a)", "action": "replace", "with": r"\1"}, {"match": "b"})
    assert dump(step)["rules"][0]["with"] == r"\1"
    assert load(RegexRules, dump(step)) == step


def test_tool_calls_are_not_touched() -> None:
    turn = Message("assistant", (), tool_calls='[{"promo": 1}]')
    example = Example((Message.of("user", "q"), turn), row("q", "a").origins)
    assert applied(rules({"match": "promo", "action": "replace"}), example) is example
