"""The recipes that are shipped: they load, and that for the construction FAQ leaves no promotion."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest

import sartor
from rows import HERE, row
from sartor.core import assets
from sartor.core.config import load, read_yaml
from sartor.core.records import Drop, Example
from sartor.curate.recipe import CurateRecipe
from sartor.curate.steps.regex_rules import RegexRules

ROOT = Path(__file__).parent.parent.parent
FIRM = re.compile(
    r"zaragoza|https?:|www\.|github|@|\+46|\b(?:contact|call|kontakta|ring) (?:us|oss)\b|\bour\b|\bvåra?\b(?! och)|\bhos oss\b|"
    r"\b(?:we|vi) (?:can|offer|provide|help|handle|kan|erbjuder|hjälper)\b",
    re.I,
)


def recipe(name: str) -> CurateRecipe:
    """A shipped recipe."""
    return load(CurateRecipe, read_yaml(ROOT / "recipes" / f"{name}.yaml"))


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_recipe_of_curation_loads(file: Path) -> None:
    data = read_yaml(file)
    if "sources" in data:
        assert load(CurateRecipe, data).steps


def faq_rules() -> RegexRules:
    """The rules of the construction FAQ."""
    (step,) = (step for step in recipe("construction-faq").steps if isinstance(step, RegexRules))
    return step


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("It takes 10 weeks. Zaragoza AB helps you all the way.", "It takes 10 weeks."),
        (
            "Check F-tax. Zaragoza AB has a tool at github.com/zaragoza-ab/verification-tool. Ask for references.",
            "Check F-tax. Ask for references.",
        ),
        ("Ask in writing. Zaragoza AB recommends an inspector under AB 04 kap. 7 § 3.", "Ask in writing."),
        ("Wet rooms need a membrane. Moisture technicians work with Zaragoza AB.", "Wet rooms need a membrane."),
        ("Costs 1.1 MSEK (2026). Zaragoza AB average in Helsingborg: 200,000 SEK.", "Costs 1.1 MSEK (2026)."),
        ("The city of Helsingborg decides.", "The city of Helsingborg decides."),
    ],
)
def test_a_sentence_that_names_the_firm_goes_whole(answer: str, left: str) -> None:
    outcome = faq_rules().open(HERE)(row("How long?", answer))
    assert isinstance(outcome, Example) and outcome.reply == left


def test_a_row_that_is_promotion_alone_is_a_drop() -> None:
    step = faq_rules().open(HERE)
    drops = [step(row("Who is best?", "Zaragoza AB is best.")), step(row("Can I hire Zaragoza AB?", "Of course."))]
    assert [drop.reason for drop in drops if isinstance(drop, Drop)] == ["nothing_left", "rule:about-the-firm"]


@pytest.mark.circle
@pytest.mark.parametrize("name", ["faq-en", "faq"])
def test_no_promotion_is_left_in_the_construction_faq(name: str) -> None:
    file = assets.install("construction-faq") / "zaragoza_construction_faq" / "data" / f"{name}-alpaca.jsonl"
    examples = [
        row(each["instruction"], each["output"]) for each in map(json.loads, file.read_text("utf-8").splitlines())
    ]
    promoting = sum("zaragoza" in example.reply.lower() for example in examples)
    step = faq_rules().open(HERE)
    outcomes = [step(example) for example in examples]
    kept = [outcome for outcome in outcomes if isinstance(outcome, Example)]
    left = [found.group() for example in kept for message in example.messages if (found := FIRM.search(message.text))]
    assert left == [] and promoting > 50
    assert Counter(outcome.reason for outcome in outcomes if isinstance(outcome, Drop)) == {"rule:about-the-firm": 2}
    assert all(example.reply.endswith((".", "!", "?")) for example in kept)


def test_chitchat_converter_merges_turns_of_a_speaker() -> None:
    """A last turn of the user is left out; a conversation with one speaker becomes one message."""
    path = ROOT / "examples" / "chitchat" / "convert.py"
    spec = importlib.util.spec_from_file_location("chitchat_convert", path)
    assert spec and spec.loader
    convert = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(convert)
    lines = [("a", "Hi"), ("a", " there "), ("b", " "), ("a", "anyone?"), ("b", "Yes"), ("a", "Fine")]
    bursts = [[{"sender": sender, "text": text}] for sender, text in lines]
    counts: Counter[str] = Counter()
    found = convert.row("name", {"messages": bursts, "start": "2018-05-02T19:38:15Z"}, counts)
    assert found["messages"] == [
        {"role": "user", "content": "Hi\nthere\nanyone?"},
        {"role": "assistant", "content": "Yes"},
    ]
    assert (found["group"], found["date"]) == ("name", "2018-05-02")
    alone = convert.row("n", {"messages": bursts[:1]}, counts)
    assert len(alone["messages"]) == 1
    assert counts == {"last turn of the user left out": 1, "conversation": 1, "one person speaks": 1}


@pytest.mark.circle
def test_chitchat_recipe_masks_personal_data_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are counted; no mail address or phone number is in a Parquet file or in the card."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(
        [sys.executable, ROOT / "examples/chitchat/convert.py", "chitchat.jsonl"], check=True, capture_output=True
    )
    made = sartor.curate(ROOT / "recipes" / "chitchat.yaml", tmp_path / "d")
    assert made.read == 7168 == made.kept + sum(made.dropped.values())
    assert made.kept > 3500 and made.dropped["near_duplicate"] > 0
    found = made.dataset.manifest["steps"]["personal_data"]
    assert found["email.prompt"] + found["phone.prompt"] >= 2
    text = (tmp_path / "chitchat.jsonl").read_text(encoding="utf-8")
    values = set(re.findall(r"[\w.]+@[\w-]+\.com", text)) | set(re.findall(r"\b\d{3}-\d{3}-\d{4}\b", text))
    written = "".join(
        json.dumps(pl.read_parquet(file).to_dicts(), default=str) for file in made.dataset.path.rglob("*.parquet")
    )
    assert values and [value for value in values if value in written] == []
    card = (made.dataset.path / "card.html").read_text(encoding="utf-8")
    assert f"{made.kept:,}" in card and "near_duplicate" in card and not [value for value in values if value in card]


@pytest.mark.circle
def test_the_construction_faq_goes_end_to_end_without_the_firm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets.install("construction-faq")
    monkeypatch.chdir(tmp_path)
    made = sartor.curate(ROOT / "recipes" / "construction-faq.yaml", tmp_path / "d")
    texts = [message.text for example in sartor.read_examples(made.dataset) for message in example.messages]
    assert made.kept > 950 and made.dropped["rule:about-the-firm"] == 4
    assert [found.group() for text in texts if (found := FIRM.search(text))] == []
    assert made.dataset.licence == "CC-BY-4.0"
