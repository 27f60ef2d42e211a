"""`language` lets the wanted languages pass, and says how sure it was."""

from __future__ import annotations

import socket

import pytest

from rows import decided, document, row, step_of
from sartor.core.config import load
from sartor.core.errors import ConfigError
from sartor.curate.recipe import CurateRecipe
from sartor.curate.steps.text_filters import LanguageFilter

ENGLISH = "You can pick the parcel up at the counter between nine and five, from Monday to Friday."
GERMAN = "Sie können das Paket von Montag bis Freitag zwischen neun und siebzehn Uhr am Schalter abholen."
CHINESE = "您可以在周一至周五上午九点到下午五点之间到柜台领取包裹。"
SHORT = "Ja gut"


def reasons(step: LanguageFilter, *replies: str) -> list[str]:
    """The reason for each reply, empty where it stays."""
    found = {removal.row: removal.reason for removal in decided(step, [row("?", reply) for reply in replies]).removals}
    return [found.get(number, "") for number in range(len(replies))]


def test_other_languages_are_removed_with_code_and_confidence() -> None:
    found = decided(LanguageFilter(("en",)), [row("?", ENGLISH), row("?", GERMAN), row("?", CHINESE)])
    assert [(removal.row, removal.reason) for removal in found.removals] == [(1, "language"), (2, "language")]
    assert found.removals[0].detail.startswith("de with confidence ") and "allowed: en" in found.removals[0].detail


@pytest.mark.parametrize(("unsure", "expected"), [("keep", ""), ("drop", "language_unsure")])
def test_short_texts_are_kept_or_dropped_by_option_and_counted(unsure: str, expected: str) -> None:
    step = step_of(LanguageFilter, allow=["en"], unsure=unsure)
    found = decided(step, [row("?", SHORT), row("?", "12345"), row("?", ENGLISH)])
    assert [removal.reason for removal in found.removals] == [expected] * 2 * bool(expected)
    assert found.facts[f"unsure_{'kept' if unsure == 'keep' else 'dropped'}"] == 2
    assert found.facts["languages"] == {"unsure": 2, "en": 1}


def test_the_shorthand_of_a_recipe_names_the_languages() -> None:
    recipe = load(
        CurateRecipe, {"sources": [{"path": "x"}], "steps": [{"language": ["en", "sv"]}, {"language": "de"}]}
    )
    assert [step.allow for step in recipe.steps] == [("en", "sv"), ("de",)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "missing"),
        ({"allow": []}, "no language"),
        ({"allow": ["en", "spanish"]}, "'spanish' is no language code"),
        ({"allow": ["en", "zh-CN"]}, "allow: [en, zh]"),
        ({"allow": ["zh-CN"]}, "[zh]"),
        ({"allow": ["en"], "min_confidence": 2}, "0 to 1"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match="allow|min_confidence") as caught:
        step_of(LanguageFilter, **options)
    assert said in str(caught.value)


def test_each_field_is_judged_by_itself() -> None:
    mixed = [row(GERMAN, ENGLISH), row(ENGLISH, GERMAN)]
    for field, expected in (("reply", [1]), ("prompt", [0]), ("all", [0, 1]), ("replies", [1])):
        found = decided(step_of(LanguageFilter, allow=["en"], field=field), mixed)
        assert [removal.row for removal in found.removals] == expected, field


def test_code_and_addresses_say_nothing_of_a_language() -> None:
    code = f"```python\nwhile wahr:\n    drucke('und das ist nicht gut')\n```\n{ENGLISH}"
    assert reasons(LanguageFilter(("en",)), code, "https://example.de/das-ist-nicht-gut-und-das-auch") == ["", ""]


def test_a_document_has_no_prompt_and_is_counted() -> None:
    found = decided(step_of(LanguageFilter, allow=["en"], field="prompt"), [document(GERMAN)])
    assert (found.removals, found.facts["without_text"]) == ([], 1)


def test_no_network_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert reasons(LanguageFilter(("en",)), ENGLISH, GERMAN) == ["", "language"]


def test_nothing_in_is_nothing_out() -> None:
    assert decided(LanguageFilter(("en",)), []).removals == []
