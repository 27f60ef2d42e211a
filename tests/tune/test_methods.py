"""The contract of tuning methods: every method, on a Llama with a tied head and on a Qwen 2 with biases."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import sartor
import tiny
from killed_tuning import WEIGHTS, killed, tune
from method_rows import FAMILIES, IDS, ROWS, MethodRow, base_of, logits, placed, trained
from sample_data import recipe_on
from sartor.core import config
from sartor.core.artifacts import open_artifact
from sartor.core.errors import AdmissionError, BudgetError, ConfigError, ModelError, SartorError
from sartor.core.filesystem import file_digest
from sartor.federate.recipe import FederateRecipe
from sartor.inference.local.lora_stacks import read_pairs
from sartor.models import adapters, gguf_writer, hardware
from sartor.models.hardware import FreeMemory
from sartor.models.kernels.reference import ReferenceKernels
from sartor.models.losses import transformers_backend
from sartor.models.losses.fused_decoder import FusedDecoder
from sartor.models.losses.lora_linear import Unsupported
from sartor.models.packing import TokenizedExample, pack
from sartor.personalization import user_tokens
from sartor.serving.admission import adapter_checks
from sartor.tune import cost_model, model_setup, optimizers, preflight
from sartor.tune.recipe import Recipe, ResolvedOptimizer, load
from sartor.tune.training_loop import TrainingRun

each_method = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
each_family = pytest.mark.parametrize("family", FAMILIES)
ROW_IDS = [int(index) for index in IDS[0]]
EXAMPLES = [TokenizedExample(ROW_IDS, [index > 2 for index in range(len(ROW_IDS))], "a")]


def recipe_of(row: MethodRow) -> Recipe:
    return load({"base": "x", "data": "y", "method": row.options})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An Adapter of each method on the tiny Llama."""
    folder = tmp_path_factory.mktemp("written")
    for kind, row in ROWS.items():
        adapters.write_adapter(trained(placed(row.method, base_of("llama"))), folder / kind, "owner/base")
    return {kind: folder / kind for kind in ROWS}


@each_family
@each_method
def test_fresh_adapter_changes_nothing(row: MethodRow, family: str) -> None:
    difference = (logits(placed(row.method, base_of(family))) - logits(base_of(family))).abs().max()
    assert float(difference) <= row.fresh


@each_family
@each_method
def test_only_trained_parameters_get_gradients(row: MethodRow, family: str) -> None:
    base = base_of(family)
    frozen = {id(parameter) for parameter in base.parameters()}
    model = placed(row.method, base)
    model(input_ids=IDS, labels=IDS).loss.backward()
    with_gradient = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert with_gradient and not frozen & {id(parameter) for parameter in with_gradient}
    assert {parameter.dtype for parameter in with_gradient} == {torch.float32}
    assert adapters.trainable(model)[0] == sum(parameter.numel() for parameter in with_gradient)


@each_method
def test_a_few_steps_lower_the_loss(row: MethodRow) -> None:
    model = placed(row.method, base_of("llama"))
    before = float(model(input_ids=IDS, labels=IDS).loss.detach())
    after = float(trained(model, steps=8)(input_ids=IDS, labels=IDS).loss.detach())
    assert after < before - 0.02


@each_family
@each_method
def test_undone_and_disabled_it_is_the_base_to_the_bit(row: MethodRow, family: str) -> None:
    base = base_of(family)
    before, weights = logits(base), {name: value.clone() for name, value in base.state_dict().items()}
    model = trained(placed(row.method, base))
    assert not torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    bare = adapters.undo(model)
    after = bare.state_dict()
    assert torch.equal(logits(bare), before)
    assert list(after) == list(weights) and all(torch.equal(after[name], weights[name]) for name in weights)


@each_family
@each_method
def test_merged_computes_as_unmerged(row: MethodRow, family: str) -> None:
    model = trained(placed(row.method, base_of(family)))
    before = logits(model)
    merged = adapters.merge(model)
    assert type(merged) is type(base_of(family))
    assert (logits(merged) - before).abs().max() < 1e-4


@each_family
@each_method
def test_written_adapter_opens_with_the_same_logits_and_bytes(row: MethodRow, family: str, tmp_path: Path) -> None:
    model = trained(placed(row.method, base_of(family)))
    adapters.write_adapter(model, tmp_path / "a", "owner/base")
    opened = adapters.open_adapter(base_of(family), tmp_path / "a")
    assert (logits(opened) - logits(model)).abs().max() <= row.fresh
    assert not [name for name, parameter in opened.named_parameters() if parameter.requires_grad]
    file = (tmp_path / "a" / WEIGHTS).read_bytes()
    header = int.from_bytes(file[:8], "little")
    assert len(file) - 8 - header == model_setup.stored_bytes(recipe_of(row), model)


@each_method
def test_start_goes_on_from_its_own_method_alone(row: MethodRow, written: dict[str, Path]) -> None:
    options = {**row.options, "start": str(written[row.kind])}
    method = load({"base": "x", "data": "y", "method": options}).method
    model = placed(method, base_of("llama"))
    adapters.load_start(model, written[row.kind])
    assert (
        logits(model) - logits(adapters.open_adapter(base_of("llama"), written[row.kind]))
    ).abs().max() <= row.fresh
    other = written["ia3" if row.kind != "ia3" else "oft"]
    with pytest.raises(ConfigError, match=f"another method: kind {other.name} there, {row.stored} here"):
        adapters.load_start(model, other)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("lora", {"kind": "full"}),
        ("full", {"kind": "oft"}),
        ("full", {"targets": ["q_proj"]}),
        ("oft", {"kind": "lora"}),
        ("ia3", {"kind": "pissa"}),
        ("miss", {"rank": 3}),
        ("dora", {"targets": {"modules": ["q_proj"], "layers": "top-1"}}),
        ("lora", {"kind": "pissa", "rank": 11}),
        ("pissa", {"rank": 3, "alpha": 3.0}),
    ],
    ids=str,
)
def test_remedy_of_a_start_can_be_typed(kind: str, changes: dict[str, Any], written: dict[str, Path]) -> None:
    """Another kind, rank or targets: the flags of the remedy are those with which the start is taken."""
    options = {"kind": kind, **changes, "start": str(written[kind])}
    recipe = load({"base": "x", "data": "y", "method": options})
    with pytest.raises(ConfigError) as caught:
        adapters.load_start(placed(recipe.method, base_of("llama")), written[kind], recipe.method.kind)
    flags = shlex.split(caught.value.remedy.partition("; or ")[0])
    taken = load(recipe, flags).method
    is_taken_over = (kind, changes.get("kind")) == ("lora", "pissa")
    assert (taken.kind, taken.start) == ("pissa" if is_taken_over else kind, str(written[kind]))
    model = placed(taken, base_of("llama"))
    adapters.load_start(model, written[kind], taken.kind)
    if "kind" in changes and not is_taken_over:
        assert f"kind {kind} there, {changes['kind']} here" in caught.value.problem


@each_family
@each_method
def test_fast_path_takes_what_has_lora_factors(row: MethodRow, family: str) -> None:
    model = trained(placed(row.method, base_of(family)))
    if not row.is_fast:
        with pytest.raises(Unsupported):
            FusedDecoder(transformers_backend.without_peft(model), ReferenceKernels())
        return
    fast = FusedDecoder(transformers_backend.without_peft(model), ReferenceKernels())
    batch = pack(EXAMPLES)
    gradients = []
    for losses in (fast.losses, lambda packed: _plain(model, packed)):
        model.zero_grad()
        values = losses(batch)
        values.sum().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        gradients.append((values.detach(), found))
    (fast_values, fast_found), (plain_values, plain_found) = gradients
    assert torch.allclose(fast_values, plain_values, atol=1e-5)
    assert set(fast_found) == set(plain_found)
    assert all(torch.allclose(fast_found[name], plain_found[name], atol=1e-5, rtol=1e-4) for name in fast_found)


def _plain(model: Any, batch: Any) -> torch.Tensor:
    with transformers_backend.packing(model):
        return transformers_backend.pack_losses(model, batch)


def test_pissa_in_16_bits_sums_both_pairs_before_rounding() -> None:
    """A fresh adapter in bf16 is nearer to the base than one rounding of each pair would be."""
    base = base_of("llama").to(torch.bfloat16)
    plain = logits(base).float()
    fresh = logits(placed(ROWS["pissa"].method, base)).float()
    assert (fresh - plain).norm() < 0.01 * plain.norm()


@each_method
def test_engine_serves_it_or_names_the_method(row: MethodRow, written: dict[str, Path], tiny_base: Path) -> None:
    shapes = adapters.linear_shapes(tiny.model(), "all-linear")
    path, base_config = written[row.kind], tiny.model().config.to_dict()
    serving = (
        lambda: read_pairs(path, shapes),
        lambda: adapter_checks.read_config(path / adapters.CONFIG),
        lambda: gguf_writer.write_adapter_gguf(path, base_config, path.parent / f"{row.kind}.gguf"),
    )
    for serve in serving:
        if row.is_fast:
            assert serve()
            continue
        with pytest.raises((AdmissionError, ModelError), match=f"of method '?{row.kind}") as caught:
            serve()
        assert "merged" in caught.value.remedy


@each_method
def test_personal_versions_take_plain_lora_or_name_the_method(
    row: MethodRow, written: dict[str, Path], tiny_base: Path
) -> None:
    if row.stored == "lora":
        assert user_tokens.recipe_of(written[row.kind], tiny_base, {})["method"]["kind"] == "lora"
        return
    with pytest.raises(ConfigError, match=row.kind):
        user_tokens.recipe_of(written[row.kind], tiny_base, {})


@each_method
def test_rounds_and_devices_take_lora_or_name_the_method(row: MethodRow) -> None:
    if row.kind == "lora":
        return
    with pytest.raises(SartorError, match=f"method.kind is '{row.kind}'; it must be lora"):
        config.load(FederateRecipe, {"base": "x", "method": {"kind": row.kind}})
    from sartor.edge.tuning.peak_memory import device_lora

    with pytest.raises(ConfigError, match=f"not {row.kind}"):
        device_lora(row.method)


@each_method
def test_killed_run_ends_at_the_bits_of_an_uninterrupted_one(
    row: MethodRow, dataset: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    settings = {"method": row.options, "checkpoints": {"every_minutes": 0}, "budget": {"updates": 3}, "evaluations": 1}
    base = {"name": str(tiny_base), "bits": 32}
    recipe = {**recipe_on(dataset, tiny_base), **settings, "base": base}
    tune(recipe, tmp_path / "whole")
    killed(monkeypatch, recipe, tmp_path / "cut", update=3)
    tune(recipe, tmp_path / "cut", resume=True)
    assert file_digest(tmp_path / "cut" / WEIGHTS) == file_digest(tmp_path / "whole" / WEIGHTS)
    manifest = open_artifact(tmp_path / "cut").manifest
    assert manifest["recipe"]["method"]["kind"] == row.kind
    assert manifest["run"]["path"] == ("fast" if row.is_fast else "general")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"method": "full", "base": {"name": "x", "bits": 4}}, "base.bits is 4, and full takes auto, 32"),
        ({"method": "oft", "base": {"name": "x", "bits": 8}}, "base.bits is 8, and oft takes auto, 16, 32"),
        ({"method": "ia3", "optimizer": {"b_rate_ratio": 16}}, "b_rate_ratio is 16, and ia3 has no factors B"),
        ({"method": "dora", "trace": {"features": True}}, "the method is dora"),
        ({"optimizer": {"b_rate_ratio": 16}, "trace": {"features": True}}, "lora with b_rate_ratio 16"),
        ({"method": {"kind": "oft", "block_size": 1}}, "block_size is 1"),
        ({"method": {"kind": "miss", "rank": 0}}, "rank is 0"),
        ({"method": {"kind": "pissa", "iterations": -1}}, "iterations -1"),
        ({"method": {"rank": 4, "block_size": 8}}, "block_size"),
        ({"method": {"kind": "ia3", "rank": 8}}, "no option 'method.rank'"),
        ({"optimizer": {"b_rate_ratio": 0}}, "b_rate_ratio is 0"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_by_name(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({"base": "x", "data": "y", **changes})
    assert problem in caught.value.problem and caught.value.remedy


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"kind": "oft", "block_size": 24}, "block_size is 24, and .* has 32 inputs"),
        ({"kind": "miss", "rank": 33}, "rank is 33, and .* has 32 inputs"),
        ({"kind": "pissa", "rank": 33}, "rank is 33, and the smaller side of .*k_proj is 16"),
        ({"kind": "ia3", "targets": ["kproj"]}, "'kproj' names no module"),
        ({"kind": "full", "targets": ["kproj"]}, "'kproj' names no module"),
        ({"kind": "pissa", "targets": {"layers": "top-9"}}, "top-9, and the base has 2 layers"),
    ],
    ids=str,
)
def test_methods_that_do_not_fit_the_base_are_refused(options: dict[str, Any], problem: str) -> None:
    method = load({"base": "x", "data": "y", "method": options}).method
    with pytest.raises(ConfigError, match=problem):
        placed(method, base_of("llama"))


@pytest.mark.parametrize("kind", ROWS)
def test_top_layers_leave_the_others_alone(kind: str) -> None:
    modules = "all" if kind == "full" else "all-linear"
    options = {**ROWS[kind].options, "targets": {"modules": modules, "layers": "top-1"}}
    model = placed(load({"base": "x", "data": "y", "method": options}).method, base_of("llama"))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and all(".layers.1." in name for name in names)


def test_old_recipes_load_without_a_kind() -> None:
    """Short forms and flags of the time when `lora` was the only kind."""
    base = {"base": "x", "data": "y"}
    expected = load({**base, "method": {"kind": "lora", "rank": 4}})
    assert load({**base, "method": {"rank": 4}}) == load({**base, "method": 4}) == expected
    assert load(base, ["--method.rank", "4"]) == load({**base, "method": {"alpha": 32.0}}, ["--method.rank", "4"])
    assert (
        load({**base, "method": {"rank": 4}}, ["--method.kind", "oft"]).method
        == load({**base, "method": "oft"}).method
    )


def test_b_rate_ratio_moves_the_factors_b_alone_faster(
    dataset: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA+: the first step of AdamW is the rate, so B moves by 16 rates and A, whose gradient is 0, not at all."""
    moved: dict[str, float] = {}
    step = TrainingRun._update

    def watched(self: TrainingRun, rows: Any) -> None:
        before = {name: parameter.detach().clone() for name, parameter in self.named.items()}
        step(self, rows)
        moved.update({name: float((self.named[name].detach() - before[name]).abs().max()) for name in before})

    monkeypatch.setattr(TrainingRun, "_update", watched)
    monkeypatch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    recipe = {**recipe_on(dataset, tiny_base), "budget": {"updates": 1}, "evaluations": 0}
    recipe["optimizer"] = {"learning_rate": 1e-3, "batch_tokens": 128, "b_rate_ratio": 16, "schedule": "constant"}
    recipe["optimizer"]["warmup_fraction"] = 0.0
    sartor.tune(recipe, tmp_path / "a", show=False)
    of_b = [distance for name, distance in moved.items() if "lora_B" in name]
    of_a = [distance for name, distance in moved.items() if "lora_A" in name]
    assert max(of_b) == pytest.approx(16e-3, rel=0.05) and max(of_a) < 1.1e-3


def test_optimizer_groups_are_in_the_order_of_the_state() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    settings = ResolvedOptimizer(b_rate_ratio=4.0)
    made = optimizers.make(
        parameters[:1], settings, torch.device("cpu"), projectors=parameters[2:], b_factors=parameters[1:2]
    )
    assert [group["params"][0] is parameters[index] for index, group in enumerate(made.param_groups)] == [True] * 3


def test_full_counts_no_weight_twice() -> None:
    model = placed(ROWS["full"].method, base_of("llama"))
    weights = sum(parameter.numel() for parameter in tiny.model().parameters())
    assert adapters.trainable(model) == (weights, weights)


def test_memory_of_full_is_foreseen(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 bytes a weight before the base is opened; gradients and moments of all weights afterwards."""
    weights = sum(parameter.numel() for parameter in tiny.model().parameters())
    recipe = load({"base": str(tiny_base), "data": "y", "method": "full"})
    for free, count in ((20 * weights, 0), (20 * weights - 1, 1)):
        monkeypatch.setattr(hardware, "available_bytes", lambda device=None, free=free: FreeMemory(free, "a test"))
        refusals = list(preflight.of_base(recipe))
        assert len(refusals) == count
    assert "tuning all weights" in refusals[0].problem and "--method.kind lora" in refusals[0].remedy
    shape = cost_model.shape_of(placed(recipe.method, base_of("llama")), recipe)
    assert shape.state_bytes == 12 * weights


@pytest.mark.parametrize("kind", ["lora", "dora", "miss"])
def test_rank_above_the_memory_is_refused(
    kind: str, dataset: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted before anything is allocated: a refusal of the plan, and an error of the run."""
    monkeypatch.setattr(adapters, "inject", lambda *arguments, **options: pytest.fail("allocated"))
    monkeypatch.setattr(adapters, "inject_lora", lambda *arguments, **options: pytest.fail("allocated"))
    recipe = {**recipe_on(dataset, tiny_base), "method": {"kind": kind, "rank": 99999999}}
    (refusal,) = sartor.plan(recipe).refusals
    assert refusal.reason == preflight.MEMORY and "method.rank is 99,999,999" in refusal.problem
    assert refusal.remedy == "--method.rank 32"
    with pytest.raises(BudgetError, match="method.rank is 99,999,999"):
        sartor.tune(recipe, tmp_path / "a", show=False)


def test_full_keeps_a_tied_head_tied() -> None:
    model = trained(placed(ROWS["full"].method, base_of("llama")))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.modules_to_save["default"].weight is embedding.modules_to_save["default"].weight
    merged = adapters.merge(model)
    assert merged.config.tie_word_embeddings and merged.lm_head.weight is merged.model.embed_tokens.weight


def test_config_of_an_adapter_names_its_method(written: dict[str, Path]) -> None:
    from sartor.core.adapter_methods import method_of

    for kind, row in ROWS.items():
        assert method_of(json.loads((written[kind] / adapters.CONFIG).read_text())) == row.stored
