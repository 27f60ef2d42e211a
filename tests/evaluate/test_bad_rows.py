"""Rows that cannot be measured well: each is refused or warned of with what is missing and what would do."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sartor
from sample_data import ROWS, write_jsonl
from sartor.core import parquet_io
from sartor.core.artifacts import open_artifact, write_artifact
from sartor.core.errors import ConfigError, ModelError, SourceError
from sartor.core.lineage import ancestry
from sartor.core.records import Example, Message
from sartor.evaluate.evaluation import _document_warnings
from sartor.evaluate.predictions import held_out


def chat_rows(count: int, reply: str = "", group: str = "") -> list[dict[str, Any]]:
    """New rows that no Dataset of the tests has."""
    fields = {"group": group} if group else {}
    return [
        {"question": f"open window number {number}", "answer": reply or f"open:{number}", **fields}
        for number in range(count)
    ]


def test_rows_that_were_all_trained_on_are_refused(adapter: Path, tmp_path: Path) -> None:
    trained = [row for row in ROWS if row not in held_out_rows(adapter)]
    with pytest.raises(SourceError) as error:
        sartor.evaluate(adapter, data=write_jsonl(tmp_path / "trained.jsonl", trained))
    assert f"{len(trained)} of {len(trained)} were trained on" in error.value.problem
    assert "not trained on" in error.value.remedy


def test_rows_that_were_trained_on_in_other_words_are_left_out(tiny_base: Path, tmp_path: Path) -> None:
    """Masked by a step, with another system prompt, label or white space, or as the better side of a pair."""
    rows = [
        {"prompt": f"Who helps with part {n}? Mail clerk{n}@firm.example", "completion": "stock"} for n in range(20)
    ]
    source = {"path": write_jsonl(tmp_path / "rows.jsonl", rows), "licence": "own"}
    steps = [{"kind": "personal_data"}]
    sartor.curate({"sources": [source], "steps": steps, "split": {"eval_fraction": 0.2}}, tmp_path / "data")
    recipe = {"base": str(tiny_base), "data": {"path": str(tmp_path / "data")}, "budget": {"updates": 1}}
    sartor.tune(recipe, tmp_path / "a", show=False)
    adapter, media = open_artifact(tmp_path / "a"), tmp_path / "media"
    found = held_out(adapter, write_jsonl(tmp_path / "same.jsonl", rows), 200, media)
    assert len(found.examples) == 4 and found.left_out == {"trained_on": 16}
    plain = [{"prompt": f"Who helps with part {n}?", "completion": "stock"} for n in range(20)]
    source["path"] = write_jsonl(tmp_path / "plain.jsonl", plain)
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0.2}}, tmp_path / "plain")
    sartor.tune({**recipe, "data": {"path": str(tmp_path / "plain")}}, tmp_path / "b", show=False)
    for changed in (
        [{"prompt": f"  who helps with  PART {n}? ", "completion": "Stock"} for n in range(20)],
        [{"system": "Be brief.", **row} for row in plain],
        [{"prompt": row["prompt"], "chosen": "stock", "rejected": "sales"} for row in plain],
    ):
        found = held_out(open_artifact(tmp_path / "b"), write_jsonl(tmp_path / "x.jsonl", changed), 200, media)
        assert len(found.examples) == 4 and found.left_out == {"prompt_trained_on": 16}


def test_file_with_the_columns_of_the_training_rows_is_read(tiny_base: Path, tmp_path: Path) -> None:
    lines = "".join(f"Lager {n} meldet Hitze;kuehlen\n" for n in range(20))
    (tmp_path / "rows.csv").write_text(f"Meldung;Ursache\n{lines}")
    source = {
        "path": str(tmp_path / "rows.csv"),
        "licence": "own",
        "fields": {"prompt": "Meldung", "completion": "Ursache"},
    }
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0.2}}, tmp_path / "data")
    recipe = {"base": str(tiny_base), "data": {"path": str(tmp_path / "data")}, "budget": {"updates": 1}}
    sartor.tune(recipe, tmp_path / "a", show=False)
    (tmp_path / "new.csv").write_text("Meldung;Ursache\nPumpe 7 steht;reparieren\n")
    found = held_out(open_artifact(tmp_path / "a"), tmp_path / "new.csv", 200, tmp_path / "media")
    assert [row.reply for row in found.examples] == ["reparieren"]


def test_file_without_usable_rows_names_the_first(adapter: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "empty.jsonl", [{"prompt": "a", "completion": ""}])
    with pytest.raises(SourceError, match=r"the first, empty.jsonl:1, is left out as empty_answer: the last reply"):
        sartor.evaluate(adapter, data=file)


@pytest.mark.parametrize(
    ("group", "remedy"), [("", "split.eval_fraction of 0.2 or more"), ("ward 3", "rows of other groups")]
)
def test_rows_of_which_none_can_be_held_out_say_what_would_do(
    tmp_path: Path, tune_recipe: dict[str, Any], group: str, remedy: str
) -> None:
    """A tenth of five rows is none, and one group is never parted: `eval_fraction above 0` would not help."""
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", chat_rows(5, group=group))), "licence": "CC0-1.0"}
    sartor.curate({"sources": [source]}, tmp_path / "few")
    recipe = {**tune_recipe, "data": {"path": str(tmp_path / "few")}, "budget": {"updates": 1}}
    sartor.tune(recipe, tmp_path / "adapter", show=False)
    with pytest.raises(SourceError, match="holds out no row in the split eval") as error:
        sartor.evaluate(tmp_path / "adapter")
    assert remedy in error.value.remedy and "5 rows" in error.value.problem


def held_out_rows(adapter: Path) -> list[dict[str, Any]]:
    (dataset,) = ancestry.find_parents(open_artifact(adapter, "adapter"), "dataset")
    prompts = {row.prompt[0].text for row in parquet_io.read_examples(dataset, "eval")}
    return [row for row in ROWS if row["messages"][0]["content"] in prompts]


def test_rows_of_one_group_are_warned_of(adapter: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    file = write_jsonl(tmp_path / "one.jsonl", chat_rows(8, group="ward 3"))
    report = sartor.evaluate(adapter, data=file, notice=lines.append).report
    (warning,) = report.manifest["warnings"]
    assert warning["reason"] == "few_groups" and "8 rows are in 1 group" in warning["problem"]
    assert "6 groups or more" in warning["remedy"] and any(line.startswith("warning: ") for line in lines)
    comparison = report.manifest["metrics"]["exact_match"]
    assert (comparison["low"], comparison["high"]) == (-1.0, 1.0)
    assert "8 rows are in 1 group" in (report.path / "report.html").read_text()


def test_rows_of_one_class_are_warned_of(adapter: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "same.jsonl", chat_rows(8, reply="refund"))
    (warning,) = sartor.evaluate(adapter, data=file).report.manifest["warnings"]
    assert warning["reason"] == "one_reply" and "all 8 replies are 'refund'" in warning["problem"]


def test_reply_of_no_length_is_left_out_and_counted(adapter: Path, tmp_path: Path) -> None:
    rows = [*chat_rows(8), {"question": "close the window", "answer": ""}]
    report = sartor.evaluate(adapter, data=write_jsonl(tmp_path / "empty.jsonl", rows)).report
    assert report.manifest["left_out"] == {"empty_answer": 1} and report.manifest["rows"] == 8
    with pytest.raises(SourceError) as error:
        sartor.evaluate(adapter, data=write_jsonl(tmp_path / "none.jsonl", rows[-1:]), out=tmp_path / "report")
    assert "empty_answer" in error.value.problem


def test_scores_that_are_no_numbers_are_refused(adapter: Path, tmp_path: Path) -> None:
    def fill(folder: Path) -> Mapping[str, Any]:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(adapter / name, folder)
        weights = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in weights if "v_proj.lora_B" in name)
        save_file({**weights, name: torch.full_like(weights[name], 3e38)}, folder / "adapter_model.safetensors")
        return open_artifact(adapter, "adapter").manifest

    broken = write_artifact(tmp_path / "broken", "adapter", fill)
    documents = [{"text": f"a document about window {number}"} for number in range(8)]
    with pytest.raises(ModelError) as error:
        sartor.evaluate(broken.path, data=write_jsonl(tmp_path / "rows.jsonl", documents))
    assert (
        "finite" in error.value.problem
        and "--optimizer.learning_rate" in error.value.remedy
        and not (tmp_path / "broken-report").exists()
    )


def test_documents_are_measured_by_their_loss(adapter: Path, tmp_path: Path) -> None:
    """They get no reply, which scores 0; a later version of their Release is measured by the loss too."""
    documents = [{"text": f"a document about window {number}"} for number in range(8)]
    file = write_jsonl(tmp_path / "documents.jsonl", documents)
    found = sartor.evaluate(adapter, data=file, scorer="loss").as_json()
    assert found["primary"] == "loss" and found["metrics"]["loss"]["tuned"] > 0
    (warning,) = found["warnings"]
    assert warning["reason"] == "documents" and "8 of 8 rows" in warning["problem"]
    assert sartor.evaluate(adapter, data=file, replace=True).as_json()["primary"] == "loss"


def test_some_documents_are_warned_of() -> None:
    rows = [
        Example((Message.of("user", "close it"), Message.of("assistant", "yes")), ()),
        Example((Message.of("assistant", "a document"),), ()),
    ]
    (warning,) = _document_warnings(rows)
    assert "1 of 2 rows" in warning.problem and not _document_warnings(rows[:1])


def test_loss_is_no_scorer_of_rows_with_replies(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no loss of these rows"):
        sartor.evaluate(adapter, data=write_jsonl(tmp_path / "rows.jsonl", chat_rows(6)), scorer="loss")
