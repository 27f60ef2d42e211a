"""`boilerplate` takes out what very many rows share, says what, and leaves common answers and code alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from rows import applied, decided, document, reason, row, step_of
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example
from sartor.curate.steps.boilerplate import Boilerplate, RemoveLines

SIGNATURE = "Call our friendly team any time on 555-1234."
FOOTER = "We are the number one firm in town!"


def after(step: Boilerplate, examples: Sequence[Example]) -> list[str | Drop]:
    """The replies after the step: texts, or the Drops."""
    then = decided(step, examples).then
    outcomes = [then.open(None)(example) if then else example for example in examples]  # type: ignore[arg-type]
    return [outcome if isinstance(outcome, Drop) else outcome.reply for outcome in outcomes]


def firm_rows(count: int = 40) -> list[Example]:
    """Answers with a shared last sentence and a shared footer line, among as many without."""
    with_it = [row(f"q{n}", f"Part {n} costs {n} euros and fits well. {SIGNATURE}\n\n{FOOTER}") for n in range(count)]
    return with_it + [row(f"p{n}", f"Item number {n} is out of stock until May.") for n in range(count)]


def test_shared_lines_and_sentences_go_and_the_facts_list_them() -> None:
    examples = firm_rows()
    found = decided(Boilerplate(), examples)
    assert found.removals == [] and found.facts["rows_needed"] == 20
    assert {(line["text"], line["rows"]) for line in found.facts["lines"]} == {
        (SIGNATURE.lower(), 40),
        (FOOTER.lower(), 40),
    }
    replies = after(Boilerplate(), examples)
    assert replies[:2] == ["Part 0 costs 0 euros and fits well.", "Part 1 costs 1 euros and fits well."]
    assert replies[40:] == [example.reply for example in examples[40:]]


def test_a_row_that_is_boilerplate_alone_is_a_drop() -> None:
    examples = [*firm_rows(), row("who?", SIGNATURE), row("who?", f"{FOOTER}\n{SIGNATURE}")]
    dropped = after(Boilerplate(), examples)[-2:]
    assert [drop.reason for drop in dropped if isinstance(drop, Drop)] == ["nothing_left"] * 2


def test_an_answer_that_many_rows_give_is_no_boilerplate() -> None:
    examples = [row(f"q{n}", "Yes, that is quite right.") for n in range(100)]
    assert after(Boilerplate(), examples) == ["Yes, that is quite right."] * 100


def test_too_rare_too_short_and_other_fields_stay() -> None:
    rare = [row(f"q{n}", f"Answer {n} is this one here. {SIGNATURE}") for n in range(19)]
    assert (
        decided(Boilerplate(), rare + [row("x", f"Reply number {n} of many.") for n in range(30)]).facts["lines"] == []
    )
    short = [row(f"q{n}", f"Answer {n} is this one here. Thank you.") for n in range(50)]
    assert decided(Boilerplate(), short).facts["lines"] == []
    asked = [row(f"Tell me please what this is: {n}. {SIGNATURE}", f"Reply number {n} of many.") for n in range(50)]
    assert decided(Boilerplate(), asked).facts["lines"] == []
    assert len(decided(step_of(Boilerplate, field="prompt"), asked).facts["lines"]) == 1


def test_the_fraction_counts_where_it_asks_for_more() -> None:
    assert decided(Boilerplate(min_rows=2, min_fraction=0.6), firm_rows()).facts["lines"] == []
    assert len(decided(Boilerplate(min_rows=2, min_fraction=0.5), firm_rows()).facts["lines"]) == 2


def test_a_line_counts_once_a_row() -> None:
    assert (
        decided(Boilerplate(), [row("q", f"Some other words {n}.\n" + f"{SIGNATURE}\n" * 50) for n in range(3)]).facts[
            "lines"
        ]
        == []
    )


def test_code_and_json_stay() -> None:
    code = [row(f"q{n}", f"Answer {n} is this:\n```\nimport numpy as np  # always the same\n```") for n in range(50)]
    objects = [row(f"q{n}", f'{{"note": "{SIGNATURE}", "n": {n}}}') for n in range(50)]
    assert after(Boilerplate(), code + objects) == [example.reply for example in code + objects]


def test_patterns_go_however_rare_and_a_bad_one_is_an_error() -> None:
    step = Boilerplate(patterns=(r"(?i)\bvisit us\b",), shared=False)
    assert (
        after(step, [row("q", "It is open. Visit us soon! It closes at five."), document("Visit us")])[0]
        == "It is open. It closes at five."
    )
    assert reason(RemoveLines((), step.patterns), document("visit us")) == "nothing_left"
    with pytest.raises(ConfigError, match=r"patterns\[1\].*character 2"):
        step_of(Boilerplate, patterns=["a", "("])


@pytest.mark.usefixtures("impatient")
def test_a_pattern_without_end_is_a_counted_drop() -> None:
    drop = applied(RemoveLines((), ("(.*?,){25}x",)), row("q", "," * 80))
    assert isinstance(drop, Drop) and drop.reason == "rule_timeout"


def test_the_rejected_reply_loses_it_too() -> None:
    examples = [
        row(f"q{n}", f"Good answer {n} is here. {SIGNATURE}", rejected=row("q", f"Bad one. {SIGNATURE}").messages[1:])
        for n in range(30)
    ]
    then = decided(Boilerplate(), examples).then
    assert then is not None
    outcome = then.open(None)(examples[0])  # type: ignore[arg-type]
    assert isinstance(outcome, Example) and outcome.rejected[0].text == "Bad one."


@pytest.mark.parametrize("examples", [[], [row("q", "a")]])
def test_few_rows_have_no_boilerplate(examples: list[Example]) -> None:
    assert decided(Boilerplate(), examples).then is None


@pytest.mark.parametrize(("option", "value"), [("min_rows", 1), ("min_words", 0), ("min_fraction", 2.0)])
def test_a_wrong_option_is_the_one_that_is_mended(option: str, value: float) -> None:
    with pytest.raises(ConfigError) as refused:
        Boilerplate(**{option: value})  # type: ignore[arg-type]
    assert refused.value.remedy.startswith(f"{option}: ")
