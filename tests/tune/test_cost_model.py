"""A run is known before it is spent: counted on its own rows, refused with remedies that fit, and held against what it cost."""

from __future__ import annotations

import json
import math
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sartor
from sample_data import ROWS, write_jsonl
from sartor.core import config
from sartor.core.errors import BudgetError, ConfigError, SourceError
from sartor.core.filesystem import file_digest
from sartor.evaluate.audit.forgetting_probes import PROBES
from sartor.models import hardware
from sartor.models.base import open_base
from sartor.models.losses import transformers_backend
from sartor.models.packing import TokenizedExample
from sartor.tune import cost_model, preflight
from sartor.tune import plan as plan_module
from sartor.tune.cost_model import BatchLoad, Interval, MemoryModel, ModelShape, TimedBatch, TimingProbe, load_of
from sartor.tune.evaluation_forecast import FORGETTING_TOKENS, SMALL_TALK_TOKENS, small_talk_tokens
from sartor.tune.plan import device_named, hourly
from sartor.tune.recipe import ResolvedRecipe
from sartor.tune.training_loop import Counters

GB = 10**9
# the starter's: 30 layers, width 576, 4.9 M trained parameters
STARTER = ModelShape(
    layers=30,
    width=576,
    inner=1536,
    heads=9,
    vocabulary=49152,
    element_bytes=4,
    linear_bytes=425 * 10**6,
    linear_weights=106_168_320,
    trainable=4_884_480,
    adapted=30,
    recompute=False,
)
LOADS = [BatchLoad(tokens, tokens // 2, tokens**2, tokens**2) for tokens in [60, 70, 80, 90, 400] * 40]


def recipe_of(**changes: Any) -> ResolvedRecipe:
    return config.load(ResolvedRecipe, {"base": "starter", "data": "d", **changes})


def memory_of(limit_bytes: float, **changes: Any) -> MemoryModel:
    shape = replace(STARTER, **changes)
    return MemoryModel(shape, GB, GB, Interval(1.0, 0.9, 1.2), int(limit_bytes), "a test's limit")


def with_room(monkeypatch: pytest.MonkeyPatch, room_bytes: int) -> None:
    monkeypatch.setattr(
        hardware, "available_bytes", lambda device=None: hardware.FreeMemory(room_bytes, "a test's limit")
    )


# the verb


def test_a_plan_has_intervals_counts_and_the_path(tune_recipe: dict[str, Any]) -> None:
    said = sartor.plan(tune_recipe, price="0.45/h").as_json()
    for name in ("time_s", "evaluation_s", "peak_memory_bytes", "cost"):
        assert 0 < said[name]["low"] <= said[name]["estimate"] <= said[name]["high"], name
    assert said["cost"]["estimate"] == pytest.approx(said["time_s"]["estimate"] / 3600 * 0.45, abs=1e-4)
    assert said["micro_batch_tokens"] == 128 and said["path"] == "fast" and said["path_reason"]
    assert said["machine"]["device"] == "cpu"
    assert said["refusals"] == []
    json.dumps(said)


def test_a_time_that_is_hardly_known_is_never_below_nothing(
    tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_model, "TIME_ALLOWANCE", 3.0)
    time_s = sartor.plan(tune_recipe).as_json()["time_s"]
    assert 0 <= time_s["low"] < time_s["estimate"] < time_s["high"]


@pytest.mark.parametrize("budget", [{"epochs": 2}, {"updates": 3}, {"tokens": 200}, {"epochs": 5, "tokens": 700}])
def test_a_plan_counts_what_the_run_then_reads(
    tmp_path: Path, tune_recipe: dict[str, Any], budget: dict[str, Any]
) -> None:
    recipe = {**tune_recipe, "budget": budget}
    planned, run = sartor.plan(recipe).as_json(), sartor.tune(recipe, tmp_path / "a", show=False).as_json()
    for name in ("updates", "tokens", "supervised_tokens", "trainable", "micro_batch_tokens", "path"):
        assert planned[name] == run[name], name


@pytest.mark.parametrize("limit", [math.inf, math.nan, 0])
def test_a_budget_is_a_number_above_0(limit: float, tune_recipe: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="epochs is .*; it must be a number above 0"):
        sartor.plan({**tune_recipe, "budget": {"epochs": limit, "minutes": 5}})


def test_updates_that_minutes_come_before_are_not_counted(
    tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_model, "MOST_COUNTED_UPDATES", 50)
    said = sartor.plan({**tune_recipe, "budget": {"minutes": 0.5, "updates": 10**9}}).as_json()
    assert said["time_s"]["estimate"] == 30


def test_a_budget_of_minutes_alone_is_its_own_forecast_of_time(tune_recipe: dict[str, Any]) -> None:
    said = sartor.plan({**tune_recipe, "budget": {"minutes": 0.5}}).as_json()
    assert said["time_s"]["estimate"] == 30
    assert said["updates"] > 0 and said["tokens"] > 0
    assert sartor.plan({**tune_recipe, "budget": {"minutes": 0.001, "epochs": 9}}).as_json()["time_s"]["estimate"] < 1


def test_a_plan_leaves_no_file(tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "sartor-home" not in path.parts}
    sartor.plan(tune_recipe)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "sartor-home" not in path.parts} == before


def test_plan_of_a_small_base_forgets_a_larger_ones_peak(
    tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in one process, as a notebook has them."""
    import tiny

    if not hardware.restart_peak(torch.device("cpu")):
        pytest.skip("this system's /proc/self/clear_refs cannot be written")
    monkeypatch.setattr(plan_module, "_PROBE_S", 0.1)
    monkeypatch.setattr(plan_module, "forecast_evaluation", lambda model, chat, rows, count: None)
    larger = tiny.write_base(tmp_path / "larger", hidden_size=512, intermediate_size=16384)
    plans = [sartor.plan({**tune_recipe, "base": str(base)}).as_json() for base in (larger, tune_recipe["base"])]
    large, small = (plan["peak_memory_bytes"] for plan in plans)
    # not the intervals' ends: in a test process that has grown they are wider than the bases differ
    assert small["estimate"] < large["estimate"] - 5e7, (small, large)


def test_without_a_price_there_is_no_cost_and_a_price_has_a_unit(tune_recipe: dict[str, Any]) -> None:
    assert sartor.plan(tune_recipe).as_json()["cost"] is None
    assert [hourly(price) for price in ("", "0.45/h", 0.45, "24/d", "0.01/min")] == pytest.approx(
        [None, 0.45, 0.45, 1.0, 0.6]
    )
    for wrong in ("much", "-1/h", "3/year"):
        with pytest.raises(ConfigError, match="the price is"):
            hourly(wrong)


def test_a_device_that_is_not_here_is_refused() -> None:
    assert device_named("cpu") == torch.device("cpu")
    for wrong in ("cuda:9", "tpu", "cpu:x"):
        if not (torch.cuda.is_available() and wrong.startswith("cuda")):
            with pytest.raises(ConfigError, match="device"):
                device_named(wrong)


@pytest.mark.services
def test_the_command_lists_refusals_and_exits_0(
    tmp_path: Path, tune_recipe: dict[str, Any], commands: dict[str, str]
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(tune_recipe))
    command = ["sartor", "plan", str(file), "--data.max_length_tokens", "5", "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **commands})
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert [refusal["reason"] for refusal in said["refusals"]] == ["nothing_supervised"]
    assert said["time_s"] is None and said["tokens"] == 0
    table = sartor.plan({**tune_recipe, "data": {**tune_recipe["data"], "max_length_tokens": 5}}).table()
    assert "try: --data.max_length_tokens " in dict(table)["refused"] and dict(table)["time"] == "not forecast"


# refusals


def test_memory_that_cannot_hold_it_is_refused_before_spending(
    tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # base and adapter are open, and what is left holds no micro-batch
    monkeypatch.setattr(preflight, "of_base", lambda *args: iter(()))
    with_room(monkeypatch, -(10**12))
    updated: list[Any] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: updated.append(args))
    planned = sartor.plan(tune_recipe).as_json()
    assert [refusal["reason"] for refusal in planned["refusals"]] == ["memory"]
    assert planned["time_s"] is None and planned["peak_memory_bytes"]["estimate"] > 0
    with pytest.raises(BudgetError, match=r"needs up to .* GB; .* GB can be had .a test's limit.") as caught:
        sartor.tune(tune_recipe, tmp_path / "a", show=False)
    assert caught.value.exit_code == 4 and "or a smaller base" in caught.value.remedy
    assert not updated and not (tmp_path / "a").exists() and not list(tmp_path.glob(".a.part*"))


@pytest.mark.usefixtures("fp32")  # for the remedy, which halves it
def test_a_base_whose_weights_alone_do_not_fit_is_not_opened(
    tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sartor.tune import model_setup

    # the tiny base has 28,832 weights
    with_room(monkeypatch, 100_000)
    monkeypatch.setattr(model_setup, "open_base", lambda *args, **options: pytest.fail("it was opened"))
    (refusal,) = sartor.plan(tune_recipe).as_json()["refusals"]
    assert refusal["reason"] == "memory" and "the weights of" in refusal["problem"]
    assert "--base.bits 16 (0.00 GB)" in refusal["remedy"]
    with pytest.raises(BudgetError, match="the weights of"):
        sartor.tune(tune_recipe, tmp_path / "a", show=False)


def test_too_many_rows_left_out_as_too_long_are_refused(
    tmp_path: Path, tune_recipe: dict[str, Any], rows_file: Path
) -> None:
    long = [
        {"messages": [{"role": "user", "content": f"{place} " * 90}, {"role": "assistant", "content": "yes"}]}
        for place in ("attic", "den", "hall", "loft", "porch")
    ]
    write_jsonl(rows_file, [*ROWS, *long])
    sartor.curate({"sources": [str(rows_file)], "split": {"eval_fraction": 0.2}}, tmp_path / "d")
    data = {"path": str(tmp_path / "d"), "max_length_tokens": 128}
    (refusal,) = sartor.plan({**tune_recipe, "data": data}).as_json()["refusals"]
    assert refusal["reason"] == "cut_answers" and "5 of 45 rows (11%)" in refusal["problem"]
    with pytest.raises(SourceError, match="too_long_fraction allows 10%"):
        sartor.tune({**tune_recipe, "data": data}, tmp_path / "a", show=False)
    # the remedy, taken by its word
    option, limit = refusal["remedy"].split()[:2]
    assert option == "--data.max_length_tokens"
    assert sartor.plan({**tune_recipe, "data": {**data, "max_length_tokens": int(limit)}}).as_json()["refusals"] == []
    assert sartor.plan({**tune_recipe, "data": {**data, "too_long_fraction": 0.2}}).as_json()["refusals"] == []


class Chat:
    """Of a Chat what the checks need."""

    class tokenizer:  # noqa: N801
        """Names its ids."""

        convert_ids_to_tokens = staticmethod("<{}>".format)

    def __init__(self, pad: int, stops: list[int]) -> None:
        self.pad, self.stops = pad, stops


def test_a_pad_that_ends_replies_is_refused() -> None:
    (refusal,) = preflight.check_end_tokens(Chat(pad=2, stops=[2]), [TokenizedExample([5, 6, 2], [False, True, True])])
    assert refusal.reason == "pad_is_stop" and isinstance(refusal.error, SourceError)
    assert "'<2>'" in refusal.problem


def test_a_row_whose_end_is_not_learnt_is_refused() -> None:
    masked = TokenizedExample([5, 6, 2], [False, True, False], "row-1")
    (refusal,) = preflight.check_end_tokens(
        Chat(pad=0, stops=[2]), [masked, TokenizedExample([5, 6, 2], [False, True, True])]
    )
    assert refusal.reason == "end_unsupervised"
    assert "1 of 2 rows" in refusal.problem and "row-1" in refusal.problem


def test_tokenizer_whose_pad_is_its_eos_is_accepted(tiny_base: Path) -> None:
    """Another pad token is used, so that the end of a reply is learnt."""
    from sartor.models.base import open_chat

    chat = open_chat(tiny_base)
    assert chat.tokenizer.pad_token_id == chat.tokenizer.eos_token_id
    example = sartor.Example((sartor.Message.of("user", "a"), sartor.Message.of("assistant", "b")), ())
    assert list(preflight.check_end_tokens(chat, [chat.encode(example)])) == []


# what fits


def test_auto_takes_the_largest_rung_that_fits() -> None:
    free, recipe = memory_of(100 * GB), recipe_of()
    assert cost_model.micro_batch_sizes(recipe, LOADS) == [400, 512, 1024, 2048], "never below the longest row"
    for size in (400, 512, 1024, 2048):
        load = cost_model.heaviest(recipe, LOADS, size, STARTER)
        assert load.tokens <= size
        needed = int(free.needs(load).high) + 1
        settled = cost_model.choose_micro_batch(memory_of(needed), recipe, LOADS)
        assert settled.fits and settled.micro_batch_tokens == size
        below = cost_model.choose_micro_batch(memory_of(needed - 2), recipe, LOADS)
        assert below.micro_batch_tokens < size if size > 400 else not below.fits
    assert cost_model.choose_micro_batch(free, recipe, LOADS).reason == "the largest that helps"
    assert "fits in" in cost_model.choose_micro_batch(memory_of(needed - 2), recipe, LOADS).reason


def test_auto_micro_batch_fits_an_update_and_number_is_fixed() -> None:
    """Sizes end at batch_tokens; micro_batch_tokens of the recipe is used as it is."""
    assert cost_model.micro_batch_sizes(recipe_of(optimizer={"batch_tokens": 600}), LOADS) == [400, 512, 600]
    fixed = cost_model.choose_micro_batch(memory_of(100 * GB), recipe_of(compute={"micro_batch_tokens": 300}), LOADS)
    assert fixed.micro_batch_tokens == 300 and fixed.reason == "set by the recipe"


@pytest.mark.parametrize("limit_gb", [1.3, 1.5, 1.7, 2.0, 3.0])
@pytest.mark.parametrize("micro", ["auto", 4096])
def test_what_a_remedy_promises_the_same_model_confirms(limit_gb: float, micro: Any) -> None:
    recipe, model = recipe_of(compute={"micro_batch_tokens": micro}), memory_of(limit_gb * GB)
    found = list(preflight.check_memory(model, recipe, LOADS))
    assert bool(found) != cost_model.choose_micro_batch(model, recipe, LOADS).fits
    for change, size in preflight.remedies(model, recipe, LOADS) if found else []:
        assert size <= limit_gb * GB
        assert preflight.needed_under(model, recipe, LOADS, change.split()) == size
        assert preflight.as_flags(change) in found[0].remedy


def test_remedies_omit_unknown_and_useless_changes() -> None:
    """needed_under() is None for such a change; compute.recompute=true is offered."""
    model, recipe = memory_of(1.5 * GB), recipe_of()
    assert preflight.needed_under(model, recipe, LOADS, ["no.such=1"]) is None
    assert preflight.needed_under(model, recipe, LOADS, ["method.rank=16"]) is None
    offered = [change for change, _ in preflight.remedies(model, recipe, LOADS)]
    assert "compute.recompute=true" in offered


def test_activations_shrink_with_recompute_or_fewer_layers() -> None:
    """Recompute saves over two thirds of the bytes, 10 adapted layers over half."""
    load = BatchLoad(1024, 400, 1024 * 70, 1024 * 70)
    whole = STARTER.activation_bytes(load)
    assert replace(STARTER, recompute=True).activation_bytes(load) < whole / 3
    assert replace(STARTER, adapted=10).activation_bytes(load) < whole / 2


def test_the_time_fit_finds_what_made_the_samples() -> None:
    loads = [
        BatchLoad(tokens, 0, pairs, 0) for tokens, pairs in ((100, 5_000), (400, 20_000), (300, 90_000), (100, 5_000))
    ]
    model = cost_model.time_model(
        [TimedBatch(load, 0.2 + 0.01 * load.tokens + 1e-6 * load.pairs, None) for load in loads], 0.1
    )
    assert (model.base_s, model.token_s, model.pair_s) == pytest.approx((0.2, 0.01, 1e-6))
    assert model.half_width == pytest.approx(cost_model.TIME_ALLOWANCE)
    one = cost_model.time_model([TimedBatch(BatchLoad(100, 0, 5000, 0), 1.0, None)], 0.1)
    assert one.seconds(BatchLoad(200, 0, 0, 0), 1) == pytest.approx(2.0)
    falling = [TimedBatch(BatchLoad(100, 0, 100, 0), 1.0, None), TimedBatch(BatchLoad(200, 0, 200, 0), 3.5, None)]
    assert cost_model.time_model(falling, 0.0).base_s == 0.0


def test_growth_below_the_allocators_noise_says_nothing() -> None:
    class Fake:
        device, resident_bytes, left_bytes = torch.device("cpu"), GB, 0
        path = SimpleNamespace(name="general")

        def peak_bytes(self) -> int:
            return GB

    load = BatchLoad(1000, 400, 70_000, 70_000)
    expected = STARTER.activation_bytes(load) + 4 * STARTER.trainable
    fake: Any = Fake()
    fake.samples = [TimedBatch(load, 1.0, None), TimedBatch(load, 1.0, 1000)]
    assert cost_model.memory_model(STARTER, fake).scale.estimate == cost_model.UNMEASURED[1]
    fake.samples = [TimedBatch(load, 1.0, int(expected * 1.3))]
    assert cost_model.memory_model(STARTER, fake).scale.estimate == pytest.approx(1.3)


def test_what_a_small_sample_holds_besides_is_not_scaled_up() -> None:
    """64 MB of buffers beside both samples: the interval of a load four times the large one stays below a factor 2."""

    class Fake:
        device, resident_bytes, left_bytes = torch.device("cpu"), GB, 0
        path = SimpleNamespace(name="fast")

        def peak_bytes(self) -> int:
            return GB

    loads = [BatchLoad(tokens, tokens // 2, 70 * tokens, 70 * tokens) for tokens in (40, 400, 1600)]
    grown = [0.5 * (STARTER.activation_bytes(load) + 4 * STARTER.trainable) for load in loads]
    fake: Any = Fake()
    fake.samples = [TimedBatch(load, 1.0, int(byte + 64e6)) for load, byte in zip(loads[:2], grown[:2], strict=True)]
    model = cost_model.memory_model(STARTER, fake)
    assert 0 < model.excess_bytes < 64e6
    found = model.growth(loads[2])
    assert found.low < grown[2] + 8 * STARTER.trainable < found.high < 2 * found.low


def test_code_of_unmet_lengths_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one new length leaves behind is expected again for each further length that oneDNN keeps."""

    class Fake:
        device, resident_bytes, left_bytes = torch.device("cpu"), GB, 10**7
        path = SimpleNamespace(name="fast")
        samples: tuple[TimedBatch, ...] = ()

        def peak_bytes(self) -> int:
            return GB

    fake: Any = Fake()
    monkeypatch.setattr(hardware, "cached_batch_shapes", lambda: 18)
    many = cost_model.memory_model(STARTER, fake)
    assert many.kernel_bytes == 16 * 10**7
    few = replace(many, kernel_bytes=0)
    gains = {
        name: getattr(many.needs(LOADS[0]), name) - getattr(few.needs(LOADS[0]), name) for name in ("low", "high")
    }
    assert gains == pytest.approx({"low": 0, "high": 16 * 10**7})


def test_settle_counts_what_stays_as_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "resident_bytes", lambda device: GB)
    probe = TimingProbe(None, torch.nn.Linear(2, 2), torch.device("cpu"))  # type: ignore[arg-type]
    probe.samples.append(TimedBatch(BatchLoad(100), 1.0, 5 * 10**7))
    monkeypatch.setattr(hardware, "resident_bytes", lambda device: GB + 2 * 10**7)
    probe.settle()
    assert probe.left_bytes == 2 * 10**7 and probe.resident_bytes == GB + 2 * 10**7
    assert probe.samples[-1].growth_bytes == 3 * 10**7


def test_micro_batches_are_the_trainers_with_a_shared_prefix() -> None:
    """The trainer cuts by computed tokens: of rows with a common system prompt more stand in a micro-batch."""
    from sartor.models import packing

    lengths = [10 + index % 5 for index in range(60)]
    rows = [
        TokenizedExample([*range(30), 100 + index, *range(200, 200 + length)], [False] * (26 + length) + [True] * 5)
        for index, length in enumerate(lengths)
    ]
    path: Any = SimpleNamespace(name="fast")
    beginning = cost_model.common_beginning(recipe_of(), path, rows)
    assert beginning == list(range(30))
    foreseen = list(cost_model.micro_batches([load_of(row, beginning) for row in rows], 256))
    actual = [packing.pack(group, share=True).tokens for group in packing.micro_batches(rows, 256, share=True)]
    assert [load.computed for load in foreseen] == actual
    assert max(load.tokens for load in foreseen) > 2 * 256
    path.name = "one-row"
    assert cost_model.common_beginning(recipe_of(), path, rows) == ()


def test_heaviest_micro_batch_is_one_that_the_budget_reads() -> None:
    recipe = recipe_of(budget={"updates": 2}, optimizer={"batch_tokens": 256})
    updates = cost_model.simulate_updates(recipe, LOADS, Counters())
    assert cost_model.epoch(recipe, LOADS) == updates
    longer = recipe_of(budget={"epochs": 2}, optimizer={"batch_tokens": 256})
    assert sum(map(len, cost_model.epoch(longer, LOADS))) == len(LOADS)


def test_a_time_interval_is_never_wider_than_a_factor_of_two() -> None:
    samples = [TimedBatch(BatchLoad(100, 0, 100), seconds, None) for seconds in (1.0, 5.0)]
    model = cost_model.time_model(samples, 0.0)
    assert (1 + model.half_width) / (1 - model.half_width) <= 2


# tune


def test_a_run_records_forecast_against_actual(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    said = sartor.tune({**tune_recipe, "budget": {"epochs": 3}}, tmp_path / "a", show=False).as_json()
    for name, actual in (("time_s", "wall_s"), ("peak_memory_bytes", "peak_memory_bytes")):
        interval = said["forecast"][name]
        assert interval["low"] <= interval["estimate"] <= interval["high"]
        error = said["forecast_error"][name.split("_")[-2] if name != "time_s" else "time"]
        # both are said in whole milliseconds (bytes), and a machine may take a few of them
        half = 0.0005 if name == "time_s" else 0.5
        least, most = ((said[actual] - side) / (interval["estimate"] + side) - 1 for side in (half, -half))
        assert least - 1e-4 <= error <= most + 1e-4
    assert said["micro_batch_reason"]
    lines = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert [line["forecast"] for line in lines if "forecast" in line] == [said["forecast"]]
    short = sartor.tune({**tune_recipe, "budget": {"updates": 2}}, tmp_path / "b", show=False).as_json()
    assert short["forecast"]["time_s"] is None and short["forecast_error"]["time"] is None


def test_a_calibration_changes_nothing_that_is_learnt(
    tmp_path: Path, tune_recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sartor.tune import run_forecast

    recipe = {**tune_recipe, "method": {"rank": 4, "dropout": 0.2}}
    digests = []
    for name, fraction in (("with", 1.0), ("without", 0.0)):
        monkeypatch.setattr(run_forecast, "PROBE_FRACTION", fraction)
        sartor.tune(recipe, tmp_path / name, show=False)
        digests.append(file_digest(tmp_path / name / "adapter_model.safetensors"))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (Interval(2e9, 1.5e9, 2.5e9), "peak memory 2.00 GB, 90 % in 1.50..2.50"),
        (Interval(2e9, 2e9, 2e9), "peak memory 2.00 GB, reached before the first update"),
    ],
)
def test_peak_that_planning_has_reached_is_said_without_an_interval(memory: Interval, said: str) -> None:
    from sartor.tune.cost_model import MicroBatchChoice
    from sartor.tune.run_forecast import RunForecast

    choice = MicroBatchChoice(256, BatchLoad(), True, "planned")
    forecast = RunForecast(choice, memory, course_tokens=None, evaluated_tokens=0, limit_s=None)
    assert forecast.line == f"micro-batch 256 tokens (planned); {said}"


def test_a_probe_puts_gradients_random_numbers_and_mode_back() -> None:
    import tiny
    from sartor.models import adapters

    rows = [
        TokenizedExample([5, 6, 7, 2], [False, True, True, True]),
        TokenizedExample([8, 9, 2], [False, True, True]),
    ]
    model = adapters.inject_lora(tiny.model(), rank=4, alpha=8, dropout=0.3, targets="all-linear", seed=0).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.random.get_rng_state()
    probe = TimingProbe(
        transformers_backend.choose_loss_backend(model, rows, torch.device("cpu")), model, torch.device("cpu")
    )
    probe.run(rows, warm_up=True)
    probe.run(rows)
    probe.optimizer_seconds()
    assert [sample.load for sample in probe.samples] == [load_of(rows[0]) + load_of(rows[1])]
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_recompute_learns_the_same(tmp_path: Path, tune_recipe: dict[str, Any]) -> None:
    said = [
        sartor.tune(
            {**tune_recipe, "compute": {"recompute": recompute}}, tmp_path / str(recompute), show=False
        ).as_json()
        for recompute in (False, True)
    ]
    assert said[0]["loss"]["last"] == pytest.approx(said[1]["loss"]["last"], abs=1e-5)
    assert "computed again in the backward pass" in said[1]["path_reason"]


def test_the_course_of_a_run_ends_where_its_budget_does() -> None:
    counters = Counters()
    updates = cost_model.simulate_updates(recipe_of(budget={"updates": 7}), LOADS, counters)
    assert updates is not None and len(updates) == counters.updates == 7
    assert cost_model.simulate_updates(recipe_of(budget={"minutes": 1}), LOADS, Counters()) is None


@pytest.mark.circle
def test_forecast_of_an_evaluation_knows_the_tokens_of_the_probes() -> None:
    """`tune` may not import `evaluate`, and holds their number by the starter's tokeniser."""
    chat = open_base("starter").chat
    tokens = sum(len(chat.encode(row).ids) for make_rows in PROBES.values() for row in make_rows())
    assert tokens == pytest.approx(FORGETTING_TOKENS, rel=0.05)
    assert small_talk_tokens(chat) == SMALL_TALK_TOKENS
