"""The test split: drawn by group, never read by tuning, and what a release is then measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import sartor
from release_fixtures import PASSES, keys, probe  # noqa: F401
from sample_data import ROWS, recipe_on, write_jsonl
from sartor.core.artifacts import Artifact, open_artifact, write_artifact
from sartor.core.errors import ConfigError, GateError, SourceError
from sartor.core.parquet_io import read_examples, read_file
from sartor.core.records import Example, Message
from sartor.core.splits import split_group
from sartor.evaluate.predictions import held_out
from sartor.learn import training_data
from sartor.models.base import open_chat
from sartor.release.gate import check_test
from sartor.release.release import gate
from sartor.tune.dataset_encoding import encode_rows
from sartor.tune.recipe import Recipe

SPLIT = {"eval_fraction": 0.25, "test_fraction": 0.25}


@pytest.fixture
def split_dataset(tmp_path: Path, rows_file: Path) -> Path:
    source = {"path": str(rows_file), "licence": "CC-BY-4.0"}
    return sartor.curate({"sources": [source], "split": SPLIT}, tmp_path / "dataset").dataset.path


@pytest.fixture
def split_adapter(tmp_path: Path, split_dataset: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    recipe = {**recipe_on(split_dataset, tiny_base), "budget": {"updates": 2}}
    return Path(sartor.tune(recipe, tmp_path / "adapter", show=False).adapter.path)


def splits_of(dataset: Path) -> dict[str, set[str]]:
    groups: dict[str, set[str]] = {}
    for row in read_examples(open_artifact(dataset)):
        groups.setdefault(row.split, set()).add(split_group(row))
    return groups


def curated_splits(folder: Path, rows: list[Any], split: dict[str, Any], **source: Any) -> dict[str, set[str]]:
    write_jsonl(folder / "rows.jsonl", rows)
    recipe = {"sources": [{"path": str(folder / "rows.jsonl"), **source}], "split": split}
    return splits_of(sartor.curate(recipe, folder / "out", replace=True).dataset.path)


def test_groups_are_whole_and_fractions_hold(tmp_path: Path) -> None:
    rows = [{**row, "group": f"g{index // 2}"} for index, row in enumerate(ROWS)]
    groups = curated_splits(tmp_path, rows, SPLIT)
    assert {name: len(members) for name, members in groups.items()} == {"train": 10, "eval": 5, "test": 5}
    assert len(set.union(*groups.values())) == 20


def test_another_eval_fraction_does_not_move_the_test_rows(tmp_path: Path) -> None:
    one, two = (curated_splits(tmp_path, ROWS, {**SPLIT, "eval_fraction": fraction}) for fraction in (0.1, 0.5))
    assert one["test"] == two["test"] and one["eval"] != two["eval"]


def test_without_a_fraction_the_split_is_as_before(tmp_path: Path) -> None:
    one, two = (curated_splits(tmp_path, ROWS, split) for split in ({"eval_fraction": 0.25}, SPLIT))
    assert set(one) == {"train", "eval"} and set(two) == {"train", "eval", "test"}


@pytest.mark.parametrize("split", [{"test_fraction": 0.9}, {"test_fraction": -0.1}, {"test_fraction": float("nan")}])
def test_fractions_that_leave_nothing_are_refused(tmp_path: Path, split: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="test_fraction"):
        curated_splits(tmp_path, ROWS, split)


def test_tuning_reads_no_test_row(split_dataset: Path, tiny_base: Path) -> None:
    recipe = sartor.load_recipe(
        {**recipe_on(split_dataset, tiny_base), "data": {"path": str(split_dataset), "eval_rows": 99}}
    )
    assert isinstance(recipe, Recipe)
    data = encode_rows(open_artifact(split_dataset), recipe, open_chat(tiny_base))
    ids = {row.example_id for row in (*data.train, *data.held_out)}
    assert len(ids) == 30 and not ids & {row.id for row in read_examples(open_artifact(split_dataset), "test")}


def test_release_needs_a_report_on_the_test_split(split_adapter: Path, keys: Path, split_dataset: Path) -> None:  # noqa: F811
    sartor.evaluate(split_adapter)
    terms: dict[str, Any] = {"name": "switch", "version": "1.0", "key": keys, "waivers": PASSES}
    with pytest.raises(GateError, match="test: dataset keeps 10 rows for the release") as error:
        sartor.release(split_adapter, **terms)
    assert f"sartor evaluate {split_adapter} --split test" in error.value.remedy
    tested = sartor.evaluate(split_adapter, split="test").as_json()
    assert (tested["split"], tested["rows"], tested["chosen"]["evaluations_known"]) == ("test", 10, 1)
    test_ids = {row.id for row in read_examples(open_artifact(split_dataset), "test")}
    assert {row["id"] for row in read_file(Path(tested["report"]) / "rows.parquet")} == test_ids
    # a later Report on other rows does not take its place
    sartor.evaluate(split_adapter, replace=True)
    released = sartor.release(split_adapter, **terms)
    gate = released.release.manifest["gate"]["test"]
    assert gate["outcome"] == "pass" and "at least 1 evaluation of these rows" in gate["detail"]


def test_gain_remedy_of_the_gate_names_the_test_split(split_adapter: Path) -> None:
    metric = {"base": 0.5, "tuned": 0.5, "difference": 0.0, "low": -1.0, "high": 1.0}
    facts = {"primary": "f1", "metrics": {"f1": metric}, "groups": 3, "forgetting": {"skipped": ""}, "split": "test"}
    checks = gate(open_artifact(split_adapter), Artifact(split_adapter, {**facts, "rows": 3}), ())
    assert "larger split.test_fraction" in checks["gain"].remedy


def test_dataset_without_a_test_split_says_so(adapter: Path) -> None:
    with pytest.raises(SourceError, match="no row in the split test"):
        sartor.evaluate(adapter, split="test")
    with pytest.raises(ConfigError, match="two sets of rows"):
        sartor.evaluate(adapter, split="test", data=adapter)


def retrained_dataset(folder: Path, live: Artifact, texts: Sequence[str]) -> Artifact:
    """What a retrain writes from corrections of these prompts, all answered with `no`."""
    origins = (sartor.Origin("inbox:x", "1"),)
    rows = [
        Example((Message.of("user", text), Message.of("assistant", "no")), origins, split="train") for text in texts
    ]
    training_data._write(folder, [live, live], rows, [])
    return open_artifact(folder)


def test_retrain_learns_no_row_of_a_test_group(tmp_path: Path, split_dataset: Path) -> None:
    """Also where the test split is that of a Dataset two retrains before."""
    dataset = open_artifact(split_dataset)
    tested = next(read_examples(dataset, "test")).prompt[-1].text
    first = retrained_dataset(tmp_path / "first", dataset, [tested, "new"])
    second = retrained_dataset(tmp_path / "second", first, [tested, "newer"])
    for written, text in ((first, "new"), (second, "newer")):
        assert [row.prompt[-1].text for row in read_examples(written)] == [text]


def test_gate_asks_a_retrained_version_for_its_ancestor_split(tmp_path: Path, split_dataset: Path) -> None:
    dataset = open_artifact(split_dataset)
    retrained = retrained_dataset(tmp_path / "data", dataset, ["new"])
    plain = retrained_dataset(tmp_path / "plain", retrained_dataset(tmp_path / "far", dataset, ["far"]), ["near"])

    def adapter(name: str, *parents: dict[str, str]) -> Artifact:
        return write_artifact(tmp_path / name, "adapter", lambda part: {"parents": list(parents)})

    for name, parent in (("retrained", retrained), ("again", plain)):
        version = adapter(name, parent.as_parent())
        assert check_test(version, {"split": "test", "rows": 10})["test"].outcome == "pass"
        refused = check_test(version, {"split": "eval"})["test"]
        assert refused.outcome == "fail" and "dataset keeps 10 rows for the release" in refused.detail
        rows = held_out(version, None, 200, tmp_path, "test").examples
        assert {row.id for row in rows} == {row.id for row in read_examples(dataset, "test")}
    # rows that were only rehearsed, and what was learnt before for another task, keep nothing for this release
    other = write_jsonl(tmp_path / "other.jsonl", ROWS[:4])
    own = sartor.curate({"sources": [{"path": str(other)}]}, tmp_path / "own").dataset
    rehearsed = adapter("rehearsed", own.as_parent(), {**dataset.as_parent(), "role": "rehearsal"})
    started = adapter("started", own.as_parent(), open_artifact(tmp_path / "retrained").as_parent())
    assert check_test(rehearsed, {"split": "eval"}) == check_test(started, {"split": "eval"}) == {}
