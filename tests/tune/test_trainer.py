"""Dataset -> Adapter: what is learnt is counted, what cannot be is refused, and two runs give the same bits."""

from __future__ import annotations

import json
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import sartor
from sample_data import ROWS, write_jsonl
from sartor.core.artifacts import open_artifact
from sartor.core.errors import ArtifactError, ConfigError, ModelError, SourceError
from sartor.core.filesystem import file_digest
from sartor.models.losses import transformers_backend
from sartor.models.losses.loss_backend import ActivationCache
from sartor.tune import objectives, optimizers, sampler
from sartor.tune.recipe import ResolvedOptimizer, StopCriteria
from sartor.tune.training_loop import Counters, TrainingRun, learning_rate

pytestmark = pytest.mark.usefixtures("fp32")


def tune(recipe: dict[str, Any], out: Path, **changes: Any) -> dict[str, Any]:
    return dict(sartor.tune({**recipe, **changes}, out, show=False).as_json())


def test_the_loss_falls_and_the_json_says_what_was_done(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    said = tune(tune_recipe, tmp_path / "a", budget={"epochs": 8})
    assert said["loss"]["last"] < said["loss"]["first"] - 0.1
    assert 0 < said["loss"]["eval"] < said["loss"]["first"]
    assert said["updates"] > 8
    assert 0 < said["supervised_tokens"] < said["tokens"]
    assert said["tokens_per_s"] > 0 and said["peak_memory_bytes"] > 1e7
    assert said["packed"] is True


def test_adapter_is_reproducible_and_depends_on_seed(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    """Two runs with a seed write the same bytes, a third with another seed does not."""
    digests = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tune(tune_recipe, tmp_path / name, seed=seed)
        digests.append(file_digest(tmp_path / name / "adapter_model.safetensors"))
    assert digests[0] == digests[1] != digests[2]


def test_micro_batches_change_memory_and_nothing_else(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    losses = []
    for name, size in (("a", 4096), ("b", 40)):
        compute = {"micro_batch_tokens": size}
        losses.append(tune(tune_recipe, tmp_path / name, compute=compute)["loss"]["last"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_adapter_is_peft_directory_with_manifest_log_and_plot(adapter: Path) -> None:
    """The manifest has licences, sources and parents; the log has each update and evaluations."""
    manifest = open_artifact(adapter, "adapter").manifest
    assert set(manifest["files"]) == {"adapter_config.json", "adapter_model.safetensors", "log.jsonl", "loss.png"}
    assert manifest["base"]["licence"] == "Apache-2.0"
    assert manifest["licence"] == "Apache-2.0 AND CC-BY-4.0"
    assert manifest["recipe"]["method"]["rank"] == 8
    assert manifest["sources"][0]["sha256"]
    assert manifest["parents"][0]["kind"] == "dataset"
    lines = [json.loads(line) for line in (adapter / "log.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    assert len(updates) == manifest["run"]["updates"]
    assert {"loss", "grad_norm", "learning_rate", "tokens", "tokens_per_s", "memory_bytes", "wall_s"} <= set(
        updates[0]
    )
    assert [line for line in lines if "eval_loss" in line]
    assert (adapter / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("budget", "updates"), [({"updates": 3}, 3), ({"tokens": 130}, 1), ({"epochs": 0.01}, 1), ({"minutes": 1e-6}, 1)]
)
def test_each_budget_ends_the_run(tmp_path: Path, tune_recipe: dict[str, Any], budget: dict, updates: int) -> None:
    assert tune(tune_recipe, tmp_path / "a", budget=budget)["updates"] == updates


def test_a_row_too_long_is_left_out_and_counted_never_cut(
    tmp_path: Path, tune_recipe: dict[str, Any], rows_file: Path
) -> None:
    long = {"messages": [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "yes"}]}
    write_jsonl(rows_file, [*ROWS, long])
    sartor.curate({"sources": [str(rows_file)], "split": {"eval_fraction": 0.25}}, tmp_path / "d")
    notices: list[str] = []
    recipe = {**tune_recipe, "data": {"path": str(tmp_path / "d"), "max_length_tokens": 128}}
    made = sartor.tune(recipe, tmp_path / "a", show=False, notice=notices.append)
    assert [len(ids) for ids in made.adapter.manifest["left_out"].values()] == [1]
    assert "left out: 1 rows, too_long" in notices


def test_zero_supervised_tokens_are_refused_writing_nothing(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    """The SourceError counts the rows that are too long."""
    data = {**tune_recipe["data"], "max_length_tokens": 5}
    with pytest.raises(SourceError, match="no training row with a supervised token is left .too_long: 40"):
        tune(tune_recipe, tmp_path / "a", data=data)
    assert not (tmp_path / "a").exists()


def test_a_plan_of_no_row_counts_those_that_are_left_out(tune_recipe: dict[str, Any]) -> None:
    forecast = sartor.plan({**tune_recipe, "data": {**tune_recipe["data"], "max_length_tokens": 5}})
    assert forecast.as_json()["left_out"] == {"too_long": 40}
    assert [refusal.reason for refusal in forecast.refusals] == ["nothing_supervised"]


def test_rows_that_the_template_refuses_are_counted(
    tmp_path: Path, rows_file: Path, tune_recipe: dict[str, Any]
) -> None:
    import tiny

    strict = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
        + tiny.CHATML
    )
    base = tiny.write_base(tmp_path / "strict", strict)
    system = {"messages": [{"role": "system", "content": "be brief"}, *ROWS[0]["messages"]]}
    write_jsonl(rows_file, [*ROWS, system])
    sartor.curate({"sources": [str(rows_file)], "split": {"eval_fraction": 0}}, tmp_path / "d")
    made = sartor.tune({**tune_recipe, "base": str(base), "data": str(tmp_path / "d")}, tmp_path / "a", show=False)
    assert ["no system turn" in reason for reason in made.adapter.manifest["left_out"]] == [True]


def test_a_base_without_chat_template_is_said(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    import tiny

    notices: list[str] = []
    base = tiny.write_base(tmp_path / "plain", None)
    sartor.tune({**tune_recipe, "base": str(base)}, tmp_path / "a", show=False, notice=notices.append)
    assert any("no chat template" in line for line in notices)


def test_what_is_about_to_be_trained_is_said_first(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    notices: list[str] = []
    sartor.tune(tune_recipe, tmp_path / "a", show=False, notice=notices.append)
    for word in ("30 rows", "tokens", "supervised", "parameters trained", "float32"):
        assert word in notices[0]


def test_model_that_cannot_pack_reaches_the_same_loss(
    tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the plain path, whose last loss equals the packed one within 1e-4."""
    packed = tune(tune_recipe, tmp_path / "a")
    monkeypatch.setattr(transformers_backend, "matches_single_rows", lambda *args: (False, float("inf")))
    plain = tune(tune_recipe, tmp_path / "b")
    assert (packed["packed"], plain["packed"]) == (True, False)
    assert packed["loss"]["last"] == pytest.approx(plain["loss"]["last"], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"data": {"path": "/nowhere"}}, ArtifactError, "there is nothing at /nowhere"),
        ({"base": "/nowhere"}, ModelError, "there is no base '/nowhere'"),
        ({"method": {"targets": ["no_such_proj"]}}, ConfigError, "no_such_proj"),
        (
            {"optimizer": {"learning_rate": 1e30, "batch_tokens": 128}, "budget": {"epochs": 50}},
            ModelError,
            "the loss is",
        ),
    ],
)
def test_what_cannot_be_tuned_is_refused_and_leaves_nothing(
    tmp_path: Path, tune_recipe: dict[str, Any], change: dict, error: type, said: str
) -> None:
    with pytest.raises(error, match=said):
        tune(tune_recipe, tmp_path / "a", **change)
    assert not (tmp_path / "a").exists()
    assert not list(tmp_path.glob(".a.part*"))


def test_an_existing_output_is_refused_before_the_base_is_opened(
    tmp_path: Path, tune_recipe: dict[str, Any], adapter: Path
) -> None:
    with pytest.raises(ConfigError, match="exists"):
        tune({**tune_recipe, "base": "/nowhere"}, adapter)


def test_the_rate_warms_up_and_falls() -> None:
    settings = ResolvedOptimizer(learning_rate=1.0, warmup_fraction=0.1)
    rates = [learning_rate(settings, fraction) for fraction in (0.0, 0.05, 0.1, 0.55, 1.0)]
    assert rates == pytest.approx([0.05, 0.5, 1.0, 0.5, 0.0])
    assert learning_rate(ResolvedOptimizer(learning_rate=1.0, schedule="constant"), 0.9) == 1.0


def test_an_epoch_shows_every_row_once_and_shuffles_anew() -> None:
    lengths = [3, 5, 2, 9, 4, 1, 7]
    stream = sampler.iterate_updates(lengths, 8, seed=3)
    epochs = []
    for _ in range(2):
        seen: list[int] = []
        while len(seen) < len(lengths):
            seen += next(stream)
        epochs.append(seen)
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 2
    assert epochs[0] != epochs[1]


def test_sft_is_the_mean_over_the_update_however_it_is_cut() -> None:
    losses, weights = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 1.0, 2.0])
    whole = objectives.sft(losses, weights, 4.0)
    parts = objectives.sft(losses[:1], weights[:1], 4.0) + objectives.sft(losses[1:], weights[1:], 4.0)
    assert whole == parts == pytest.approx(15 / 4)


def test_the_nearest_limit_decides() -> None:
    from sartor.tune.recipe import StopCriteria

    counters = Counters(updates=5, tokens=50)
    assert counters.fraction(StopCriteria(updates=10, tokens=500), epoch_tokens=100, wall_s=0) == 0.5
    assert counters.fraction(StopCriteria(epochs=1), epoch_tokens=100, wall_s=0) == 0.5


def test_prove_stops_on_difference_and_changes_no_weights(
    tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient equal the plain computation's within 1e-5; a wrong cache is a ModelError."""
    recipe = {**tune_recipe, "method": {**tune_recipe["method"], "targets": {"layers": "top-1"}}}
    said: list[str] = []
    proof = sartor.tune(recipe, tmp_path / "a", prove=True, show=False, notice=said.append).as_json()["proof"]
    assert proof["loss"] <= proof["limit"] == 1e-5 and 0 <= proof["gradient"] <= 1e-5
    assert any(line.startswith("proved on") for line in said)
    unproved = sartor.tune(recipe, tmp_path / "b", show=False)
    weights = "adapter_model.safetensors"
    assert file_digest(tmp_path / "a" / weights) == file_digest(tmp_path / "b" / weights), "a proof changes nothing"
    assert unproved.as_json()["proof"] is None
    right = ActivationCache.inputs
    monkeypatch.setattr(ActivationCache, "inputs", lambda *arguments: right(*arguments) * 1.001)
    with pytest.raises(ModelError, match="off the plain computation"):
        sartor.tune(recipe, tmp_path / "c", prove=True, show=False)


def test_fp16_scale_changes_no_weights_and_skips_overflows(
    tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here in fp32, where a power of two scales without rounding; the scaler is what an fp16 GPU gets."""
    plain = tune(tune_recipe, tmp_path / "plain")
    digests = [file_digest(tmp_path / "plain" / "adapter_model.safetensors")]
    for name, scale in (("scaled", 2.0**8), ("overflowing", 2.0**127)):
        monkeypatch.setattr(
            optimizers, "scaler", lambda *arguments, scale=scale: torch.amp.GradScaler("cpu", init_scale=scale)
        )
        said = tune(tune_recipe, tmp_path / name)
        digests.append(file_digest(tmp_path / name / "adapter_model.safetensors"))
        assert said["updates"] == plain["updates"]
    assert digests[0] == digests[1] != digests[2]
    log = [json.loads(line) for line in (tmp_path / "overflowing" / "log.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] for line in log if "grad_norm" in line][0] is None


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(
    tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every update of an fp16 run would be left out, and the run would end well having learnt nothing."""

    def hooked(parameters: Any, *arguments: Any, make: Any = optimizers.make, **named: Any) -> Any:
        parameters[0].register_hook(lambda gradient: gradient * math.inf)
        return make(parameters, *arguments, **named)

    monkeypatch.setattr(optimizers, "make", hooked)
    monkeypatch.setattr(optimizers, "scaler", lambda *arguments: torch.amp.GradScaler("cpu", init_scale=8.0))
    with pytest.raises(ModelError, match="update 4: the loss is .* the gradient's norm nan"):  # after 8, 4 and 2
        tune(tune_recipe, tmp_path / "a")


def test_schedule_over_minutes_begins_with_the_first_update(
    tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a simulated clock half of the minute is gone before the first update; updates of a second have the rest."""
    clock = types.SimpleNamespace(now=0.0)
    foresee, backward = TrainingRun._foresee, TrainingRun._backward

    def slow_foresee(self: TrainingRun, recipe: Any) -> Any:
        clock.now += 30.0
        return foresee(self, recipe)

    def slow_backward(self: TrainingRun, rows: Any, weight: float = 1.0) -> float:
        clock.now += 1.0
        return backward(self, rows, weight)

    monkeypatch.setattr("sartor.tune.training_log.time", types.SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(TrainingRun, "_foresee", slow_foresee)
    monkeypatch.setattr(TrainingRun, "_backward", slow_backward)
    tune(tune_recipe, tmp_path / "a", budget={"minutes": 1.0}, evaluations=1)
    settings = ResolvedOptimizer(**open_artifact(tmp_path / "a", "adapter").manifest["recipe"]["optimizer"])
    lines = [json.loads(line) for line in (tmp_path / "a" / "log.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "loss" in line]
    rates = [learning_rate(settings, number / 30) for number in range(30)]
    assert [line["learning_rate"] for line in updates] == pytest.approx(rates)
    assert updates[14]["progress"]["fraction"] == 0.5


def test_minutes_that_setting_up_has_used_end_the_run() -> None:
    budget = StopCriteria(minutes=1.0)
    assert Counters().fraction(budget, 1, wall_s=75.0, set_up_s=70.0) == 1.0
    assert Counters().fraction(budget, 1, wall_s=45.0, set_up_s=30.0) == 0.5
