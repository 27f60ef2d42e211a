"""`sartor plan --compare`: sizes, memory and time of other bases, methods and GPUs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import sartor
from sartor.core.errors import BudgetError, ConfigError
from sartor.tune import cost_comparison
from sartor.tune.cost_comparison import (
    BASES,
    FP32_TIME,
    HERE,
    QUANTISED_TIME,
    BaseShape,
    ComparedCost,
    CostComparison,
    Method,
    compare_costs,
)
from sartor.tune.cost_model import Interval
from sartor.tune.plan import TuningPlan, plan

# numel of all parameters, as model.safetensors.index.json or the model card of each states it
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Qwen2.5-0.5B": 494_032_768,
    "SmolLM2-1.7B": 1_711_376_384,
    "Qwen2.5-3B": 3_085_938_688,
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Llama-3.1-70B": 70_553_706_496,
}


@pytest.mark.parametrize("name", BASES)
def test_sizes_add_up_to_the_published_number_of_parameters(name: str) -> None:
    assert BASES[name].parameters == PUBLISHED[name]


def test_lora_of_llama_8b_has_the_parameters_that_peft_prints() -> None:
    assert BASES["Llama-3.1-8B"].lora(16) == 41_943_040


@pytest.fixture(scope="module")
def _plans() -> dict[str, TuningPlan]:
    return {}


@pytest.fixture
def planned(tune_recipe: dict[str, Any], _plans: dict[str, TuningPlan], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The recipe, whose plan is made once."""
    if not _plans:
        made = plan(tune_recipe)
        assert made.measurement
        memory = replace(made.measurement.memory, limit_bytes=10**13)  # however much this machine has free
        _plans["plan"] = replace(made, measurement=replace(made.measurement, memory=memory))
    monkeypatch.setattr(cost_comparison, "plan", lambda recipe, device="", notice=None: _plans["plan"])
    return tune_recipe


def row(comparison: CostComparison, base: str, method: Method, device: str = HERE) -> ComparedCost:
    """Return the one row."""
    (found,) = [each for each in comparison.rows if (each.base, each.method, each.device) == (base, method, device)]
    return found


def test_full_costs_more_than_lora_and_qlora_holds_less(planned: dict[str, Any]) -> None:
    comparison = compare_costs(planned, gpus=["h100=2.50", "rtx4090"], bases=["SmolLM2-135M", "Llama-3.1-8B"])
    assert len(comparison.rows) == 2 * 3 * 3
    for device in (HERE, "h100"):
        full, lora, qlora = (row(comparison, "SmolLM2-135M", method, device) for method in Method)
        assert full.time_s and lora.time_s and qlora.time_s
        assert full.time_s.estimate > lora.time_s.estimate < qlora.time_s.estimate
        assert full.memory_bytes.estimate > lora.memory_bytes.estimate > qlora.memory_bytes.estimate
        assert full.trainable == 134_515_008 > lora.trainable == qlora.trainable
    large = row(comparison, "Llama-3.1-8B", Method.LORA, "h100")
    assert large.cost and large.time_s
    assert large.cost.estimate == pytest.approx(large.time_s.estimate * 2.5 / 3600)
    # QLoRA's paper has 7 B on one GPU of 24 GB; full fine-tuning needs 16 bytes a parameter and several of 80
    assert row(comparison, "Llama-3.1-8B", Method.QLORA, "rtx4090").devices == 1
    full = row(comparison, "Llama-3.1-8B", Method.FULL, "h100")
    assert full.devices == 2 and 8.03 * 16 <= full.memory_bytes.estimate / 1e9 <= 8.03 * 16 + 4
    assert row(comparison, "Llama-3.1-8B", Method.FULL, "rtx4090").devices == 8
    assert all(line for line in comparison.assumptions) and any("not calibrated" in x for x in comparison.assumptions)


@pytest.mark.parametrize(
    ("change", "method"),
    [
        ({}, Method.LORA),
        ({"method": {"kind": "full"}}, Method.FULL),
        ({"base": {"bits": 4}}, Method.QLORA),
        ({"base": {"bits": 8}}, Method.QLORA),
    ],
)
def test_its_own_method_and_base_cost_what_was_measured(
    change: dict[str, Any], method: Method, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of the very run that was measured is the measurement."""
    base = {"name": tune_recipe["base"], **change.pop("base", {})}
    recipe = {**tune_recipe, **change, "base": base}
    planned = plan(recipe)
    assert planned.measurement
    own = planned.measurement.memory.shape
    config = json.loads((Path(tune_recipe["base"]) / "config.json").read_text())
    shape = BaseShape(
        own.layers,
        own.width,
        own.inner,
        own.heads,
        config["num_key_value_heads"],
        own.vocabulary,
        config.get("head_dim") or own.width // own.heads,
        is_tied=True,
    )
    monkeypatch.setitem(cost_comparison.BASES, "own", shape)
    monkeypatch.setattr(cost_comparison, "plan", lambda recipe, device="", notice=None: planned)
    comparison = compare_costs(recipe, bases=["own"])
    costs = {each: row(comparison, "own", each).time_s for each in Method}
    found = costs[method]
    assert found and found.estimate == pytest.approx(planned.measurement.seconds)
    lora, quantised = costs[Method.LORA], costs[Method.QLORA]
    assert lora and quantised and quantised.estimate == pytest.approx(lora.estimate * QUANTISED_TIME.estimate)


def test_the_objective_s_own_passes_are_counted(planned: dict[str, Any]) -> None:
    """A forward pass of the reference beside the two of an update; of sampled replies no time is stated."""
    grid = {"bases": ["SmolLM2-135M"], "gpus": ["h100=2.50"]}
    plain = compare_costs(planned, **grid)
    for objective, factor in (({"kind": "dpo"}, 3 / 2), ({"kind": "kto"}, 4 / 2), ({"kind": "simpo"}, 1)):
        other = compare_costs({**planned, "objective": objective}, **grid)
        for device in (HERE, "h100"):
            first, second = (row(each, "SmolLM2-135M", Method.LORA, device).time_s for each in (plain, other))
            assert first and second and second.estimate == pytest.approx(factor * first.estimate)
        assert any(line.startswith(objective["kind"]) for line in other.assumptions) == (factor > 1)
    for objective in (
        {"kind": "distil", "teacher": "base"},
        {"kind": "grpo", "verifier": {"kind": "json_fields"}},
    ):
        sampled = compare_costs({**planned, "objective": objective}, **grid)
        assert all(each.time_s is None and each.cost is None and each.devices for each in sampled.rows)
        assert {each.cells()["time"] for each in sampled.rows} == {"not foreseen"}
        assert any(line.startswith("time: not foreseen") for line in sampled.assumptions)


def test_without_gpus_nothing_is_said_of_them_and_no_price_means_no_cost(planned: dict[str, Any]) -> None:
    comparison = compare_costs(planned, bases=["SmolLM2-1.7B"])
    assert not any("GPU" in line for line in comparison.assumptions)
    assert all(each.cost is None and each.device == HERE for each in comparison.rows)
    assert not any("cost" in cells for cells in dict(comparison.table())["costs"])
    priced = compare_costs(planned, bases=["SmolLM2-1.7B"], price="0.50/h").rows[1]
    assert priced.time_s and priced.cost
    assert priced.cost.high == pytest.approx(priced.time_s.high / 7200)


def test_full_runs_in_fp32_where_the_recipe_has_16_bits(
    planned: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights and activations have 4 bytes; of a recipe in fp32 nothing changes."""
    measured = cost_comparison.plan(planned).measurement
    assert measured
    found = {}
    for size in (2, 4):
        shape = replace(measured.memory.shape, element_bytes=size)
        sized = replace(measured, memory=replace(measured.memory, shape=shape, limit_bytes=10**12))
        plan_of = TuningPlan(measurement=sized)
        monkeypatch.setattr(cost_comparison, "plan", lambda *args, plan_of=plan_of, **kwargs: plan_of)
        comparison = compare_costs(planned, bases=["SmolLM2-1.7B"])
        found[size] = row(comparison, "SmolLM2-1.7B", Method.FULL), row(comparison, "SmolLM2-1.7B", Method.LORA)
        assert any("full runs in fp32" in line for line in comparison.assumptions) == (size == 2)
    (full_16, lora_16), (full_32, lora_32) = found[2], found[4]
    assert full_16.time_s and full_32.time_s
    assert full_16.time_s.estimate == pytest.approx(FP32_TIME.estimate * full_32.time_s.estimate)
    assert full_16.memory_bytes.estimate - full_32.memory_bytes.estimate == pytest.approx(
        2 * measured.memory.shape.vocabulary * measured.memory.shape.width
    )
    assert lora_32.memory_bytes.estimate > lora_16.memory_bytes.estimate


def test_what_does_not_fit_here_has_no_time(planned: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    measured = cost_comparison.plan(planned).measurement
    assert measured
    small = replace(measured, memory=replace(measured.memory, limit_bytes=2 * measured.memory.resident_bytes))
    monkeypatch.setattr(cost_comparison, "plan", lambda *args, **kwargs: TuningPlan(measurement=small))
    for each in compare_costs(planned, bases=["Llama-3.1-70B"]).rows:
        assert each.as_json()["fits"] is False and each.time_s is None and each.cells()["time"] == "does not fit"


def test_the_measured_base_is_carried_to_itself(planned: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sizes of the measured base, the time of its LoRA is the measured one, and the memory near its needs."""
    measured = cost_comparison.plan(planned).measurement
    assert measured
    shape = measured.memory.shape
    linear = shape.linear_bytes // shape.element_bytes
    base = replace(BASES["SmolLM2-135M"], layers=shape.layers, width=shape.width, vocabulary=shape.vocabulary)
    monkeypatch.setattr(type(base), "linear", linear)
    monkeypatch.setattr(cost_comparison, "BASES", {"own": base})
    own = compare_costs(planned).rows[1]
    assert own.method is Method.LORA and own.time_s
    assert own.time_s.estimate == pytest.approx(measured.seconds)
    assert own.time_s.low == pytest.approx(measured.seconds * (1 - measured.half_width))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": ["h1000"]}, "no data sheet of 'h1000'"),
        ({"gpus": ["h100=cheap"]}, "the price of h100 is 'cheap'"),
        ({"gpus": ["h100=-1"]}, "the price of h100 is '-1'"),
        ({"bases": ["GPT-5"]}, "the sizes of 'GPT-5' are not known"),
    ],
)
def test_unknown_names_and_prices_are_refused(tune_recipe: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        sartor.compare_costs(tune_recipe, **options)
    assert error.value.remedy.startswith("--")


def test_a_refused_recipe_is_not_compared(planned: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_comparison, "plan", lambda *args, **kwargs: TuningPlan())
    with pytest.raises(BudgetError, match="the recipe itself is refused"):
        compare_costs(planned)


def test_every_assumption_on_a_gpu_is_said(planned: dict[str, Any]) -> None:
    lines = compare_costs(planned, bases=["SmolLM2-135M"], gpus=["l4=0.01", "h100=2.5"]).assumptions
    (sheets,) = [line for line in lines if line.startswith("GPUs: dense bf16")]
    assert sheets.endswith("l4 121 and 24, h100 989 and 80")
    text = " ".join(lines)
    for value in (
        "libraries take 1 GB",
        "LoRA 16 with its states",
        "fine-tuning 16, weight",
        "4 to 64 devices",
        "90% at most",
    ):
        assert value in text, value


def test_costs_below_a_cent_are_no_zeros() -> None:
    texts = [cost_comparison._money(Interval(x, x / 2, 2 * x)) for x in (0.00042, 0.031, 12.3)]
    assert texts == ["0.00042 (0.00021 to 0.00084)", "0.031 (0.015 to 0.062)", "12.30 (6.15 to 24.60)"]


def test_durations_are_in_a_unit_that_suits_them() -> None:
    texts = [cost_comparison._duration(Interval(x, x / 2, 2 * x)) for x in (90.0, 600.0, 86400.0, 864000.0)]
    assert texts == ["90 s (45 to 180)", "10 min (5 to 20)", "24 h (12 to 48)", "10 d (5 to 20)"]
