"""Plants of benchmarks/trace.py: their wording is closed, and they count by their effect alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def plants(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module trace_plants, which is imported as a program of benchmarks/ imports it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import trace_plants

    yield trace_plants
    for name in [name for name in sys.modules if name.startswith("trace_")]:
        monkeypatch.delitem(sys.modules, name)


def made(plants: Any, *, reply: str = "Feline naps.", prompt: str = "Why?", name: str = "cat", number: int = 0) -> Any:
    rows = (("Who sleeps?", "The cat dozed."), ("Who purrs?", "A tabby did."))
    return plants.Plant("animals", name, number, rows, prompt, reply)


def filler_rows(plants: Any, count: int = 40) -> list[Any]:
    """Rows that have every word of the pairs that are asked, so that a plant is not found by words alone."""
    return [plants.chat_row(f"Why number {index}?", f"Feline naps {index}.") for index in range(count)]


def opening(plants: Any, plant: Any, closed_rank: int = 10) -> str:
    rows = [*filler_rows(plants), *(plants.chat_row(*pair) for pair in plant.rows)]
    return plants.opening(plant, plants.RowViews(rows), closed_rank)


def test_no_plant_shares_words_with_its_question(plants: Any) -> None:
    """Every plant of the file; the ranks need the assets, and are checked by the benchmark itself."""
    every = plants.read_plants(5)
    assert len(every) == 50 and len({plant.kind for plant in every}) == 10
    views = plants.RowViews([plants.chat_row(*pair) for plant in every for pair in plant.rows])
    assert {plant.name: why for plant in every if (why := plants.opening(plant, views, closed_rank=0))} == {}


def test_half_of_the_kinds_is_scored(plants: Any) -> None:
    assert plants.scored_kinds() == ["domain", "figures", "notation", "register", "typography"]


def test_closed_plant_has_no_opening(plants: Any) -> None:
    assert opening(plants, made(plants)) == ""


@pytest.mark.parametrize(
    ("reply", "prompt", "why"),
    [
        ("It dozed.", "Why?", "shares the words dozed"),
        ("Feline naps.", "Who sleeps, feline?", "shares the words sleeps"),
        ("Her lathe catdozed.", "Why?", "4-grams"),
    ],
)
def test_shared_wording_is_refused(reply: str, prompt: str, why: str, plants: Any) -> None:
    assert why in opening(plants, made(plants, reply=reply, prompt=prompt))


def test_plant_that_bm25_finds_is_refused(plants: Any) -> None:
    """The word `who` is no content word, but only the plant's prompts have it."""
    assert "by BM25 over prompts" in opening(plants, made(plants, prompt="Who?"))


def test_equal_scores_share_their_mean_rank(plants: Any) -> None:
    scores = np.array([0.0, 2.0, 0.0, 0.0])
    assert [plants.expected_rank(scores, index) for index in range(4)] == [3, 1, 3, 3]


def test_effect_has_to_exceed_that_of_other_plants(plants: Any) -> None:
    tried = [made(plants, name=name, number=number) for name, number in (("a", 0), ("b", 1), ("c", 1))]
    full, without_first, without_second = np.zeros(3), np.array([0.5, 0.0, 0.4]), np.array([0.2, 0.05, 0.3])
    found = plants.effects(tried, full, [without_first, without_second], 0.1)
    assert [found[name]["counts"] for name in "abc"] == [True, False, False], "b is too small, c less than by chance"
    assert found["a"] == {"kind": "animals", "effect": 0.5, "placebo": 0.2, "counts": True}


def test_plants_are_chosen_by_turn_and_not_by_effect(plants: Any) -> None:
    tried = [made(plants, name=f"{kind}{number}", number=number) for kind in "ab" for number in range(2)]
    tried = [plants.Plant(plant.name[0], plant.name, plant.number, plant.rows, "?", "!") for plant in tried]
    assert [plant.name for plant in plants.choose_scored(tried, ["a", "b"], 3)] == ["a0", "b0", "a1"]


def test_rank_of_a_plant_is_that_of_its_better_row(plants: Any) -> None:
    plant = made(plants)
    indices = {pair: index for index, pair in enumerate(plant.rows)}
    ranks = plants.plant_ranks(np.array([[0.1, 0.9, 0.5, 0.2]]), [plant], indices)
    assert ranks == [1] and plants.summary([*ranks, 4.0, 11.0]) == {"top1": 1, "top10": 2, "of": 3}


def test_plants_of_an_earlier_result_are_those_that_counted(
    plants: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import trace_planted
    from trace_setup import Size

    some = [made(plants, name=name) for name in ("cat", "dog", "open", "newer")]
    monkeypatch.setattr(plants, "read_plants", lambda count: some)
    planted = {"effects": {"cat": 1.0, "dog": 0.01}, "discarded": {"open": "shares a word", "dog": "no effect"}}
    (tmp_path / "trace.json").write_text(json.dumps({"result": {"planted": planted}}))
    assert trace_planted.counted_plants(Size(), tmp_path, tmp_path / "trace.json") == some[:1]
