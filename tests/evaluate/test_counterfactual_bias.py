"""Prompts that differ in a group alone, and which replies are outcomes."""

from __future__ import annotations

import re

import pytest

import sartor
from sartor.core.errors import ConfigError
from sartor.evaluate.audit import counterfactual_bias
from sartor.evaluate.audit.counterfactual_bias import outcomes_of
from sartor.text.demographics.group_terms import KINDS, groups, mentions


def row(*turns: str, id: str = "1") -> sartor.Example:
    """User and assistant by turns, after a system prompt that names somebody too."""
    said = [sartor.Message.of("system", "You are Emily, a clerk.")]
    said += [sartor.Message.of(("user", "assistant")[place % 2], text) for place, text in enumerate(turns)]
    return sartor.Example(tuple(said), (sartor.Origin("test", id),))


@pytest.mark.parametrize("scenario", counterfactual_bias.TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_templates_cover_all_groups_and_blocks_vary_in_merit(scenario: str, kind: str) -> None:
    """Within a block only the group differs; system prompt, merit and question are the same."""
    made = counterfactual_bias.templates(scenario, kind, "Decide.")  # type: ignore[arg-type]
    assert made.left_out == 0 and len(made.blocks) >= counterfactual_bias.LEAST_OF_TEMPLATES
    for block in made.blocks:
        texts = [prompt[-1].text for prompt in block.variants]
        assert len(set(texts)) == len(groups(kind)) == len(texts)  # type: ignore[arg-type]
        assert {prompt[0].text for prompt in block.variants} == {"Decide."}
        ends = {text[text.index(". ") :] for text in texts}
        assert len(ends) == 1, "the merit and the question are the same"
    merits = {re.split(r"\. ", block.variants[0][-1].text, maxsplit=1)[1] for block in made.blocks}
    assert len(merits) == len(made.blocks)


def test_prompt_variants_replace_the_group_in_all_turns() -> None:
    """The system prompt stays as it is; a row that mentions no group is no block."""
    talk = row("Emily asks for a loan.", "How much?", "Emily wants 500.", "approved")
    made = counterfactual_bias.own_prompts([talk, row("A loan of 500.", "denied", id="2")], "names")
    (block,) = made.blocks
    assert block.id == talk.id and (made.left_out, made.beyond) == (0, 0)
    other = block.variants[groups("names").index("black_male")]
    name = mentions(other[1].text, "names")[0].text
    assert [message.text for message in other] == [
        "You are Emily, a clerk.",
        f"{name} asks for a loan.",
        "How much?",
        f"{name} wants 500.",
    ]
    assert block.variants[groups("names").index("white_female")] == talk.prompt


def test_own_prompts_count_omitted_rows_and_ignore_order() -> None:
    """left_out counts prompts without a variant for each group, beyond those over the sample size."""
    made = counterfactual_bias.own_prompts([row("He told her that they met.", "yes")], "pronouns")
    assert (made.blocks, made.left_out) == ((), 1)
    many = [row(f"Emily asks for {place} pounds.", "yes", id=str(place)) for place in range(40)]
    one, other = counterfactual_bias.own_prompts(many, "names"), counterfactual_bias.own_prompts(many[::-1], "names")
    assert one == other and one.beyond == 40 - len(one.blocks) > 0
    same = [row(f"{name} asks for 5 pounds.", "yes") for name in ("Emily", "Laurie")]
    twins = counterfactual_bias.own_prompts([*same, row("Carrie asks for 5 pounds.", "yes")], "names")
    assert len(twins.blocks) == 3 and len(counterfactual_bias.own_prompts([*same, same[0]], "names").blocks) == 2


def test_outcomes_are_told_by_few_whole_replies_or_by_a_field() -> None:
    found = outcomes_of(["approved", "denied"] * 6)
    assert found and (found.field, found.classes, found.favourable, found.is_whole) == (
        ".",
        ("approved", "denied"),
        ("approved",),
        True,
    )
    assert found.looked_at == [("approved",)]
    assert outcomes_of([f"Answer {place}." for place in range(40)]) is None, "free text decides nothing"
    assert outcomes_of(["approved", "denied"]) is None, "two rows are no sign that replies are classes"
    said = outcomes_of(['{"risk": "a"}', '{"risk": "b"}', '{"risk": "c"}'], "risk")
    assert said and not said.is_whole and said.looked_at == [("a",), ("b",), ("c",)]
    wished = outcomes_of(['{"risk": "a"}', '{"risk": "b"}'], "risk", ["b"])
    assert wished and wished.looked_at == [("b",)]
    with pytest.raises(ConfigError, match="no reference says 'x', which --favourable names"):
        outcomes_of(["approved", "denied"] * 6, "", ["x"])
    with pytest.raises(ConfigError, match="no reference has the field 'risk'"):
        outcomes_of(["approved"], "risk")
