"""`contamination` finds the items of an evaluation set in the rows, and nothing that merely sounds alike."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rows import decided, document, row, step_of
from sartor.core.errors import ConfigError
from sartor.core.records import Example
from sartor.curate.steps.contamination import Contamination

RNG = random.Random(0)
VOCABULARY = [f"{a}{b}{c}" for a in "bdklmst" for b in "aeiou" for c in ("n", "r", "st")]


def prose(words: int, rng: random.Random = RNG) -> str:
    """Random words."""
    return " ".join(rng.choices(VOCABULARY, k=words))


ITEMS = (
    [(prose(30), prose(3)) for _ in range(20)]
    + [(prose(10), "yes") for _ in range(10)]
    + [(prose(5), "no") for _ in range(5)]
)


@pytest.fixture
def evaluation_set(tmp_path: Path) -> Path:
    """An evaluation set of long, short and very short questions."""
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(json.dumps({"question": asked, "answer": said}) for asked, said in ITEMS))
    return file


def overlapping(file: Path, examples: list[Example], **options: Any) -> list[int]:
    """The rows that go."""
    return [
        removal.row for removal in decided(step_of(Contamination, against=[str(file)], **options), examples).removals
    ]


def test_planted_items_are_found_with_set_item_and_overlap(evaluation_set: Path) -> None:
    """The detail of each drop names the evaluation set, the item and the overlap."""
    rows = [row(prose(25), prose(40)) for _ in range(50)] + [row(asked, prose(20)) for asked, _ in ITEMS]
    found = decided(Contamination((str(evaluation_set),)), rows)
    assert [removal.row for removal in found.removals] == list(range(50, 85))
    assert found.removals[0].detail == f"100% of test.jsonl:1 of the evaluation set {evaluation_set} stands in it"
    assert (found.removals[0].score, found.facts["sets"][0]["rows"], found.facts["sets"][0]["found_only_whole"]) == (
        1.0,
        35,
        5,
    )


def test_item_is_found_in_longer_and_differently_written_text(evaluation_set: Path) -> None:
    """Upper case, punctuation, a later turn, a document or a missing end does not hide it."""
    asked = ITEMS[0][0]
    words = asked.split()
    rows = [
        row(f"{prose(30)} {asked.upper()}? {prose(9)}", "a"),
        row("Q: " + ", ".join(words) + "!", "a"),
        document(f"{prose(50)} {asked} {prose(50)}"),
        row("hello there", "a", "and", f"{prose(4)}: {asked}"),
        row(" ".join(words[:24]), "a"),
    ]
    assert overlapping(evaluation_set, rows) == [0, 1, 2, 3, 4]


def test_less_than_the_threshold_stays(evaluation_set: Path) -> None:
    words = ITEMS[0][0].split()
    rows = [row(" ".join(words[:17]), "a"), row(" ".join(words[:10]), "a"), row(" ".join(reversed(words)), "a")]
    assert overlapping(evaluation_set, rows) == []
    assert overlapping(evaluation_set, rows, threshold=0.1) == [0]


def test_a_very_short_item_is_found_only_whole(evaluation_set: Path) -> None:
    asked = ITEMS[-1][0]
    assert overlapping(evaluation_set, [row(f"{asked} {prose(3)}", "no"), row(asked.title() + "?", "yes")]) == [1]


def test_a_word_or_two_that_stand_in_many_rows_are_no_item(tmp_path: Path) -> None:
    file = tmp_path / "greetings.jsonl"
    file.write_text(json.dumps({"question": "Hello there", "answer": "Hi"}))
    assert overlapping(file, [row("hello there", "Good morning"), row("Hello there!", "hi")]) == [1]


def test_an_instruction_that_all_items_share_is_no_item(tmp_path: Path) -> None:
    instruction = "Answer the following question with exactly one of the letters A B C or D and say nothing else"
    file = tmp_path / "test.jsonl"
    asked = [prose(14, random.Random(n)) for n in range(30)]
    file.write_text("\n".join(json.dumps({"question": f"{instruction}: {each}", "answer": "A"}) for each in asked))
    assert overlapping(file, [row(f"{instruction}: {prose(14)}", "B"), row(asked[3], "C")]) == [1]


@pytest.mark.parametrize(
    "name", ["t.csv", "t.parquet", "t.json", "t.txt", "t.md", "odd.jsonl", "messages.jsonl", "folder"]
)
def test_every_form_of_a_set_is_read(name: str, tmp_path: Path) -> None:
    asked = [prose(30) for _ in range(3)]
    file = tmp_path / name
    match name:
        case "t.csv":
            file.write_text("question,answer\n" + "".join(f'"{each}",yes\n' for each in asked))
        case "t.parquet":
            pq.write_table(pa.table({"question": asked, "answer": ["y"] * 3}), file)
        case "t.json":
            file.write_text(json.dumps([{"instruction": each, "output": "y"} for each in asked]))
        case "t.txt" | "t.md":
            file.write_text("\n\n".join(asked))
        case "odd.jsonl":
            file.write_text(
                "\n".join(
                    json.dumps({"id": n, "stem": {"text": each}, "choices": ["a", "b"]})
                    for n, each in enumerate(asked)
                )
            )
        case "messages.jsonl":
            file.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": each}]}) for each in asked))
        case _:
            file.mkdir()
            (file / "a.txt").write_text("\n\n".join(asked))
            (file / "b.png").write_bytes(b"\x89PNG")
    assert overlapping(file, [row(each, "a") for each in asked] + [row(prose(30), "a")]) == [0, 1, 2]


def test_rows_of_a_set_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"question": prose(20), "answer": "y"}) + '\n{"broken\n[1]\n')
    facts = decided(Contamination((str(file),)), [row("q", "a")]).facts["sets"][0]
    assert (facts["items"], facts["unread"]) == (1, {"bad_json": 1, "not_an_object": 1})


@pytest.mark.parametrize("content", ["", "{bad", "\x00\x01"])
def test_a_set_without_an_item_is_an_error(content: str, tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match="no item"):
        decided(Contamination((str(file),)), [row("q", "a")])


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"against": []}, "no evaluation set"),
        ({"ngram": 2}, "5 to 100"),
        ({"threshold": 0}, "above 0"),
        ({}, "missing"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        step_of(Contamination, **({"against": ["x"], **options} if options else {}))


def test_a_set_that_is_not_there_or_leaves_its_asset_is_an_error() -> None:
    for path, problem in (("nowhere.jsonl", "names no file"), ("asset:nosuch/x", "no asset")):
        with pytest.raises(ConfigError, match=problem):
            decided(Contamination((path,)), [row("q", "a")])


def test_a_set_that_changed_is_read_anew(evaluation_set: Path) -> None:
    rows = [row(prose(30), "a")]
    assert overlapping(evaluation_set, rows) == []
    evaluation_set.write_text(json.dumps({"question": rows[0].messages[0].text, "answer": "yes, it is changed"}))
    assert overlapping(evaluation_set, rows) == [0]


def test_batches_of_any_size_find_the_same(evaluation_set: Path) -> None:
    rows = [row(asked, prose(5)) for asked, _ in ITEMS] + [row(prose(20), prose(20)) for _ in range(9)]
    step = Contamination((str(evaluation_set),))
    found = [[(r.row, r.detail) for r in decided(step, rows, batch).removals] for batch in (1, 5, 1000)]
    assert found[0] == found[1] == found[2] and len(found[0]) == len(ITEMS)
    assert decided(step, []).removals == []
