"""`repetition` finds loops and duplicate lines, and leaves normal answers alone."""

from __future__ import annotations

import random

import pytest

from rows import reason, row, step_of
from sartor.core.errors import ConfigError
from sartor.curate.steps.text_filters import Repetition

PROSE = (
    "The permit is asked for at the town hall. A form has to be filled in, and drawings go with it. The clerk looks through them "
    "within two weeks and writes to you if anything is missing. When all is there the board decides, which takes up to ten weeks "
    "in most towns. A neighbour may object until the decision is final. Work begins only after the technical meeting."
)


def looping(length: int) -> str:
    """A text that ends in a loop over half of it."""
    return PROSE + " and so on and on" * length


@pytest.mark.parametrize(
    "text",
    [
        "no " * 20,
        "I am sorry. " * 10,
        "the cat sat. " * 30,
        "a" * 100,
        "对" * 80,
        looping(40),
        f"{PROSE}\n" * 3,
        "\n".join(
            ["Buy now and save a lot of money today"] * 5 + ["Another line of some words here"] * 2 + PROSE.split(". ")
        ),
    ],
)
def test_repeated_text_goes(text: str) -> None:
    assert reason(Repetition(), row("?", text)) == "repetition"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Yes",
        "ha ha ha ha",
        "No, no, no!",
        "Bye bye",
        "-" * 200,
        "=" * 100,
        "1000000000000000000000000000000000000000000000000000000000000000000",
        PROSE,
        "- milk\n- bread\n- eggs",
        "A: yes\nB: yes\nC: no",
        "[1, 1, 1, 1, 1, 1]",
        '{"intent": "HassTurnOn", "name": "lamp"}',
        "```\nx = 1\nx = 1\nx = 1\nx = 1\n```\nDone.",
    ],
)
def test_normal_answers_stay(text: str) -> None:
    assert reason(Repetition(), row("?", text or "x")) == ""


def test_random_prose_stays_whatever_its_length() -> None:
    rng = random.Random(0)
    vocabulary = [f"word{number}" for number in range(400)]
    weights = [1 / (number + 3) for number in range(400)]
    texts = [" ".join(rng.choices(vocabulary, weights, k=size)) for size in range(1, 300, 7)]
    assert [text for text in texts if reason(Repetition(), row("?", text))] == []


def test_every_assistant_turn_is_checked_or_only_the_reply() -> None:
    """With field: reply only the last turn is checked."""
    example = row("?", "no " * 20, "?", "Fine.")
    assert reason(Repetition(), example) == "repetition"
    assert reason(step_of(Repetition, field="reply"), example) == ""


def test_a_scale_makes_it_laxer() -> None:
    lines = "\n".join([*["Buy now and save a lot of money today"] * 3, *PROSE.split(". ")])
    assert reason(Repetition(scale=0.5), row("?", lines)) == "repetition"
    assert reason(Repetition(scale=5.0), row("?", lines)) == ""


@pytest.mark.parametrize("options", [{"scale": 0}, {"loop": 1}])
def test_a_wrong_option_is_named(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        step_of(Repetition, **options)


def test_a_huge_text_takes_no_time() -> None:
    assert reason(Repetition(), row("?", "x y " * 500_000)) == "repetition"
