"""A base in 4 or 8 bits: what it computes, what it weighs, and that an evaluation does not change what is trained."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sartor
import tiny
from sartor.core.errors import ConfigError, ExtraError, ModelError
from sartor.core.installation import install_command
from sartor.models import adapters, packing, quantization
from sartor.models.base import Base, open_base
from sartor.models.losses import loss_backend, transformers_backend
from sartor.models.losses.loss_backend import LossOptions

bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install 'sartor[quant]'")
CPU = torch.device("cpu")
BITS = pytest.mark.parametrize("bits", [4, 8])
pytestmark = pytest.mark.usefixtures("fp32")
ROWS = [packing.TokenizedExample(list(range(20 + n, 44 + 2 * n)), [False] * 8 + [True] * (16 + n)) for n in range(4)]


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, wider: every layer is a multiple of 64 each way, which repacking asks for."""
    path = tmp_path_factory.mktemp("wide") / "base"
    tiny.model(hidden_size=64, intermediate_size=128, num_key_value_heads=4).save_pretrained(str(path))
    tiny.tokenizer().save_pretrained(str(path))
    return path


def opened(path: Path, bits: int) -> Base:
    return open_base(str(path), bits=bits, device=CPU)


def inject(base: Base) -> Any:
    return adapters.inject_lora(base.model, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0)


def layers(model: Any) -> dict[str, Any]:
    return {name: part for name, part in model.named_modules() if quantization.is_quantised(part)}


def gradients(model: Any, rows: list[packing.TokenizedExample] = ROWS) -> dict[str, torch.Tensor]:
    model.train()
    transformers_backend.PackedTransformersBackend(model, CPU, "").losses(rows)[0].mean().backward()
    found = {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def evaluate(model: Any, rows: list[packing.TokenizedExample] = ROWS) -> torch.Tensor:
    model.eval()
    return transformers_backend.PackedTransformersBackend(model, CPU, "").losses(rows)[0]


# --- opening


@BITS
def test_only_linear_layers_except_the_head_are_quantized(tiny_base: Path, bits: int) -> None:
    """The tied head keeps its weights bit for bit, and no parameter is trained."""
    base = opened(tiny_base, bits)
    assert len(layers(base.model)) == 2 * 7
    assert {quantization.width(part) for part in layers(base.model).values()} == {bits}
    assert type(base.model.lm_head) is torch.nn.Linear
    assert base.model.lm_head.weight is base.model.get_input_embeddings().weight
    wanted = tiny.model().to(base.dtype)
    assert torch.equal(base.model.lm_head.weight, wanted.lm_head.weight)
    assert not [name for name, part in base.model.named_parameters() if part.requires_grad]
    assert not base.model.training


@BITS
def test_manifest_states_the_bits_and_keeps_the_digest(tiny_base: Path, bits: int) -> None:
    """The digest is that of the base without quantisation."""
    said, plain = opened(tiny_base, bits).as_manifest(), open_base(str(tiny_base)).as_manifest()
    assert (said["bits"], said["quantisation"]) == (bits, {4: "nf4", 8: "int8"}[bits])
    assert (plain["bits"], plain["quantisation"]) == (plain["dtype"] == "float32" and 32 or 16, "none")
    assert said["digest"] == plain["digest"]


def test_without_bitsandbytes_the_extra_is_named(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ExtraError, match="bitsandbytes") as caught:
        opened(tiny_base, 4)
    assert caught.value.remedy == install_command("quant")


def test_a_device_that_cannot_is_refused(tiny_base: Path) -> None:
    with pytest.raises(ConfigError, match="base.bits is 4, which this machine's mps"):
        open_base(str(tiny_base), bits=4, device=torch.device("mps"))


def test_a_16_bit_base_has_no_quantised_layer(tiny_base: Path) -> None:
    base = open_base(str(tiny_base), device=CPU)
    assert layers(base.model) == {}
    assert quantization.bits_of(base.model) == 0


@pytest.mark.services
def test_opening_does_not_hold_the_base_a_second_time(tmp_path: Path, tiny_base: Path) -> None:
    """Pages of a mapped file count as resident: reading bf16 weights must not cost what they weigh."""
    path = tmp_path / "wide"
    settings = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8}
    with torch.device("meta"):
        model = tiny.model(**settings, dtype=torch.bfloat16)
    model.config.save_pretrained(str(path))
    tiny.tokenizer().save_pretrained(str(path))
    weights = {name: torch.full(part.shape, 0.01, dtype=torch.bfloat16) for name, part in model.named_parameters()}
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    total = sum(part.numel() * 2 for part in weights.values())
    code = (
        "import sys, torch\n"
        "from sartor.models.base import open_base\n"
        "def memory(name):\n"
        "    status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "    return int(status[name].split()[0]) * 1024\n"
        "open_base(sys.argv[2], bits=4, device=torch.device('cpu'))\n"  # what is imported counts for nothing
        "open('/proc/self/clear_refs', 'w').write('5')\n"  # the peak begins anew
        "before = memory('VmRSS')\n"
        "open_base(sys.argv[1], bits=4, device=torch.device('cpu'))\n"
        "print(memory('VmHWM') - before)\n"
    )
    command = [sys.executable, "-c", code, str(path), str(tiny_base)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert total > 1e8
    above = int(done.stdout)
    assert 0.2 * total < above < 0.7 * total  # the 4-bit weights, one layer on its way, and the allocator's slack


@BITS
def test_an_embedding_of_its_own_is_held_as_it_was_read(tmp_path: Path, bits: int) -> None:
    plain = tiny.model(tie_word_embeddings=False).bfloat16()
    plain.save_pretrained(str(tmp_path / "b"))
    tiny.tokenizer().save_pretrained(str(tmp_path / "b"))
    base = opened(tmp_path / "b", bits)
    embedding, ids = base.model.get_input_embeddings(), torch.tensor([[3, 300, 7]])
    assert base.dtype == base.model.lm_head.weight.dtype == torch.float32
    assert embedding.weight.dtype == torch.bfloat16
    assert embedding(ids).dtype == base.dtype
    assert torch.equal(embedding(ids), plain.get_input_embeddings()(ids).to(base.dtype))
    assert transformers_backend.packs_exactly(inject(base).eval(), ROWS, CPU)[1] < 1e-3


# --- what a layer computes


@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_its_dense_weight_in_either_mode(tiny_base: Path, bits: int, dtype: torch.dtype) -> None:
    base, plain = opened(tiny_base, bits), tiny.model().state_dict()
    x = torch.randn(5, 64).to(dtype)
    for name, part in layers(base.model).items():
        part.compute_dtype = dtype
        weight = quantization.dense_weight(part, dtype)
        assert (weight.shape, weight.dtype) == (plain[f"{name}.weight"].shape, dtype)
        wanted = x[:, : part.in_features] @ weight.T
        for training in (True, False):
            assert torch.equal(part.train(training)(x[:, : part.in_features]), wanted)
        error = (weight.float() - plain[f"{name}.weight"]).abs().max() / plain[f"{name}.weight"].abs().max()
        assert error < (0.2 if bits == 4 else 0.02)  # the widest gap between levels


@pytest.mark.parametrize("shape", [(40, 96), (5, 48), (96, 40), (7, 33), (32, 128)], ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_nf4_is_the_table_of_the_paper_times_the_scales(double: bool, shape: tuple[int, int]) -> None:
    """Against a plain look-up of 4-bit codes, two a byte, the high half first."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    linear = bitsandbytes.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4", compress_statistics=double)
    linear.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double
    )
    linear.to("cpu")
    state = linear.weight.quant_state
    packed = linear.weight.data.flatten().long()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()
    scales = state.absmax.float()
    if double:
        scales = (
            state.state2.code[state.absmax.long()] * state.state2.absmax.repeat_interleave(256)[: len(scales)]
            + state.offset
        )
    wanted = (state.code[codes[: weight.numel()]] * scales.repeat_interleave(64)[: weight.numel()]).view(shape)
    assert torch.equal(quantization.dense_weight(linear, torch.float32), wanted)
    assert (wanted - weight).abs().max() < 0.2 * weight.abs().max()


@BITS
def test_the_gradient_is_that_of_the_same_base_dense(tiny_base: Path, bits: int) -> None:
    base = opened(tiny_base, bits)
    dense = tiny.model().requires_grad_(False)
    for name, part in layers(base.model).items():
        dense.get_submodule(name).weight.data = quantization.dense_weight(part, torch.float32)
    mine = gradients(inject(base))
    theirs = gradients(adapters.inject_lora(dense, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0))
    assert set(mine) == set(theirs)
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


@BITS
def test_rows_pack_exactly(tiny_base: Path, bits: int) -> None:
    model = inject(opened(tiny_base, bits)).eval()
    is_exact, difference = transformers_backend.packs_exactly(model, ROWS, CPU)
    assert is_exact, difference
    assert isinstance(transformers_backend.choose_loss_backend(model, ROWS, CPU), loss_backend.FusedBackend)
    assert isinstance(
        transformers_backend.choose_loss_backend(model, ROWS, CPU, LossOptions(fast=False)),
        transformers_backend.PackedTransformersBackend,
    )


def test_a_token_of_an_int8_layer_does_not_see_its_neighbours(wide_base: Path) -> None:
    """bitsandbytes multiplies the columns in which any token has an outlier otherwise, so there every token moves."""
    torch.manual_seed(0)
    quiet = torch.randn(3, 64)
    loud = quiet.clone()
    loud[2] *= 40
    layer = opened(wide_base, 8).model.model.layers[0].mlp.up_proj
    assert torch.equal(layer(quiet)[0], layer(loud)[0])
    plain = type(layer).forward  # what `protect` replaces
    assert not torch.equal(plain(layer, quiet)[0], plain(layer, loud)[0])


# --- an evaluation in the middle


@pytest.fixture
def as_if_avx512_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' probe of the processor says yes, so that layers made from here on would repack themselves."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)


def test_a_layer_that_nobody_protects_repacks_itself(as_if_avx512_bf16: None) -> None:
    """The fault that `protect` closes is there in this bitsandbytes: when this fails, look whether it is still needed."""
    linear = (
        bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32).to("cpu").eval()
    )
    before = linear.weight.data.clone()
    # the product of packed weights itself is not there on every machine
    with torch.no_grad(), contextlib.suppress(RuntimeError, NotImplementedError, AttributeError):
        linear(torch.randn(2, 64))
    assert linear.weight.data.shape != before.shape or not torch.equal(linear.weight.data, before)


def test_an_evaluation_leaves_weights_and_gradients_as_they_were(wide_base: Path, as_if_avx512_bf16: None) -> None:
    model = inject(opened(wide_base, 4))
    for name, part in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(part, std=0.02)  # zero factors would hide the base's part in the gradient of A
    weights = {name: part.weight.data.clone() for name, part in layers(model).items()}
    before = gradients(model)
    losses = evaluate(model)
    with torch.no_grad():
        model.generate(input_ids=torch.tensor([ROWS[0].ids]), max_new_tokens=2, do_sample=False, attention_mask=None)
    after = gradients(model)
    assert torch.equal(evaluate(model), losses)
    for name, part in layers(model).items():
        assert torch.equal(part.weight.data, weights[name]), name
        assert not getattr(part.weight.quant_state, "packing_format_for_cpu", False)
    assert all(torch.equal(gradient, before[name]) for name, gradient in after.items())


@BITS
def test_the_loss_goes_on_falling_after_an_evaluation(wide_base: Path, as_if_avx512_bf16: None, bits: int) -> None:
    model = inject(opened(wide_base, bits))
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=2e-2)
    losses = []
    for step in range(16):
        model.train()
        loss = transformers_backend.PackedTransformersBackend(model, CPU, "").losses(ROWS)[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if step == 7:
            assert float(evaluate(model).mean()) < losses[0]
    assert losses[7] < losses[0] - 0.1
    assert losses[15] < losses[8] - 0.05


@BITS
def test_what_is_evaluated_is_what_is_trained(tiny_base: Path, bits: int) -> None:
    model = inject(opened(tiny_base, bits))
    trained = transformers_backend.PackedTransformersBackend(model.train(), CPU, "").losses(ROWS)[0].detach()
    assert torch.equal(evaluate(model), trained)


# --- adapters


@BITS
def test_an_adapter_goes_on_and_comes_off_bit_for_bit(tiny_base: Path, tmp_path: Path, bits: int) -> None:
    base = opened(tiny_base, bits)
    before = evaluate(base.model)
    kinds = {name: type(part) for name, part in layers(base.model).items()}
    model = inject(base)
    assert torch.equal(evaluate(model), before)
    assert {part.dtype for name, part in model.named_parameters() if "lora_" in name} == {torch.float32}
    for name, part in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(part, std=0.02)
    tuned = evaluate(model)
    adapters.write_adapter(model, tmp_path / "adapter", "tiny")
    assert not torch.equal(tuned, before)
    bare = adapters.undo(model)
    assert torch.equal(evaluate(bare), before)
    assert {name: type(part) for name, part in layers(bare).items()} == kinds
    again = adapters.open_adapter(opened(tiny_base, bits).model, tmp_path / "adapter")
    assert torch.equal(evaluate(again), tuned)


@BITS
def test_targets_by_name_and_wrong_ones(tiny_base: Path, bits: int) -> None:
    base = opened(tiny_base, bits)
    with pytest.raises(ConfigError, match="names no module") as caught:
        adapters.inject_lora(base.model, rank=4, alpha=8.0, dropout=0.0, targets=["query"], seed=0)
    assert "down_proj" in caught.value.remedy
    model = adapters.inject_lora(base.model, rank=4, alpha=8.0, dropout=0.0, targets=["q_proj"], seed=0)
    assert adapters.trainable(model) == (
        2 * 4 * (32 + 32),
        adapters.trainable(inject(open_base(str(tiny_base))))[1] - 4096 + 512,
    )


@BITS
def test_a_merge_is_refused_with_where_to_do_it(tiny_base: Path, bits: int) -> None:
    model = inject(opened(tiny_base, bits))
    with pytest.raises(ModelError, match=f"merged into a base in {bits} bits") as caught:
        adapters.merge(model)
    assert "bits 16" in caught.value.remedy
    evaluate(model)


# --- memory, and the whole


def test_what_linear_weights_weigh(tmp_path: Path) -> None:
    tiny.model(hidden_size=256, intermediate_size=1024).save_pretrained(str(tmp_path / "b"))
    tiny.tokenizer().save_pretrained(str(tmp_path / "b"))
    weights = {bits: quantization.linear_bytes(opened(tmp_path / "b", bits).model) for bits in (4, 8, 16)}
    count = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 1024)
    assert weights[16] == 2 * count
    assert count < weights[8] < 1.02 * count
    assert count / 2 < weights[4] < 0.55 * count  # a scale of 8 bits for 64 weights, and a table of a layer's own


@pytest.mark.services
@BITS
def test_tune_and_evaluate_end_to_end(tmp_path: Path, tune_recipe: dict[str, Any], bits: int) -> None:
    recipe = {**tune_recipe, "base": {"name": tune_recipe["base"], "bits": bits}, "budget": {"epochs": 8}}
    tuned = sartor.tune(recipe, tmp_path / "adapter", show=False)
    run, said = tuned.as_json(), tuned.adapter.manifest["base"]
    assert run["loss"]["last"] < run["loss"]["first"] - 0.1
    assert run["path"] != "one-row"
    assert (said["bits"], said["quantisation"]) == (bits, quantization.KINDS[bits])
    report = sartor.evaluate(tmp_path / "adapter", out=tmp_path / "report").report.manifest
    assert report["base"]["bits"] == bits  # measured on what was tuned
