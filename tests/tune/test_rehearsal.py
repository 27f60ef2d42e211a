"""Rehearsal by `loss: kl`: rows that hold a model at the distributions of its untouched base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sartor
from killed_tuning import SETTINGS, tune
from sample_data import write_jsonl
from sartor.core.artifacts import open_artifact
from sartor.models.base import open_base
from sartor.models.losses.loss_backend import LossOptions
from sartor.models.packing import TokenizedExample
from sartor.tune.rehearsal import TOP_TOKENS, with_soft_targets

TALK = [("how are you", "fine, thank you"), ("what is new", "not much, and you"), ("good morning", "hello there")]


@pytest.fixture
def talk(tmp_path: Path) -> str:
    rows = [{"prompt": prompt, "completion": f"{reply} {index}"} for index, (prompt, reply) in enumerate(TALK * 4)]
    source = {"path": str(write_jsonl(tmp_path / "talk.jsonl", rows)), "licence": "CC0-1.0"}
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0.0}}, tmp_path / "talk")
    return str(tmp_path / "talk")


def talk_rows(base: Any, talk: str) -> list[TokenizedExample]:
    return [base.chat.encode(example) for example in sartor.read_examples(open_artifact(talk, "dataset"))]


def test_soft_targets_are_the_bases_own_predictions(tiny_base: Path, talk: str) -> None:
    base = open_base(str(tiny_base), bits=32)
    plain = talk_rows(base, talk)
    rows = with_soft_targets(base, plain)
    assert [row.example_id for row in rows] == [row.example_id for row in plain]
    assert all(row.soft and row.soft.ids.shape == (row.supervised_tokens, TOP_TOKENS) for row in rows)
    losses, _ = base.path(base.model, rows, LossOptions()).losses(rows)
    assert float(losses.abs().max()) < 1e-5


@pytest.mark.usefixtures("fp32")
def test_rows_cost_nothing_before_the_model_has_moved(tmp_path: Path, tune_recipe: dict[str, Any], talk: str) -> None:
    """The first update's loss is that of the run's own rows alone, over the tokens of all."""
    totals = {}
    for loss in ("none", "cross_entropy", "kl"):
        rehearsal: Any = "none" if loss == "none" else {"path": talk, "fraction": 0.5, "loss": loss}
        recipe = {**tune_recipe, "data": {**tune_recipe["data"], "rehearsal": rehearsal}, "budget": {"updates": 1}}
        run = tune(recipe, tmp_path / loss).adapter.manifest["run"]
        lines = [json.loads(line) for line in (tmp_path / loss / "log.jsonl").read_text().splitlines()]
        totals[loss] = next(line["loss"] for line in lines if "loss" in line) * run["supervised_tokens"]
    assert totals["kl"] == pytest.approx(totals["none"], rel=1e-4)
    assert totals["cross_entropy"] > 1.2 * totals["none"]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_every_objective_takes_it(tmp_path: Path, tune_recipe: dict[str, Any], talk: str, objective: str) -> None:
    rows = [{"prompt": f"say {n}", "chosen": f"{n}", "rejected": "no"} for n in range(12)]
    source = {"path": str(write_jsonl(tmp_path / "pairs.jsonl", rows)), "licence": "CC0-1.0"}
    sartor.curate({"sources": [source]}, tmp_path / "pairs")
    rehearsal = {"path": talk, "fraction": 0.5, "loss": "kl"}
    recipe = {**tune_recipe, **SETTINGS, "objective": objective, "budget": {"updates": 2}}
    made = tune({**recipe, "data": {"path": str(tmp_path / "pairs"), "rehearsal": rehearsal}}, tmp_path / "a")
    assert made.adapter.manifest["run"]["updates"] == 2
