"""Artefacts in a notebook: classes by kind, short forms, rows as tables."""

from __future__ import annotations

import pickle
from pathlib import Path

import datasets
import pandas
import polars
import pytest

import sartor
from sartor.core.artifacts import Artifact
from sartor.core.errors import ArtifactError, ConfigError, ExtraError


@pytest.fixture
def mixed(tmp_path: Path) -> sartor.Dataset:
    """Questions, a conversation, and one dropped row."""
    rows = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(8)]
    return sartor.curate(rows=[*rows, {"question": "?"}], out=tmp_path / "data", licence="own").dataset


def test_open_returns_the_class_of_the_kind(dataset: Path, adapter: Path) -> None:
    assert type(sartor.open(dataset)) is sartor.Dataset
    assert type(sartor.open(adapter, "adapter")) is sartor.Adapter
    assert sartor.open(sartor.open(dataset)) == sartor.open(str(dataset))


def test_repr_is_one_line_and_html_is_escaped(dataset: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dataset.parent)
    opened = sartor.open(dataset)
    assert (
        repr(opened)
        == f"Dataset(dataset, id {opened.id[:12]}: rows 40, train 30, eval 10, dropped 0, licence CC-BY-4.0)"
    )
    assert repr(sartor.open(adapter)).startswith("Adapter(adapter, id ") and "updates" in repr(sartor.open(adapter))
    strange = sartor.Dataset(Path("/x/<b>"), {"kind": "dataset", "id": "1" * 64})
    assert "<b>" not in strange._repr_html_() and "&lt;b&gt;" in strange._repr_html_()
    assert repr(strange) == "Dataset(/x/<b>, id 111111111111)"
    assert "color" not in opened._repr_html_()


def test_results_are_short(dataset: Path, adapter: Path, tmp_path: Path) -> None:
    made = sartor.curate(rows=[{"text": "a b c"}, {"text": "d e f"}], out=tmp_path / "text")
    assert repr(made).startswith("Curated(dataset=Dataset(") and len(repr(made)) < 200
    assert "<table>" in made._repr_html_() and "rows_per_s" in made._repr_html_()


def test_rows_as_tables_are_the_examples(mixed: sartor.Dataset) -> None:
    examples = list(sartor.read_examples(mixed))
    frame = mixed.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame.columns[:3]) == ["prompt", "reply", "id"]
    assert list(frame["id"]) == [example.id for example in examples]
    assert list(frame["prompt"]) == [example.prompt[-1].text for example in examples]
    assert list(frame["reply"]) == [example.reply for example in examples]
    table = mixed.to_polars("train")
    assert isinstance(table, polars.DataFrame) and set(table["split"]) == {"train"}
    assert table.height + len(mixed.to_pandas("eval")) == len(frame)


def test_to_hf_has_messages_that_chat_templates_take(mixed: sartor.Dataset) -> None:
    rows = mixed.to_hf("train")
    assert isinstance(rows, datasets.Dataset)
    first = rows[0]["messages"]
    assert [set(turn) for turn in first] == [{"role", "content"}] * 2 and isinstance(first[0]["content"], str)
    again = sartor.curate(rows=rows.select_columns(["messages"]), out=mixed.path.with_name("again"))
    assert {row.id for row in sartor.read_examples(again.dataset)} == {
        row.id for row in sartor.read_examples(mixed, "train")
    }


def test_to_hf_has_weights_only_if_a_turn_has_one(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    weighted = [*turns, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 0}]
    made = sartor.curate(
        rows=[{"messages": turns}, {"messages": weighted}], out=tmp_path / "data", licence="own"
    ).dataset
    rows = made.to_hf()
    weights = sorted([turn["weight"] for turn in row["messages"]] for row in rows)
    assert weights == [[None, None], [None, None, None, 0.0]]
    again = sartor.curate(rows=rows.select_columns(["messages"]), out=tmp_path / "again").dataset
    assert {row.id for row in sartor.read_examples(again)} == {row.id for row in sartor.read_examples(made)}


def test_dropped_rows_are_a_split(mixed: sartor.Dataset) -> None:
    dropped = mixed.to_pandas("dropped")
    assert list(dropped["locator"]) == ["rows:9"] and dropped["reason"][0]
    assert len(mixed.to_hf("dropped")) == mixed.to_polars("dropped").height == 1
    with pytest.raises(ConfigError, match="there is no split 'validation'"):
        mixed.to_pandas("validation")  # type: ignore[arg-type]


def test_table_of_a_changed_file_is_refused(mixed: sartor.Dataset) -> None:
    file = next((mixed.path / "examples").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="was changed"):
        mixed.to_pandas()


def test_absent_library_is_named_with_its_extra(mixed: sartor.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ExtraError) as raised:
        mixed.to_pandas()
    assert "[notebook]" in raised.value.remedy
    with pytest.raises(ExtraError) as raised:
        mixed.to_hf()
    assert "[hub]" in raised.value.remedy


def test_artefact_is_a_path_and_pickles(dataset: Path) -> None:
    opened = sartor.open(dataset)
    assert sartor.show(opened, rows=1).as_json()["path"] == str(dataset)
    assert sartor.load_recipe({"base": "starter", "data": opened}).data.path == str(dataset)
    assert pickle.loads(pickle.dumps(opened)) == opened
    assert Artifact(opened.path, opened.manifest) != opened  # another class


def test_error_in_a_notebook_is_two_lines_and_then_whole(tmp_path: Path) -> None:
    """IPython's protocol: what the cell shows, and what `%tb` shows after it."""
    with pytest.raises(ArtifactError) as raised:
        sartor.open(tmp_path / "none")
    short, whole = raised.value._render_traceback_(), raised.value._render_traceback_()
    assert short[0].startswith("ArtifactError: there is nothing at") and "try:" in short[1] and len(short) == 3
    assert any("open_artifact" in line for line in whole)
