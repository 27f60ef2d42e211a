"""An Adapter of many clients is judged on what all of them hold out and none trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, write_artifact
from sartor.core.errors import SourceError
from sartor.core.records import Example, Message, Origin
from sartor.evaluate.predictions import held_out


def example(name: str) -> Example:
    return Example((Message.of("user", name), Message.of("assistant", "yes")), (Origin("rows", name),))


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """Of two clients: what b holds out twice is c's own."""
    held = {"b": {"train": ["b1", "b2"], "eval": ["b3", "c1"]}, "c": {"train": ["c1", "c2"], "eval": ["c3", "b3"]}}
    made = {
        name: write_artifact(tmp_path / name, "dataset", lambda part, name=name: {"name": name, "parents": []})
        for name in held
    }

    def read(dataset: Artifact, split: str = "") -> list[Example]:
        return [example(one) for one in held[dataset.manifest["name"]][split]]

    monkeypatch.setattr(parquet_io, "read_examples", read)
    facts: dict[str, Any] = {"parents": [one.as_parent() for one in made.values()]}
    return write_artifact(tmp_path / "adapter", "adapter", lambda part: facts)


def test_what_one_holds_out_and_another_trained_on_is_left_out(adapter: Artifact, tmp_path: Path) -> None:
    found = held_out(adapter, None, 200, tmp_path)
    assert sorted(one.prompt[0].text for one in found.examples) == ["b3", "c3"]
    assert found.left_out == {"trained_on": 1}


def test_held_out_rows_that_were_all_trained_on_are_named(
    adapter: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = {"train": ["b1", "c1"], "eval": ["c1", "b1"]}
    monkeypatch.setattr(parquet_io, "read_examples", lambda dataset, name: [example(one) for one in split[name]])
    with pytest.raises(SourceError, match="all 2 rows .* were trained on") as caught:
        held_out(adapter, None, 200, tmp_path)
    assert "--data FILE" in caught.value.remedy


@pytest.mark.parametrize("split", ["eval", "test"])
def test_remedy_for_rows_rated_bad_can_be_typed(
    adapter: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    rows = {"train": [], "eval": [replace(example("b1"), rating=-1)]}
    rows["test"] = rows["eval"]
    monkeypatch.setattr(parquet_io, "read_examples", lambda dataset, name: rows[name])
    with pytest.raises(SourceError, match="rated bad") as caught:
        held_out(adapter, None, 200, tmp_path, split)
    assert ("in place of --split test" in caught.value.remedy) == (split == "test")


def test_a_file_is_compared_with_the_rows_of_all(adapter: Artifact, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\nb1,yes\nc2,yes\nnew,yes\n")
    found = held_out(adapter, tmp_path / "rows.csv", 200, tmp_path / "media")
    assert [one.prompt[0].text for one in found.examples] == ["new"] and found.left_out == {"trained_on": 2}
