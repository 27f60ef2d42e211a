"""A held-out row is written as the tuning wrote its rows: reasoning and empty thinking blocks by the same rules."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sartor
from sample_data import write_jsonl
from sartor.core import parquet_io
from sartor.core.artifacts import Artifact, open_artifact, write_artifact
from sartor.core.errors import SourceError
from sartor.evaluate.predictions import HeldOut, TrainingForm, fitting
from sartor.tune.dataset_encoding import encode_rows
from tool_prompts import TEMPLATES

QWEN_3 = "qwen 3's form"


@pytest.fixture
def dataset(tmp_path: Path) -> Artifact:
    """Conversations of two turns; every second one reasons in both."""
    rows = []
    for index in range(8):
        turns = [{"role": "user", "content": f"what {index}"}, {"role": "assistant", "content": "sky"}]
        turns += [{"role": "user", "content": "and"}, {"role": "assistant", "content": f"blue {index}"}]
        if index % 2:
            turns[1]["reasoning_content"], turns[3]["reasoning_content"] = f"since {index}", f"as {index}"
        rows.append({"messages": turns})
    sources = []
    for split, part in (("train", rows[:4]), ("eval", rows[4:])):
        file = write_jsonl(tmp_path / f"{split}.jsonl", part)
        sources.append({"path": str(file), "licence": "CC0-1.0", "split": split})
    return sartor.curate({"sources": sources}, tmp_path / "data").dataset


def adapter_tuned_by(folder: Path, data: dict[str, str]) -> Artifact:
    return write_artifact(folder, "adapter", lambda part: {"recipe": {"data": data}})


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"reasoning": "drop"},
        {"reasoning": "last", "empty_think": "drop"},
        {"reasoning": "drop", "empty_think": "drop"},
    ],
)
def test_held_out_rows_are_written_as_the_tuning_wrote_its_own(
    rules: dict[str, str], dataset: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sartor.evaluate.predictions.context_tokens", lambda model: 0)
    chat = TEMPLATES[QWEN_3].chat()
    recipe = sartor.load_recipe({"base": "starter", "data": {"path": str(dataset.path), **rules}})
    learnt = {row.example_id: (row.ids, row.learnt) for row in encode_rows(dataset, recipe, chat).held_out}
    form = TrainingForm.of(adapter_tuned_by(tmp_path / "adapter", rules))
    bare: Any = SimpleNamespace(chat=chat, model=None)
    base = bare if not rules.get("empty_think") else SimpleNamespace(chat=chat.without_empty_think(), model=None)
    rows = fitting(base, HeldOut(list(parquet_io.read_examples(dataset, "eval")), dataset.path), form)
    encoded = {row.id: base.chat.encode(row) for row in rows.examples}
    assert {id: (row.ids, row.learnt) for id, row in encoded.items()} == learnt and len(learnt) == 4
    texts = [chat.tokenizer.decode(row.ids) for row in encoded.values()]
    assert any("as 5" in text for text in texts) == (rules.get("reasoning") != "drop")
    assert not any("since 5" in text for text in texts)


def test_rows_that_the_tuning_would_leave_out_are_counted(
    dataset: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The template leaves out the reasoning of earlier turns, which `keep` wants."""
    monkeypatch.setattr("sartor.evaluate.predictions.context_tokens", lambda model: 0)
    base: Any = SimpleNamespace(chat=TEMPLATES[QWEN_3].chat(), model=None)
    form = TrainingForm.of(adapter_tuned_by(tmp_path / "adapter", {"reasoning": "keep"}))
    examples = list(parquet_io.read_examples(dataset, "eval"))
    rows = fitting(base, HeldOut(examples, dataset.path), form)
    assert len(rows.examples) == 2 and rows.left_out == {"template": 2}
    reasoned = [row for row in examples if row.messages[-1].reasoning_content]
    with pytest.raises(SourceError, match="leaves out reasoning that data.reasoning=keep keeps"):
        fitting(base, HeldOut(reasoned, dataset.path), form)


def test_evaluate_measures_by_the_rules_of_the_tuning(dataset: Artifact, tiny_base: Path, tmp_path: Path) -> None:
    """The loss of the Report is that of the run's own evaluation, on the same rows."""
    data = {"path": str(dataset.path), "reasoning": "drop", "rehearsal": "none"}
    recipe = {"base": str(tiny_base), "data": data, "budget": {"updates": 1}, "evaluations": 1, "method": {"rank": 2}}
    sartor.tune(recipe, tmp_path / "adapter", show=False)
    report = sartor.evaluate(tmp_path / "adapter", out=tmp_path / "report").report
    losses = [row["tuned_loss"] for row in parquet_io.read_file(report.path / "rows.parquet")]
    learnt = open_artifact(tmp_path / "adapter", "adapter").manifest["run"]["loss"]["eval"]
    # all replies have as many tokens
    assert len(losses) == 4 and sum(losses) / 4 == pytest.approx(learnt, rel=1e-4)
