"""A native multi-modal base from rows to replies: what a recipe's `targets` name is tuned, reported and asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sartor
import tiny_native
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ConfigError
from sartor.core.records import Message, Part
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models.tuned_model import open_tuned


@pytest.fixture
def recipe(tmp_path: Path, fp32: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    rows = []
    for number in range(16):
        (tmp_path / f"{number}.png").write_bytes(tiny_native.picture(number))
        asked = [{"type": "image", "image": f"{number}.png"}, {"type": "text", "text": "what is it"}]
        answer = {"role": "assistant", "content": ("light", "dark")[number % 2]}
        rows.append({"messages": [{"role": "user", "content": asked}, answer]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(tmp_path / "rows.jsonl"), "licence": "CC0-1.0"}
    sartor.curate({"sources": [source], "split": {"eval_fraction": 0.25}}, tmp_path / "data")
    return {
        "base": str(tiny_native.write("llava", tmp_path / "llava")),
        "data": {"path": str(tmp_path / "data")},
        "method": {
            "kind": "lora",
            "rank": 4,
            "targets": {"language": "all-linear", "projector": "full", "tower": "none"},
        },
        "budget": {"epochs": 4},
        "optimizer": {"learning_rate": 1e-2, "batch_tokens": 256},
    }


def test_a_native_base_is_tuned_measured_and_asked(recipe: dict[str, Any], tmp_path: Path) -> None:
    tuned = sartor.tune(recipe, tmp_path / "adapter", show=False)
    loss = tuned.as_json()["loss"]
    assert loss["last"] < loss["first"]
    assert tuned.as_json()["packed"]
    report = sartor.evaluate(tmp_path / "adapter").as_json()
    assert report["metrics"]["loss"]["tuned"] < report["metrics"]["loss"]["base"]
    assert report["left_out"] == {}
    base, model = open_tuned(open_artifact(tmp_path / "adapter", "adapter"))
    turns = [Message("user", (Part("image", media="0.png"), Part("text", "what is it")))]
    prompt = base.chat.prompt_ids(turns, folder=tmp_path)
    reply = generate(model, [prompt], stop=base.chat.stops, pad=base.chat.pad, sampling=Sampling(4))[0]
    assert base.chat.decode(reply.ids) in ("light", "dark") or reply.ids


@pytest.mark.parametrize("part", ["projector", "tower"])
def test_a_text_base_has_no_parts_to_train(
    tune_recipe: dict[str, Any], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune_recipe["method"] |= {"targets": {"language": "all-linear", part: "all-linear"}}
    with pytest.raises(ConfigError, match=f"targets.{part} is all-linear"):
        sartor.tune(tune_recipe, tmp_path / "adapter", show=False)
