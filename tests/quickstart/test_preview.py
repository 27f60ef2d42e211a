"""First rows of a file as they would be learnt from, before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest

import sartor
from sartor.core.errors import SartorError


def test_table_with_known_columns_shows_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\n" + "".join(f"q{number},a{number}\n" for number in range(20)))
    shown = sartor.preview(file, rows=3)
    assert shown.columns == ["question", "answer"] and shown.form != "unknown"
    assert [[message.text for message in row.messages] for row in shown.rows] == [
        ["q0", "a0"],
        ["q1", "a1"],
        ["q2", "a2"],
    ]
    assert shown.drops == []


def test_unknown_columns_are_listed_until_they_are_named(tmp_path: Path) -> None:
    file = tmp_path / "fragen.csv"
    file.write_bytes("Frage;Antwort\nWas kostet es?;Nichts für Größere.\n".encode("cp1252"))
    shown = sartor.preview(file)
    assert shown.form == "unknown" and shown.columns == ["Frage", "Antwort"] and shown.rows == []
    shown = sartor.preview(file, fields={"prompt": "Frage", "completion": "Antwort"}, system="Be short.")
    assert [message.role for message in shown.rows[0].messages] == ["system", "user", "assistant"]
    assert shown.rows[0].reply == "Nichts für Größere." and shown.encoding


def test_rows_that_cannot_be_used_have_their_reason(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\nno json\n')
    shown = sartor.preview(file)
    assert len(shown.rows) == 1 and len(shown.drops) == 2 and all(drop.reason for drop in shown.drops)


def test_file_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SartorError):
        sartor.preview(tmp_path / "none.csv")


def test_rows_of_a_recipe_are_shown_after_its_row_steps(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("".join(f'{{"prompt": "p{number}", "completion": "<b>a{number}</b>"}}\n' for number in range(9)))
    second.write_text(
        '{"prompt": "q", "completion": "too short"}\n{"prompt": "r", "completion": "long enough, now"}\n'
    )
    steps = ["markup", {"length": {"min_words": 1}}, {"rules": [{"match": "short"}]}, "exact_duplicates"]
    recipe = {"sources": [{"path": str(first)}, {"path": str(second)}], "steps": steps}
    shown = sartor.preview_recipe(recipe, rows=4)
    assert [row.reply for row in shown.rows] == ["a0", "a1", "long enough, now"]
    assert [drop.reason for drop in shown.drops] == ["rule:1"]
    assert shown.later_steps == ["exact_duplicates"]


def test_recipe_that_drops_all_rows_ends(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"prompt": "p", "completion": "a {number}"}}\n' for number in range(2000)))
    recipe = {"sources": [{"path": str(file)}], "steps": [{"length": {"min_words": 5}}]}
    shown = sartor.preview_recipe(recipe, rows=3)
    assert shown.rows == [] and len(shown.drops) == 3
