"""Tuning and replies from Python: steps as they happen, a loaded model, a Report as tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

import sartor
from sample_data import ROWS
from sartor.core.errors import ArtifactError, ConfigError, RequestError

QUESTIONS = ["switch hall on", "switch den off", "what colour is the sky", "switch loft up please"]


def test_steps_are_the_log(tune_recipe: dict[str, Any], tmp_path: Path) -> None:
    steps: list[sartor.TrainingStep] = []
    adapter = sartor.tune(tune_recipe, tmp_path / "adapter", show=False, on_step=steps.append).adapter
    log = [json.loads(line) for line in (adapter.path / "log.jsonl").read_text().splitlines()]
    logged = [line for line in log if "loss" in line]
    assert [(step.update, step.loss, step.learning_rate) for step in steps] == [
        (line["update"], line["loss"], line["learning_rate"]) for line in logged
    ]
    assert len(steps) == adapter.manifest["run"]["updates"] > 3
    # the last evaluation comes after the last update
    assert steps[-1].fraction == 1 and 0 < steps[-1].seconds_left < steps[3].seconds_left
    assert all(step.tokens_per_s > 0 for step in steps) and steps[0].seconds_left > 0


def test_error_of_a_callback_ends_the_run(tune_recipe: dict[str, Any], tmp_path: Path) -> None:
    def stop(step: sartor.TrainingStep) -> None:
        if step.update == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        sartor.tune(tune_recipe, tmp_path / "adapter", show=False, on_step=stop)
    assert not (tmp_path / "adapter").exists()
    assert sartor.tune(tune_recipe, tmp_path / "adapter", show=False, resume=True).adapter.path.is_dir()


def test_replies_are_those_of_ask(adapter: Path, fp32: None) -> None:
    """In fp32, where orders of summation do not matter to the greedy choice of this base."""
    opened = sartor.open(adapter, "adapter")
    replies = opened.generate(QUESTIONS, sampling={"max_tokens": 12})
    assert replies == [sartor.ask(adapter, text, sampling={"max_tokens": 12}).reply for text in QUESTIONS]
    assert opened.generate(QUESTIONS[0], sampling=sartor.Sampling(max_tokens=12)) == replies[:1]
    assert opened.generate([], sampling={"max_tokens": 12}) == []
    turns = [[{"role": "user", "content": text}] for text in QUESTIONS]
    assert opened.generate(turns, sampling={"max_tokens": 12}) == replies
    with pytest.raises(ConfigError, match="empty"):
        opened.generate([" "])
    with pytest.raises(RequestError, match="role"):
        opened.generate([[{"role": "robot", "content": "x"}]])


def test_system_prompt_of_the_rows_comes_first(tmp_path: Path, tiny_base: Path, tune_recipe: dict[str, Any]) -> None:
    rows = [
        {"prompt": f"{row['messages'][0]['content']}", "completion": row["messages"][1]["content"]} for row in ROWS
    ]
    made = sartor.curate(rows=rows, out=tmp_path / "data", licence="own", system="Be brief.")
    recipe = {**tune_recipe, "data": made.dataset, "budget": {"updates": 1}}
    tuned = sartor.tune(recipe, tmp_path / "adapter", show=False).adapter
    loaded = tuned.load(dtype="float32")
    assert loaded.system == "Be brief."  # type: ignore[attr-defined]
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTIONS[0]}]
    assert loaded.generate([own], sampling={"max_tokens": 6}) == loaded.generate(
        QUESTIONS[0], sampling={"max_tokens": 6}
    )


def test_loaded_model_is_peft_s_with_its_template(adapter: Path) -> None:
    import peft

    opened = sartor.open(adapter, "adapter")
    loaded = opened.load(dtype=torch.float32, device="cpu")
    model, tokenizer = loaded
    assert isinstance(model, peft.PeftModel) and model.dtype == torch.float32 and not model.training
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert "input_ids" in prompt and len(prompt["input_ids"]) > 3
    assert repr(loaded) == "LoadedAdapter(adapter, float32 on cpu)"
    assert opened.load(dtype="bfloat16").model.dtype == torch.bfloat16


def test_bad_options_and_changed_bytes_are_refused(adapter: Path) -> None:
    opened = sartor.open(adapter, "adapter")
    with pytest.raises(ConfigError, match="dtype is 'float8'"):
        opened.load(dtype="float8")
    with pytest.raises(ConfigError, match="no device"):
        opened.load(device="cuda:99")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ArtifactError, match="was changed"):
        opened.load()


def test_report_as_tables(adapter: Path, tmp_path: Path) -> None:
    report = sartor.evaluate(adapter, out=tmp_path / "report").report
    rows = report.to_pandas()
    assert len(rows) == report.manifest["rows"] and {"prompt", "base_reply", "tuned_reply"} <= set(rows.columns)
    metrics = report.to_pandas("metrics")
    primary = report.manifest["primary"]
    assert metrics.loc[primary, "tuned"] == report.manifest["metrics"][primary]["tuned"]
    assert list(metrics.columns) == ["base", "tuned", "difference", "low", "high"]
    assert isinstance(rows, pandas.DataFrame) and repr(report).startswith("Report(")
    with pytest.raises(ConfigError, match="no table"):
        report.to_pandas("plots")  # type: ignore[arg-type]
