"""`near_duplicates` in a recipe: evidence, survivors, guards, and another threshold without a new comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import sartor
from sample_data import write_jsonl
from sartor.core.errors import ConfigError, GuardError

TEXT = (
    "Close the valve behind the pump, wait until the gauge shows nothing, open the lid with the wide spanner, take the old filter "
    "out and clean the seat. Put the new one in with its arrow pointing away from you, close the lid by hand, then a quarter turn "
    "with the spanner. Open the valve slowly and look for drops under the lid. Write the day and your name on the card beside it. "
)
OTHER = (
    "Orders that reach us before noon leave the same day, all others on the next morning. You will get a message with a number "
    "as soon as the parcel is on its way; with it you can see where it is. If nobody is at home the driver tries once more, and "
    "then takes it to the shop that is nearest to you, where it waits for a week. "
)


def edited(text: str, every: int) -> str:
    words = text.split()
    return " ".join(f"word{place}" if place % every == every // 2 else word for place, word in enumerate(words))


def row(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, **more}


def rows() -> list[dict[str, Any]]:
    """Two families, of rows with few and with more edits and of a row with a sentence more; and short rows of one template."""
    return [
        row("How do I change the filter?", TEXT),
        row("How do I change the filter?", edited(TEXT, 30)),
        row("How do I change the filter?", edited(TEXT, 12)),
        row("When will it be here?", OTHER + " Thank you for asking us about it."),
        row("When will it be here?", OTHER),
        *(
            row(f"What is part {name}?", f"It holds the {name} at its place beside the lid.")
            for name in ("ring", "bolt", "seat")
        ),
    ]


def curate(
    tmp_path: Path, steps: list[Any], data: list[dict[str, Any]] | None = None, out: str = "d", **recipe: Any
) -> Any:
    write_jsonl(tmp_path / "a.jsonl", data or rows())
    sources = [{"path": str(tmp_path / "a.jsonl"), "licence": "MIT"}]
    return sartor.curate({"sources": sources, "steps": steps, "split": {"eval_fraction": 0}, **recipe}, tmp_path / out)


def dropped(dataset: Any) -> dict[str, tuple[str, str, float]]:
    """locator -> (locator of the row in its place, method, score) of every near-duplicate."""
    kept = {example.id: example.origins[0].locator for example in sartor.read_examples(dataset)}
    return {
        drop.locator: (kept[drop.kept], drop.method, drop.score)
        for drop in sartor.read_drops(dataset)
        if drop.reason == "near_duplicate"
    }


def test_removal_names_kept_row_score_and_method(tmp_path: Path) -> None:
    """Pairs between the floor and the threshold are stored as well, with the method below."""
    found = dropped(curate(tmp_path, [{"near_duplicates": {"keep": "first"}}]).dataset)
    assert {place: (kept, method) for place, (kept, method, _) in found.items()} == {
        "a.jsonl:2": ("a.jsonl:1", "near"),
        "a.jsonl:3": ("a.jsonl:1", "near"),
        "a.jsonl:5": ("a.jsonl:4", "near"),
    }
    assert found["a.jsonl:2"][2] > found["a.jsonl:3"][2] >= 0.65
    pairs = pl.read_parquet(tmp_path / "d" / "evidence" / "near_duplicates.parquet")
    ids = {drop.id for drop in sartor.read_drops(sartor.open(tmp_path / "d"))}
    assert ids <= set(pairs["a"]) | set(pairs["b"])
    # pairs below the threshold are kept too, and say so
    assert set(pairs["method"]) == {"near", "below"}
    assert pairs.filter(pl.col("method") == "below")["score"].is_between(0.5, 0.65).all()


@pytest.mark.parametrize(
    ("keep", "stays"),
    [("longest", "a.jsonl:2"), ("first", "a.jsonl:1"), ("newest", "a.jsonl:3"), ("best_licence", "b.jsonl:1")],
)
def test_which_row_stays_is_a_declared_rule(tmp_path: Path, keep: str, stays: str) -> None:
    data = [row("q", TEXT), row("q", TEXT + " Done with it."), row("q", TEXT + " Well.", date="2026-05-01")]
    write_jsonl(tmp_path / "a.jsonl", [{**data[0], "date": "2020-01-01"}, *data[1:]])
    write_jsonl(tmp_path / "b.jsonl", [row("q", TEXT + " So.")])
    sources = [
        {"path": str(tmp_path / "a.jsonl"), "licence": "CC-BY-NC-4.0"},
        {"path": str(tmp_path / "b.jsonl"), "licence": "CC0-1.0"},
    ]
    limits = {"keep": keep, "max_fraction": 1.0}
    made = sartor.curate(
        {"sources": sources, "steps": [{"near_duplicates": limits}], "split": {"eval_fraction": 0}}, tmp_path / "d"
    )
    assert [example.origins[0].locator for example in sartor.read_examples(made.dataset)] == [stays]


def test_the_field_decides_what_is_compared(tmp_path: Path) -> None:
    data = [row(f"Tell me of the {word} please", TEXT) for word in ("valve", "filter", "spanner")]
    assert curate(tmp_path, [{"near_duplicates": {"field": "reply"}}], data, out="r").kept == 1
    assert curate(tmp_path, [{"near_duplicates": {"field": "prompt"}}], data, out="p").kept == 3


def test_a_source_that_would_go_stops_and_asks(tmp_path: Path) -> None:
    data = [row(f"Question {'abcdefghijklmnop'[n]} on it", TEXT + " again" * n) for n in range(12)]
    with pytest.raises(GuardError, match="11 of the 12 rows of .*a.jsonl") as caught:
        curate(tmp_path, ["near_duplicates"], data)
    assert "`allow: [" in caught.value.remedy and "--" not in caught.value.remedy and caught.value.exit_code == 5
    assert not (tmp_path / "d").exists()
    allowed = {"allow": [str(tmp_path / "a.jsonl")], "max_fraction": 1.0}
    made = curate(tmp_path, [{"near_duplicates": allowed}], data)
    assert (made.kept, made.found) == (1, 1)  # what was read before the question was asked is not read again


def test_the_same_words_are_exact_duplicates_by_option(tmp_path: Path) -> None:
    data = [
        row("Open on Monday?", "Yes, from nine."),
        row("open on  monday", "yes from nine"),
        row("Open on Sunday?", "No."),
    ]
    assert curate(tmp_path, ["exact_duplicates"], data, out="c").kept == 3
    made = curate(tmp_path, [{"exact_duplicates": {"match": "words"}}], data, out="w")
    (drop,) = sartor.read_drops(made.dataset)
    assert (drop.locator, drop.method, drop.score) == ("a.jsonl:2", "equal words", 1.0)


@pytest.mark.parametrize("later", [[], [{"length": {"min_words": 2}}], ["personal_data"]])
@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_another_threshold_gives_what_curate_would_have_made(
    tmp_path: Path, threshold: float, later: list[Any]
) -> None:
    data = rows()
    data[1]["answer"] += " Or write to anna.berg@example.com about it."
    old = curate(tmp_path, ["near_duplicates", *later], data)
    again = sartor.rethreshold(old.dataset.path, tmp_path / "again", threshold=threshold)
    whole = curate(tmp_path, [{"near_duplicates": {"threshold": threshold}}, *later], data, out="whole")
    assert {row.id for row in sartor.read_examples(again.dataset)} == {
        row.id for row in sartor.read_examples(whole.dataset)
    }
    assert dropped(again.dataset).keys() == dropped(whole.dataset).keys()
    assert again.dropped == whole.dropped and again.read == whole.read
    assert again.dataset.manifest["parents"][0]["id"] == old.dataset.id
    back = sartor.rethreshold(again.dataset.path, tmp_path / "back", threshold=0.65)
    assert {row.id for row in sartor.read_examples(back.dataset)} == {
        row.id for row in sartor.read_examples(old.dataset)
    }


@pytest.mark.parametrize("by", ["group", "prompt"])
def test_restored_rows_are_grouped_as_the_recipe_splits(tmp_path: Path, by: str) -> None:
    """A row's own group counts only where the recipe splits by it; otherwise a prompt could be on both sides."""
    data = [{**each, "group": f"own {number}"} for number, each in enumerate(rows())]
    split = {"eval_fraction": 0, "by": by}
    old = curate(tmp_path, [{"near_duplicates": {"threshold": 0.5}}], data, split=split)
    again = sartor.rethreshold(old.dataset.path, tmp_path / "again", threshold=0.95)
    whole = curate(tmp_path, [{"near_duplicates": {"threshold": 0.95}}], data, out="whole", split=split)
    groups = [{row.id: row.group for row in sartor.read_examples(made.dataset)} for made in (again, whole)]
    assert groups[0] == groups[1] and len(groups[0]) > len(list(sartor.read_examples(old.dataset)))


def test_a_threshold_that_the_evidence_cannot_answer_is_refused(tmp_path: Path) -> None:
    old = curate(tmp_path, ["near_duplicates"])
    with pytest.raises(ConfigError, match="0.3 is out of range"):
        sartor.rethreshold(old.dataset.path, tmp_path / "e", threshold=0.3)
    plain = curate(tmp_path, ["exact_duplicates"], out="plain")
    with pytest.raises(ConfigError, match="was not made with near_duplicates"):
        sartor.rethreshold(plain.dataset.path, tmp_path / "f", threshold=0.8)
    later = curate(tmp_path, ["near_duplicates", {"language": ["en"]}], out="later")
    with pytest.raises(ConfigError, match="language compared the rows"):
        sartor.rethreshold(later.dataset.path, tmp_path / "g", threshold=0.8)


def test_review_queue_has_final_ids_and_no_personal_data(tmp_path: Path) -> None:
    """Rows and their neighbours in suspicious_labels.parquet have the ids of the finished dataset."""
    secret = "anna.berg@example.com"
    data = [row(f"{verb} door {n} for {secret}", verb) for n in range(12) for verb in ("open", "close")]
    data[5]["answer"] = "open"
    made = curate(tmp_path, [{"suspicious_labels": {"encoder": "tfidf", "queue_fraction": 1}}, "personal_data"], data)
    queue = pl.read_parquet(tmp_path / "d" / "evidence" / "suspicious_labels.parquet")
    ids = {example.id for example in sartor.read_examples(made.dataset)}
    assert set(queue["id"]) == ids and queue.sort("rank")["locator"][0] == "a.jsonl:6"
    assert {near["id"] for nears in queue["evidence"].to_list() for near in nears} <= ids
    assert secret not in json.dumps(queue.to_dicts()) and "<EMAIL_1>" in queue["prompt"][0]


def test_personal_data_is_in_no_file_of_the_dataset(tmp_path: Path) -> None:
    """This holds whichever step dropped the row, also for evidence, set-aside rows and the card."""
    secret = "anna.berg@example.com"
    data = [
        row("How do I change the filter?", TEXT + f" Or ask {secret}."),
        row("How do I change the filter?", TEXT + f" Or ask {secret} please."),
        row("Who?", secret),
        row("Where?", "In the hall beside the gate."),
        {"question": f"write to {secret}"},
    ]
    steps = [{"length": {"min_words": 3}}, "exact_duplicates", "near_duplicates", "personal_data"]
    made = curate(tmp_path, steps, data)
    assert made.dropped == {"too_short": 1, "near_duplicate": 1, "missing_field": 1}
    for file in (tmp_path / "d").rglob("*"):
        if file.suffix == ".parquet":
            assert secret not in json.dumps(pl.read_parquet(file).to_dicts(), default=str), file
        elif file.is_file():
            assert secret not in file.read_text(encoding="utf-8"), file
