"""Remedies of too few updates do what they say; the language of rows is told from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sartor
from sample_data import write_jsonl
from sartor.core import config
from sartor.core.artifacts import open_artifact
from sartor.text.language_id import DetectedLanguage
from sartor.tune import plan_warnings
from sartor.tune.plan_warnings import LEAST_UPDATES, few_updates
from sartor.tune.recipe import ResolvedRecipe
from sartor.tune.sampler import iterate_updates

RECIPE: dict[str, Any] = {
    "base": "starter",
    "data": {"path": "d"},
    "optimizer": {"learning_rate": 1e-3, "batch_tokens": 256},
    "weights": "last",
    "evaluations": 2,
}


def resolved(budget: dict[str, Any], batch: int) -> ResolvedRecipe:
    return config.load(
        ResolvedRecipe, {**RECIPE, "budget": budget, "optimizer": {**RECIPE["optimizer"], "batch_tokens": batch}}
    )


def updates_of(recipe: ResolvedRecipe, row_tokens: list[int]) -> int:
    """Updates that the sampler makes until the first limit of the budget; minutes are none."""
    limits, count, tokens, epochs = recipe.budget, 0, 0, 0.0
    for indices in iterate_updates(row_tokens, recipe.optimizer.batch_tokens, seed=0):
        is_over = (limits.updates and count >= limits.updates) or (limits.tokens and tokens >= limits.tokens)
        if is_over or (limits.epochs and epochs >= limits.epochs - 1e-9):
            return count
        count, tokens = count + 1, tokens + sum(row_tokens[index] for index in indices)
        epochs += len(indices) / len(row_tokens)
    raise AssertionError


@pytest.mark.parametrize(
    ("budget", "batch", "row_tokens"),
    [
        ({"epochs": 10.0}, 256, [800] * 4),  # each row is an update: no smaller batch makes more
        ({"epochs": 1.0}, 256, [240] * 45),
        ({"epochs": 3.0}, 4096, [50] * 400),
        ({"tokens": 4000}, 512, [60] * 500),
        ({"updates": 12}, 256, [60] * 500),
        ({"updates": 100, "epochs": 1.0}, 256, [60] * 100),
        ({"updates": 20, "epochs": 1.0}, 256, [60] * 100),
        # an epoch of less than a batch is an update all the same, and its last one is a smaller one
        ({"epochs": 3.0}, 4096, [18, 20, 23] * 13),
        ({"epochs": 10.0}, 4096, [18, 20, 23] * 13),
        ({"epochs": 10.0}, 100_000, [18, 20, 23] * 13),
        ({"epochs": 10.0}, 4096, [18, 20, 23]),
        ({"tokens": 700}, 4096, [18, 20, 23] * 13),
    ],
)
def test_every_remedy_of_few_updates_makes_enough(budget: dict[str, Any], batch: int, row_tokens: list[int]) -> None:
    recipe = resolved(budget, batch)
    updates = updates_of(recipe, row_tokens)
    assert updates < LEAST_UPDATES
    (warning,) = few_updates(recipe, updates, row_tokens)
    remedies = [remedy for remedy in warning.remedy.split("; or ") if remedy != "more rows"]
    assert remedies
    for remedy in remedies:
        changed = config.load(ResolvedRecipe, config.dump(recipe), remedy.split())
        assert updates_of(changed, row_tokens) >= 0.9 * LEAST_UPDATES, remedy


def test_minutes_are_lengthened_by_what_they_lack() -> None:
    (warning,) = few_updates(resolved({"minutes": 2.0}, 256), 10, [256] * 1000)
    assert warning.remedy == "--budget.minutes 10; or more rows"


def test_a_budget_of_tokens_counts_those_of_rehearsal() -> None:
    """With a fifth of the tokens of rehearsal, 50 updates of the own rows need a quarter more."""
    recipe = resolved({"tokens": 100}, 256)
    rehearsal = replace(recipe.data.rehearsal, path="talk", fraction=0.2)
    with_rehearsal = replace(recipe, data=replace(recipe.data, rehearsal=rehearsal))
    needed = [next(few_updates(one, 1, [256] * 1000)).remedy.split("; ")[0] for one in (recipe, with_rehearsal)]
    assert needed == ["--budget.tokens 12800", "--budget.tokens 16000"]


def test_enough_updates_are_not_warned_of() -> None:
    assert not list(few_updates(resolved({"epochs": 1.0}, 256), LEAST_UPDATES, [256] * LEAST_UPDATES))


def test_sampled_texts_span_the_dataset_without_rehearsal(tmp_path: Path) -> None:
    """At least 100 texts are read, from the beginning and the end of 900 rows."""
    own = [{"prompt": f"fråga nummer {index} om huset", "completion": "svar"} for index in range(900)]
    talk = [{"prompt": f"small talk {index}", "completion": "hello"} for index in range(300)]
    sources = [
        {"path": str(write_jsonl(tmp_path / "a_talk.jsonl", talk)), "licence": "CC0-1.0", "rehearsal": True},
        {"path": str(write_jsonl(tmp_path / "own.jsonl", own)), "licence": "CC0-1.0"},
    ]
    sartor.curate({"sources": sources, "split": {"eval_fraction": 0.0}}, tmp_path / "dataset")
    found = plan_warnings._texts(open_artifact(tmp_path / "dataset"))
    texts = found["rows"]
    assert found["replies"] == [], "an answer of a word has no language"
    assert 100 <= len(texts) <= plan_warnings.ROWS_READ
    assert all("fråga" in text for text in texts)
    numbers = [int(text.split()[2]) for text in texts]
    assert min(numbers) < 100 and max(numbers) > 700


def test_languages_are_of_a_majority_and_only_their_texts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the pieces are too few; several languages count together."""

    def detect(text: str) -> DetectedLanguage:
        return DetectedLanguage(text.partition(" ")[0], 0.4 if "code" in text else 0.9, len(text))

    monkeypatch.setattr(plan_warnings.language_id, "detector", lambda: detect)
    monkeypatch.setattr(plan_warnings, "PIECE_CHARACTERS", 1)
    foreign = plan_warnings._foreign_languages
    assert foreign(["sv a", "en b", "sv c"]) == (["sv"], ["sv a", "sv c"])
    assert foreign(["sv a", "de b", "en c", "sv d", "en e"]) == (["sv", "de"], ["sv a", "de b", "sv d"])
    assert foreign(["sv a", "en b"]) == foreign(["en a"]) == ([], [])
    assert foreign(["et code", "et code"]) == ([], [])


def test_rows_of_a_template_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined, they would predict each other, and an unknown language would look known."""
    measured: list[Sequence[str]] = []

    def nats_per_letter(texts: Sequence[str], *_: object) -> float:
        measured.append(texts)
        return 1.0

    rows = [f"Stroj číslo {index} hlásí chybu ložiska, co má obsluha udělat?" for index in range(100)]
    monkeypatch.setattr(plan_warnings, "_texts", lambda dataset: {"rows": rows})
    czech = DetectedLanguage("cs", 0.99, 300)
    monkeypatch.setattr(plan_warnings.language_id, "detector", lambda: lambda text: czech)
    monkeypatch.setattr(plan_warnings, "_nats_per_letter", nats_per_letter)
    anything: Any = None
    assert list(plan_warnings.unknown_language(anything, anything, anything)) == []
    sample, reference = measured
    assert set(sample) <= set(rows) and len(sample) > 10
    longest = max(map(len, reference))
    assert longest <= max(map(len, rows))
    most = plan_warnings.MEASURED_CHARACTERS + plan_warnings.ROW_CHARACTERS
    assert all(sum(map(len, texts)) < most for texts in measured)


@pytest.mark.parametrize(
    ("text", "count"), [("hello, 42", 5), ("你好吗", 9), ("ひらがな", 8), ("한국", 4), ("हिन्दी", 6), ("", 0)]
)
def test_a_character_counts_as_the_letters_that_say_as_much(text: str, count: int) -> None:
    assert plan_warnings.letters(text) == count
