"""What is said of what is written."""

from __future__ import annotations

import json
import time

import pytest

from sartor.media.speech.text_normalization import spoken
from sartor.media.speech.voice import MOST_PIECE, clean, pieces

SAID = {
    "plain words": ("It costs 3 euros.", "It costs 3 euros."),
    "no end": ("It costs 3 euros", "It costs 3 euros."),
    "a number alone": ("42.", "42."),
    "marks": ("**Turn** off the `main_switch`, _now_!", "Turn off the main switch, now!"),
    "signs that are none": ("2 * 3 * 4 = 24, and a < b", "2 * 3 * 4 = 24, and a < b."),
    "headings": ("# Repair\n\n## Tools ##\nA saw", "Repair.\nTools.\nA saw."),
    "lines of a paragraph": ("one\ntwo  \nthree", "one two. three."),
    "items": ("- bolts\n- nuts\n\n1. Stop.\n2. Look.\n   Twice.", "bolts.\nnuts.\n1: Stop.\n2: Look. Twice."),
    "items in items": ("1. a\n   - b\n2. c", "1: a.\nb.\n2: c."),
    "quotes": ("> Stop\n> here", "Stop here."),
    "links": ("Read [the manual](https://x.org/a_b) first.", "Read the manual first."),
    "pictures": ("![a torn thread](t.png)", "a torn thread."),
    "tables": ("| Part | Price |\n|---|--:|\n| Bolt | 3 |\n| Nut | |", "Part: Bolt, Price: 3.\nPart: Nut."),
    "a table without rows": ("| a | b |\n|---|---|", "a, b."),
    "a table without heads": ("| | |\n|---|---|\n| x | y |", "x, y."),
    "markup": ("<b>Stop</b> the <i>line</i>", "Stop the line."),
    "entities": ("salt &amp; pepper", "salt & pepper."),
    "mail": ("Ask tom@example.org", "Ask tom@example.org."),
    "degrees and rights": ("5 °C, © Tom, 3 €", "5 °C, © Tom, 3 €."),
    "an object": (
        '{"intent": "HassTurnOn", "slots": {"area": "living room", "on": true, "level": null}}',
        "intent: Hass Turn On.\nslots: area: living room, on: true, level: none.",
    ),
    "a list": ('[{"a_b": 1}, "x", [2, 2.5], []]', "a b: 1.\nx.\n2, 2.5.\nnone."),
    "an object in a fence": ('Here:\n```json\n{"defect": "hole"}\n```', "Here:\ndefect: hole."),
    "capitals": ('{"k": "HTTPServer2Go"}', "k: HTTP Server2 Go."),
    "not quite an object": ('{"a": 1', '{"a": 1.'),
    "control characters": ("a\x00b\x1b[2Jc\x07\u200b\ufeffd\ud800", "a b [2Jc d."),
    "right to left marks": ("\u202eabc", "abc."),
    "phonemes": ("[[h@l'oU]]", "[ [h@l'oU]]."),
    "other scripts": ("你好。世界", "你好。世界."),
    "nothing": ("", ""),
    "no word": ("--- ... !!!", ""),
    "empty": ("{}", ""),
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_said(name: str) -> None:
    written, said = SAID[name]
    assert spoken(written).text == said
    assert spoken(written) == spoken(written)


@pytest.mark.parametrize(
    ("written", "said", "left_out"),
    [
        (
            "Look: https://www.example.org/a?b=c_d. Or www.other.net!",
            "Look: example.org. Or other.net!",
            {"address": 2},
        ),
        ("http://[broken", "", {"address": 1}),
        ("Fine 👍🏽 👩‍🔬 🇩🇪 1️⃣", "Fine 1.", {"emoji": 4}),
        ("Run:\n```python\nprint(1)\n```\nDone", "Run:\ncode.\nDone.", {"code": 1}),
        ("<div>\nStop\n</div>", "Stop.", {"markup": 1}),
        ("😀", "", {"emoji": 1}),
    ],
)
def test_what_is_not_said_as_it_stands_is_counted(written: str, said: str, left_out: dict[str, int]) -> None:
    made = spoken(written)
    assert (made.text, made.left_out) == (said, left_out)


@pytest.mark.parametrize(
    "unit", ["*a **b ", "[", "> ", "`", "<", "- ", "| a", "![a](", "a_", "http://", "&#x", "(", "{", '{"a":', "👩‍"]
)
def test_no_text_takes_long(unit: str) -> None:
    began = time.process_time()
    spoken(unit * (20_000 // len(unit)))
    assert time.process_time() - began < 5


def test_json_as_deep_as_it_may_be_is_said_to_be_there() -> None:
    assert spoken("[" * 900 + "1" + "]" * 900).text == "code."
    assert spoken(json.dumps({"a": {"b": {"c": [1]}}})).text == "a: b: c: 1."


def test_pieces_are_sentences_put_together_up_to_a_limit() -> None:
    text = " ".join(f"This is the sentence {number}." for number in range(100))
    made = pieces(text)
    assert " ".join(made) == text
    assert all(len(piece) <= MOST_PIECE and piece.endswith(".") for piece in made)
    assert len(made) < 12


@pytest.mark.parametrize("text", ["word " * 400, "x" * 1000, "a, " * 500, "。".join(["世界" * 30] * 20)])
def test_long_sentence_is_cut_without_losing_text(text: str) -> None:
    """Pieces stay within MOST_PIECE; joined, they hold each character of the text but white space."""
    made = pieces(text)
    assert all(0 < len(piece) <= MOST_PIECE for piece in made)
    assert "".join("".join(made).split()) == "".join(text.split())


def test_lines_are_apart_and_pieces_without_a_sound_are_none() -> None:
    assert pieces("one\n...\ntwo") == ["one ... two"]
    assert pieces("... !!! \n ?") == []
    assert clean("a\t b\r\nc\x0b") == "a b \nc"
