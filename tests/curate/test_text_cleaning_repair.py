"""`repair_text` mends what is broken and leaves good text as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rows import HERE, applied, reason, row
from sartor.core.records import Example, Message, Origin, Part
from sartor.curate.steps.text_cleaning import RepairText

MEND = RepairText().open(HERE)


def mended(text: str, step: RepairText | None = None) -> str:
    """A text after repair."""
    outcome = applied(step, row("q", f"a{text}z")) if step else MEND(row("q", f"a{text}z"))
    assert isinstance(outcome, Example)
    return outcome.reply[1:-1]


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("cafÃ©", "café"),
        ("CafÃƒÂ©", "Café"),
        (" â€œhiâ€\x9d ", " “hi” "),
        ("ÐŸÑ€Ð¸Ð²ÐµÑ‚", "Привет"),
        ("x\x00\x07\x1b[31mred\x1b[0my", "xredy"),
        ("page\x0cpage", "page\npage"),
        ("one\x1ftwo", "one two"),
        ("a\r\nb\rc\u2028d\u2029e", "a\nb\nc\nd\ne"),
        ("25\u00a0000\u202f€", "25 000 €"),
        ("in\u00advis\u200bible\ufeff", "invisible"),
        ("e\u0301", "é"),
        ("hid\U000e0061\U000e0062den", "hidden"),
    ],
)
def test_broken_text_is_mended(broken: str, whole: str) -> None:
    assert mended(broken) == whole


@pytest.mark.parametrize(
    "good",
    [
        "def f(x):\n\treturn {'a': x}  # two  spaces\n",
        'if a < b && c > d { return "&amp;"; }',
        "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "می‌خواهم بروم",
        "क्‍ष",
        "ภาษา\u200bไทย ภาษาไทย",
        "ភាសា\u200bខ្មែរ",
        "日本語\u3000テスト「はい」",
        "“curly” ‘quotes’ — dashes … ﬁ",
        "naïve café, Ærø, straße, ¿qué?, 20 °C ± 5 µm, ½ × 3²",
        "Ünïcödé ÅÄÖ åäö",
        "שלום \u200fעולם",
        "a\n\n\n   b   \n",
    ],
)
def test_good_text_stays_as_it_is(good: str) -> None:
    assert mended(good) == good


def test_an_unchanged_row_is_the_very_same_object() -> None:
    example = row("Vad är bygglov?", "Ett beslut. \n")
    assert MEND(example) is example


def test_tool_calls_tools_and_media_stay_as_they_are() -> None:
    calls = json.dumps([{"function": {"name": "f", "arguments": "cafÃ©\r\n"}}], ensure_ascii=False)
    turn = Message("assistant", (Part("text", "cafÃ©"), Part("image", media="media/Ã©.png")), tool_calls=calls)
    example = Example((Message.of("user", "cafÃ©"), turn), (Origin("s", "s:1"),), tools='["Ã©"]')
    after = MEND(example)
    assert isinstance(after, Example)
    assert [part.text for message in after.messages for part in message.content] == ["café", "café", ""]
    assert (after.messages[1].tool_calls, after.messages[1].content[1].media, after.tools) == (
        calls,
        "media/Ã©.png",
        '["Ã©"]',
    )


def test_the_rejected_reply_is_mended_too() -> None:
    after = MEND(row("q", "yes", rejected=(Message.of("assistant", "cafÃ©"),)))
    assert isinstance(after, Example) and after.rejected[0].text == "café"


def test_a_reply_of_control_characters_alone_is_a_drop() -> None:
    assert reason(RepairText(), row("q", "\x07\x08")) == "nothing_left"


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"mojibake": False}, "cafÃ©"),
        ({"normal_form": "none"}, "e\u0301"),
        ({"control_characters": False}, "a\x07b"),
        ({"spaces": False}, "a\u00a0b"),
        ({"line_ends": False}, "a\r\nb"),
    ],
)
def test_each_repair_can_be_switched_off(option: dict[str, object], text: str) -> None:
    assert mended(text, RepairText(**option)) == text  # type: ignore[arg-type]
    assert mended(text) != text


ODD = st.text(
    st.one_of(st.characters(exclude_categories=("Cs",)), st.sampled_from("Ã©â€œ\x9d\xa0 Â\r\n\x85\u200bÐŸ\x1b[31m")),
    max_size=60,
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(ODD)
def test_a_second_repair_changes_nothing(text: str) -> None:
    once = MEND(row("q", f"a{text}"))
    assert isinstance(once, Example)
    assert MEND(once) is once


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters(max_codepoint=0x17F, exclude_categories=("Cs", "Cc")), min_size=1, max_size=40))
def test_repair_of_mojibake_keeps_the_row_and_adds_no_length(text: str) -> None:
    """UTF-8 text that was decoded as Latin-1 is repaired or stays as it is."""
    wrong = f"plain words {text}".encode().decode("latin-1")
    after = MEND(row("q", wrong))
    assert isinstance(after, Example) and len(after.reply) <= len(wrong)


def test_opening_needs_no_folder() -> None:
    assert RepairText().open(Path("/nowhere"))(row("q", "a")) is not None
