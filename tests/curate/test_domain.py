"""`domain` keeps what is like the examples that it was given, and says how far it can be trusted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rows import decided, document, row, step_of
from sartor.core.config import dump, load
from sartor.core.errors import ConfigError
from sartor.curate.steps.domain import Domain

WORDS = {
    "cooking": [
        "oven",
        "butter",
        "flour",
        "recipe",
        "bake",
        "onion",
        "simmer",
        "salt",
        "pan",
        "dough",
        "stew",
        "garlic",
        "whisk",
        "roast",
    ],
    "sailing": [
        "mast",
        "rudder",
        "harbour",
        "wind",
        "tack",
        "anchor",
        "jib",
        "deck",
        "knot",
        "tide",
        "keel",
        "sail",
        "hull",
        "buoy",
    ],
}


def said(label: str, rng: random.Random) -> str:
    """A sentence of some words of a subject."""
    return f"I wonder about the {' and the '.join(rng.sample(WORDS[label], 4))}."


def examples(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Labelled examples, `count` of each label."""
    rng = random.Random(seed)
    return [{"text": said(label, rng), "label": label} for _ in range(count) for label in WORDS]


def test_rows_of_the_wanted_kind_stay_and_the_rest_goes() -> None:
    rng = random.Random(7)
    rows = [row(said(label, rng), said(label, rng)) for _ in range(30) for label in WORDS]
    found = decided(step_of(Domain, examples=examples(12), keep=["cooking"]), rows)
    gone = {removal.row for removal in found.removals}
    assert len(gone ^ set(range(1, 60, 2))) <= 2
    assert "likeliest 'sailing'" in found.removals[0].detail and "cross-validated" in found.removals[0].detail
    assert (
        found.facts["examples"] == {"cooking": 12, "sailing": 12}
        and found.facts["accuracy"] > found.facts["accuracy_by_chance"] == 0.5
    )


def test_scores_do_not_depend_on_the_order_of_examples() -> None:
    """A second run with reversed examples gives an equal table."""
    rows = [row(said("sailing", random.Random(n)), "ok") for n in range(10)]
    tables = [
        step_of(Domain, examples=found, keep=["cooking"]).sketch(rows, Path())
        for found in (examples(8), examples(8)[::-1])
    ]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("name", ["examples.jsonl", "examples.csv", "examples.json"])
def test_examples_are_read_from_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    found = examples(6)
    if name.endswith("csv"):
        file.write_text("text,label\n" + "".join(f'"{each["text"]}",{each["label"]}\n' for each in found))
    else:
        file.write_text("\n".join(map(json.dumps, found)) if name.endswith("jsonl") else json.dumps(found))
    step = step_of(Domain, examples=str(file), keep=["sailing"])
    assert decided(step, [row(said("cooking", random.Random(1)), "ok")]).facts["examples"] == {
        "cooking": 6,
        "sailing": 6,
    }
    assert load(Domain, dump(step)) == step


def test_file_of_examples_may_lie_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, examples(6))))
    step = step_of(Domain, examples="~/e.jsonl", keep=["sailing"])
    assert list(step.files()) == [tmp_path / "e.jsonl"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"examples": examples(4)}, "4 examples"),
        ({"examples": examples(6), "keep": ["coking"]}, "coking"),
        ({"examples": examples(6), "keep": ["cooking", "sailing"]}, "every label"),
        ({"examples": [{"text": "a", "label": "x"}] * 9, "keep": ["x"]}, "at least 2"),
        ({"examples": examples(6), "min_probability": 1.0}, "below 1"),
        ({"examples": [*examples(6), {"text": " ", "label": "cooking"}]}, "without text"),
        ({"examples": examples(6), "keep": []}, "no label"),
        ({"examples": [{"txt": "a", "label": "b"}]}, "text"),
    ],
)
def test_unusable_examples_or_options_are_refused_at_load(options: dict[str, Any], problem: str) -> None:
    """ConfigError names the problem, such as too few examples, an unknown label or a probability of 1."""
    with pytest.raises(ConfigError, match=problem):
        step_of(Domain, **{"keep": ["cooking"], **options})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "empty"),
        ('{"text": "a"}\n', "no text and label"),
        ("[1, 2\n", "not JSON"),
        ('{"text": "a", "label": "b"}\n', "at least 2"),
    ],
)
def test_a_file_that_does_not_do_is_an_error(content: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=problem):
        decided(step_of(Domain, examples=str(file), keep=["b"]), [row("q", "a")])
    with pytest.raises(ConfigError, match="no file"):
        decided(step_of(Domain, examples=str(tmp_path / "none.jsonl"), keep=["b"]), [row("q", "a")])


def test_a_row_without_text_in_the_field_is_kept_and_counted() -> None:
    found = decided(
        step_of(Domain, examples=examples(6), keep=["cooking"], field="prompt"), [document("sail mast wind")]
    )
    assert (found.removals, found.facts["without_text_kept"]) == ([], 1)
    assert decided(step_of(Domain, examples=examples(6), keep=["cooking"]), []).removals == []
