"""`chat_quality` finds bad answers and no good ones; `quality` ranks by the same signs."""

from __future__ import annotations

import random

import pytest

from rows import applied, document, reason, row, step_of
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, Message
from sartor.curate.steps.answer_quality import ChatQuality, quality

STEP = ChatQuality()
QUESTION = "What do I need for a permit to build a garage beside my house?"
ANSWER = (
    "You need a drawing of the garage and a plan of the plot. The town hall looks at both. It takes about ten weeks."
)
GERMAN = (
    "Sie brauchen eine Zeichnung der Garage und einen Plan des Grundstücks. Die Gemeinde prüft beides in zehn Wochen."
)
CALL = '[{"function": {"name": "f", "arguments": "{}"}, "id": "1", "type": "function"}]'


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", "empty_answer"),
        (" \n ", "empty_answer"),
        ("null", "empty_answer"),
        ("N/A", "empty_answer"),
        ("...", "empty_answer"),
        ("As an AI language model, I cannot give advice on permits.", "refusal"),
        ("I'm sorry, but I can't assist with that.", "refusal"),
        ("I’m sorry, but I cannot fulfill this request.", "refusal"),
        ("I am just an AI model and have no house.", "refusal"),
        ("As a large language model trained by Acme, I have no house.", "refusal"),
        ("My knowledge cutoff is 2021, so this may be old.", "refusal"),
        ("Como modelo de lenguaje, no puedo ayudar con eso.", "refusal"),
        ("Als KI-Sprachmodell kann ich dazu nichts sagen.", "refusal"),
        ("作为一个人工智能语言模型，我不能回答这个问题。", "refusal"),
        ("You need a drawing of the garage. Then you need a plan of the", "truncated_answer"),
        ("You need a drawing of the garage. You also need a plan,", "truncated_answer"),
        ('{"garage": true, "plan": "dra', "truncated_answer"),
        ('[{"a": 1}, {"b"', "truncated_answer"),
        ("Like this:\n```python\nprint(1)", "truncated_answer"),
        (QUESTION, "prompt_echo"),
        (f"{QUESTION.lower()} You need a drawing.", "prompt_echo"),
        (GERMAN, "answer_language"),
    ],
)
def test_a_bad_answer_goes_for_its_own_reason(answer: str, expected: str) -> None:
    assert reason(STEP, row(QUESTION, answer)) == expected


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER,
        "Yes",
        "No.",
        "Turn left",
        "None",
        "42",
        "?",
        "👍",
        "I like it :)",
        "It never panned out. I was sad about that for a while :(",
        '{"intent": "HassTurnOn"}',
        "[1, 2]",
        "{x} is the set of all x",
        "[note] see above for the details of it",
        "You need:\n- a drawing\n- a plan of the",
        "1. Open it\n2. Press the button and",
        "# Permits\n\nA title",
        "apt install garage-planner-for-the",
        "SELECT name FROM garages WHERE size > 3 AND",
        "Use this. It lists files:\n\nls -la",
        "```\ncode\n```",
        "See https://example.com/a",
        "As an airline, I think it is fine.",
        "I'm sorry, but I can't come tonight.",
        "I am an AI researcher and I work on models.",
        "AI language models are trained on text.",
        "My knowledge of permits is limited.",
        "I am part of a team. We do what we dream of",
        "Dear Sir,\nI write to you about it.\nBest regards,\nJohn Smith",
        "She asked me to come along. I said yes and off we went",
        "i went there yesterday. it was closed so i went to the",
        "hi\nhow are you\ni am from the",
        "Garage: EUR 900",
        "C'est la vie.",
    ],
)
def test_a_good_answer_stays(answer: str) -> None:
    outcome = applied(STEP, row(QUESTION, answer))
    assert not isinstance(outcome, Drop), f"{outcome.reason}: {outcome.detail}"


@pytest.mark.parametrize(
    ("example", "detail"),
    [
        (row("a", "b", "c", roles=("user", "user", "assistant")), "both the user's"),
        (row("a", "b", "c", roles=("user", "assistant", "assistant")), "both the assistant's"),
        (row("a", "b", "c", roles=("assistant", "user", "assistant")), "nobody asked"),
        (row("a", "b", roles=("system", "assistant")), "nobody asked"),
        (row("a", "b", "c", roles=("user", "system", "assistant")), "must be the first"),
        (row("a", "b", "c", roles=("user", "tool", "assistant")), "after no call"),
        (row("a", "b", "c", "d", roles=("user", "assistant", "tool", "assistant")), "called none"),
    ],
)
def test_turns_out_of_order_go(example: Example, detail: str) -> None:
    drop = applied(STEP, example)
    assert isinstance(drop, Drop) and drop.reason == "turn_order" and detail in drop.detail


def test_turns_in_order_stay() -> None:
    called = Message("assistant", (), tool_calls=CALL)
    tools = Example(
        (
            Message.of("system", "s"),
            Message.of("user", "q"),
            called,
            Message.of("tool", "1"),
            Message.of("tool", "2"),
            Message.of("assistant", "a"),
        ),
        row("q", "a").origins,
    )
    for example in (
        tools,
        document("A text without a question."),
        row("s", "q", "a", "q", "a", roles=("system", *("user", "assistant") * 2)),
    ):
        assert reason(STEP, example) == ""


def test_every_turn_of_the_assistant_is_looked_at() -> None:
    drop = applied(STEP, row(QUESTION, "As an AI language model, I cannot say.", "And now?", ANSWER))
    assert isinstance(drop, Drop) and drop.reason == "refusal" and drop.detail.startswith("turn 2: ")


@pytest.mark.parametrize(
    ("check", "example"),
    [
        ("empty", row(QUESTION, "null")),
        ("truncated", row(QUESTION, '{"a": "b')),
        ("refusal", row(QUESTION, "As an AI model, I cannot say.")),
        ("echo", row(QUESTION, QUESTION)),
        ("language", row(QUESTION, GERMAN)),
        ("turns", row("a", "b", "c", roles=("user", "user", "assistant"))),
    ],
)
def test_each_check_can_be_switched_off(check: str, example: Example) -> None:
    assert reason(STEP, example) != ""
    assert reason(step_of(ChatQuality, **{check: False}), example) == ""


def test_a_step_without_a_check_is_an_error() -> None:
    off = dict.fromkeys(("empty", "truncated", "refusal", "echo", "language", "turns"), False)
    with pytest.raises(ConfigError, match="does nothing"):
        step_of(ChatQuality, **off)


@pytest.mark.parametrize(
    "example",
    [
        row(f"Translate into German: {ANSWER}", GERMAN),
        row("Answer in German.", QUESTION, GERMAN, roles=("system", "user", "assistant")),
        row("How do I say in German that I need a drawing and a plan of the plot?", GERMAN),
        row("Garage?", GERMAN),
        row(QUESTION, "Ja."),
        row(QUESTION, f"```\n{GERMAN}\n```"),
        row(
            "Hvad skal jeg bruge for at bygge en garage ved mit hus?",
            "Du trenger en tegning av garasjen og en plan over tomten. Kommunen ser på begge deler. Det tar omtrent ti uker.",
        ),
    ],
)
def test_requested_or_uncertain_other_language_is_kept(example: Example) -> None:
    """An answer stays if its language was asked for, a text is short or code, or both languages are close."""
    assert reason(STEP, example) == ""


def test_code_that_completes_the_code_given_is_no_echo() -> None:
    asked = "def add(a, b, c, d, e):\n    return sum([a, b, c, d, e])\n\ndef sub(a, b):"
    assert reason(STEP, row(asked, f"{asked}\n    return a - b")) == ""


def test_truncated_answers_are_found_and_complete_ones_kept() -> None:
    """An answer that ends in a word such as the, which never ends a sentence, is a truncated_answer."""
    rng = random.Random(0)
    sentences = [
        f"The {noun} is checked by the town before the work begins."
        for noun in ("roof", "wall", "drain", "garage", "plot")
    ]
    for _ in range(50):
        chosen = rng.sample(sentences, 3)
        whole = " ".join(chosen)
        assert reason(STEP, row(QUESTION, whole)) == ""
        assert reason(STEP, row(QUESTION, whole[: whole.rindex(" work")])) == "truncated_answer"  # ends in "the"


def test_quality_ranks_whole_answers_above_broken_ones() -> None:
    broken = [
        ANSWER[: ANSWER.rindex(" ten")] + " the",
        ANSWER.replace("You", "YouÃ©").replace("plan", "plâ€™an"),
        "As an AI language model, I cannot say what you need for a permit in your town.",
        QUESTION,
        "no " * 40,
        "ok",
        "",
        ANSWER.lower().rstrip("."),
    ]
    marks = [quality(row(QUESTION, text)) for text in broken]
    assert all(0 <= mark < quality(row(QUESTION, ANSWER)) <= 1 for mark in marks)
    assert quality(row(QUESTION, "")) == 0.0


def test_quality_knows_code_json_tools_documents_and_order() -> None:
    assert quality(row("q", '{"a": 1}')) > 0.7 and quality(row("q", "$ ls -la\n$ cd /tmp\nx = 1")) > 0.7
    assert (
        quality(Example((Message.of("user", "q"), Message("assistant", (), tool_calls=CALL)), row("q", "a").origins))
        == 1.0
    )
    assert quality(document(ANSWER)) > 0.9
    assert quality(row("a", "b", ANSWER, roles=("user", "user", "assistant"))) == quality(row("q", ANSWER)) / 2
