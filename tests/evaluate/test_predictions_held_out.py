"""An Adapter of many clients is judged on what all of them hold out and none trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, write_artifact
from sartor.core.records import Example, Message, Origin
from sartor.evaluate.predictions import held_out


def example(name: str) -> Example:
    return Example((Message.of("user", name), Message.of("assistant", "yes")), (Origin("rows", name),))


@pytest.fixture
def adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """Of two clients: what b holds out twice is c's own."""
    held = {"b": {"train": ["b1", "b2"], "eval": ["b3", "c1"]}, "c": {"train": ["c1", "c2"], "eval": ["c3", "b3"]}}
    made = {name: write_artifact(tmp_path / name, "dataset", lambda part, name=name: {"name": name}) for name in held}

    def read(dataset: Artifact, split: str = "") -> list[Example]:
        return [example(one) for one in held[dataset.manifest["name"]][split]]

    monkeypatch.setattr(parquet_io, "read_examples", read)
    facts: dict[str, Any] = {"parents": [one.as_parent() for one in made.values()]}
    return write_artifact(tmp_path / "adapter", "adapter", lambda part: facts)


def test_what_one_holds_out_and_another_trained_on_is_left_out(adapter: Artifact, tmp_path: Path) -> None:
    found = held_out(adapter, None, 200, tmp_path)
    assert sorted(one.prompt[0].text for one in found.examples) == ["b3", "c3"]
    assert found.left_out == {"trained_on": 1}


def test_a_file_is_compared_with_the_rows_of_all(adapter: Artifact, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("question,answer\nb1,yes\nc2,yes\nnew,yes\n")
    found = held_out(adapter, tmp_path / "rows.csv", 200, tmp_path / "media")
    assert [one.prompt[0].text for one in found.examples] == ["new"] and found.left_out == {"trained_on": 2}
