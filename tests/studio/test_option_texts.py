"""German descriptions of options: one for each that a form shows, none too many, with the numbers of the English."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import sartor
from sartor.studio.recipe_form import RecipeForm
from sartor.studio.translations import option_texts
from sartor.studio.tuning_form import recipe_fields
from studio_artefacts import dataset_of
from studio_site import Site

GERMAN = option_texts("de")
# what a text holds in every language: numbers and arXiv ids, `code`, names_with_underscores, prefix:NAME, addresses
KEPT = re.compile(r"`[^`]*`|\d+(?:\.\d+)*|\b\w+_\w+\b|\b\w+:[A-Z]\w*|https?://\S+")
SPAN = re.compile(r"<(?:span|option)\b[^>]*>([^<]*)")
ENGLISH = re.compile(r"<(?:span|option)\b[^>]* lang=en>([^<]*)")


def descriptions(part: Any) -> Iterator[str]:
    """Yield each description in a JSON Schema."""
    if isinstance(part, list):
        for item in part:
            yield from descriptions(item)
    if isinstance(part, dict):
        if isinstance(part.get("description"), str):
            yield part["description"]
        yield from descriptions(list(part.values()))


def kept(text: str) -> list[str]:
    return sorted(KEPT.findall(re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)))


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    made.log_in()
    dataset_of(tmp_path / "faq" / "data")
    yield made
    made.close()


def tune_page(site: Site) -> str:
    return site.page("/tune/new")


def recipe_page(site: Site) -> str:
    """The recipe editor with a step of each kind."""
    kinds = RecipeForm(sartor.schema("curate").schema).step_kinds()
    recipe = {"sources": [{"path": "rows.csv"}], "steps": [{"kind": kind} for kind in kinds]}
    answer = site.post("/recipe", from_page="/recipe", do="yaml", yaml=yaml.safe_dump(recipe))
    assert answer.text.count('.kind" value=') == len(kinds) > 20
    return str(answer.text)


@pytest.mark.parametrize(("page", "count"), [(tune_page, 100), (recipe_page, 170)])
def test_german_form_describes_every_option_in_german(site: Site, page: Any, count: int) -> None:
    """An option without a German text is marked as English (lang=en); the English page has the schema's texts."""
    english = set(ENGLISH.findall(page(site)))
    site.post("/language", from_page="/recipe", language="de", next="/recipe")
    text = page(site)
    assert '<html lang="de">' in text
    assert ENGLISH.findall(text) == []
    shown = {html.unescape(content) for content in SPAN.findall(text)} & set(GERMAN.values())
    assert len(shown) >= count
    assert len({html.unescape(content) for content in english} & set(GERMAN)) >= count


def test_each_german_text_is_of_a_description() -> None:
    """A changed English description leaves its German text behind, and has none itself."""
    present = {text for kind in ("tune", "curate") for text in descriptions(sartor.schema(kind).schema)}
    assert set(GERMAN) - present == set()
    assert {field.text for field in recipe_fields()} - set(GERMAN) == set()


def test_german_text_keeps_numbers_and_code() -> None:
    changed = {text: german for text, german in GERMAN.items() if kept(text) != kept(german)}
    assert changed == {}
    assert all(german.strip() and german != text for text, german in GERMAN.items())


def test_description_of_a_plugin_stays_english(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    text = next(field.text for field in recipe_fields() if field.name == "seed")
    without = {english: german for english, german in GERMAN.items() if english != text}
    monkeypatch.setattr("sartor.studio.page_renderer.option_texts", lambda language: without)
    site.post("/language", from_page="/recipe", language="de", next="/recipe")
    assert [html.unescape(content) for content in ENGLISH.findall(tune_page(site))] == [text]
