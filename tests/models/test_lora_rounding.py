"""In 16 bits a low-rank term is added before the frozen product is rounded, wherever one is added.

What is tested is the effect of an adapter whose term is a fraction of a bf16 step: the slope of (output with it, less output
without) over the exact term. It is 1 in the mean where both products are rounded together, and near 0 where the term is added
to a value that stands on the grid already.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
from sartor.inference.local.lora_stacks import ModuleLora
from sartor.inference.local.torch_decoder import Angles, TorchDecoder
from sartor.models import adapters, kernels, packing
from sartor.models.base import open_base
from sartor.models.composed_model import compose_base
from sartor.models.kernels.reference import ReferenceKernels
from sartor.models.losses import fp32_copy, transformers_backend
from sartor.models.losses import lora_rounding as adapted_layers
from sartor.models.losses.fused_decoder import FusedDecoder
from sartor.models.losses.lora_linear import LoraLinear, MappedLinear, Projection
from sartor.models.packing import TokenizedExample
from sartor.tune import recipe
from seeing import Fake, picture, said

N, D, OUTS, R = 256, 64, (64, 32, 32), 4
CPU = torch.device("cpu")


def effect(with_term: torch.Tensor, without: torch.Tensor, term: torch.Tensor) -> float:
    """Slope of the adapter's effect over what it should be."""
    term = term.double()
    return float(((with_term.double() - without.double()) * term).sum() / (term * term).sum())


def linears(bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> list[torch.nn.Linear]:
    torch.manual_seed(0)
    return [torch.nn.Linear(D, out, bias=bias).to(dtype).requires_grad_(False) for out in OUTS]


def adapted(modules: list[torch.nn.Linear], size: float = 2e-3) -> list[LoraLinear]:
    """LoRA whose term is about an eighth of a bf16 step of the products, which are near 0.6."""
    torch.manual_seed(1)
    return [LoraLinear(m, torch.randn(R, D) / 8, torch.randn(m.out_features, R) * size / 16, 4.0) for m in modules]


def low_rank_term(x: torch.Tensor, layers: list[LoraLinear]) -> torch.Tensor:
    return torch.cat(
        [layer.scale * (x.double() @ layer.a.double().T) @ layer.b.double().T for layer in layers], 1
    ).detach()


def mapped(modules: list[torch.nn.Linear]) -> list[Any]:
    return [MappedLinear(m.weight.detach(), m.bias) for m in modules]


@pytest.mark.parametrize("kind", ["plain", "bias", "mapped"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_projection_keeps_the_term_in_bf16(kind: str, with_residual: bool) -> None:
    modules = linears(bias=kind == "bias")
    modules = mapped(modules) if kind == "mapped" else modules
    x = torch.randn(N, D).bfloat16()
    onto = torch.randn(N, sum(OUTS)).bfloat16() if with_residual else None
    layers = adapted(modules)
    with_term = Projection(layers, torch.bfloat16).forward(x, onto)[0]
    without = Projection(modules, torch.bfloat16).forward(x, onto)[0]
    assert 0.8 < effect(with_term, without, low_rank_term(x, layers)) < 1.2


def test_input_gradient_keeps_the_term_in_bf16() -> None:
    modules = linears()
    layers, dy = adapted(modules, size=8e-3), torch.randn(N, sum(OUTS)).bfloat16()
    projection = Projection(layers, torch.bfloat16)
    lowered = projection.lower(dy)
    spans = torch.tensor(OUTS).cumsum(0).tolist()
    term = sum(
        layer.scale * (dy[:, high - out : high].double() @ layer.b.double()) @ layer.a.double()
        for layer, out, high in zip(layers, OUTS, spans, strict=True)
    )
    got, without = projection.input_gradient(dy, lowered), projection.input_gradient(dy, None)
    assert 0.8 < effect(got, without, term.detach()) < 1.2


def test_projection_in_fp32_is_bit_equal_to_the_old_order() -> None:
    modules = linears(dtype=torch.float32)
    layers, x = adapted(modules, size=0.1), torch.randn(N, D)
    y, rank = x @ torch.cat([m.weight for m in modules]).T, 0
    low_rank, spans = x @ torch.cat([layer.a for layer in layers]).T, torch.tensor(OUTS).cumsum(0).tolist()
    for layer, out, high in zip(layers, OUTS, spans, strict=True):
        y[:, high - out : high].addmm_(low_rank[:, rank : rank + R], layer.b.T, alpha=layer.scale)
        rank += R
    assert torch.equal(Projection(layers, torch.float32).forward(x)[0], y)


def small_lora(model: Any, dropout: float = 0.0, size: float = 1e-4) -> Any:
    made = adapters.inject_lora(model, rank=R, alpha=4 * R, dropout=dropout, targets="all-linear", seed=0)
    torch.manual_seed(2)
    for name, part in made.named_parameters():
        if "lora_B" in name:
            part.data.normal_(std=size)
    return made


def layer_and_term(model: Any, x: torch.Tensor) -> tuple[Any, torch.Tensor]:
    layer = transformers_backend.without_peft(model).model.layers[0].mlp.gate_proj
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return layer, (layer.scaling["default"] * (x.double() @ a.T) @ b.T).detach()


def wide_model() -> Any:
    return tiny.model(hidden_size=64, intermediate_size=128, num_key_value_heads=4).bfloat16().requires_grad_(False)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_peft_layer_keeps_the_term_in_bf16(bits: int, tmp_path: Path) -> None:
    if bits < 16:
        pytest.importorskip("bitsandbytes", reason="pip install 'sartor[quant]'")
    path = tmp_path / "base"
    wide_model().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    base = open_base(str(path), bits=bits, device=CPU)
    if base.dtype != torch.bfloat16:
        pytest.skip("a quantised base computes in fp32 on this processor")
    x = torch.randn(N, 64).bfloat16()
    model = small_lora(base.model, size=3e-5 if bits == 16 else 1e-4)
    layer, term = layer_and_term(model, x)
    with torch.no_grad():
        assert 0.75 < effect(layer(x), layer.base_layer(x), term) < 1.25


def test_peft_layer_has_the_gradients_of_fp64() -> None:
    model = small_lora(wide_model(), size=0.05)
    x = torch.randn(N, 64).bfloat16().requires_grad_()
    layer, _ = layer_and_term(model, x)
    layer(x).float().square().sum().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    wide = (
        exact[0] @ layer.base_layer.weight.double().T + layer.scaling["default"] * (exact[0] @ exact[1].T) @ exact[2].T
    )
    wide.square().sum().backward()
    for got, right in zip((x.grad, a.grad, b.grad), (t.grad for t in exact), strict=True):
        assert float((got.double() - right).norm() / right.norm()) < 0.02


def test_peft_layer_drops_inputs_of_a_only() -> None:
    model = small_lora(wide_model(), dropout=0.5, size=0.05).train()
    layer, _ = layer_and_term(model, torch.zeros(1, 64))
    x = torch.randn(N, 64).bfloat16().requires_grad_()
    torch.manual_seed(5)
    y = layer(x)
    y.float().sum().backward()
    y = y.detach()
    torch.manual_seed(5)
    kept = layer.lora_dropout["default"](torch.ones(N, 64).bfloat16())
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a, b, inputs = a.detach(), b.detach(), x.detach().double()
    low_rank = (inputs * kept.double()) @ a.double().T
    right = inputs @ layer.base_layer.weight.double().T + layer.scaling["default"] * low_rank @ b.double().T
    assert float((y.double() - right).norm() / right.norm()) < 0.01
    slope = torch.ones(N, layer.out_features).double()
    dx = slope @ layer.base_layer.weight.double()
    dx += kept.double() * (layer.scaling["default"] * (slope @ b.double()) @ a.double())
    assert float((x.grad.double() - dx).norm() / dx.norm()) < 0.01
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_peft_layer_keeps_its_forward_in_fp32_and_when_disabled() -> None:
    wide = small_lora(tiny.model().requires_grad_(False))
    assert all("forward" not in vars(part) for part in wide.modules() if hasattr(part, "lora_A"))
    narrow = small_lora(wide_model(), size=0.05)
    layer, _ = layer_and_term(narrow, torch.zeros(1, 64))
    x = torch.randn(3, 64).bfloat16()
    with narrow.disable_adapter():
        assert torch.equal(layer(x), layer.base_layer(x))
    assert not torch.equal(layer(x), layer.base_layer(x))
    assert adapters.undo(narrow) is not narrow


def torch_blocks(model: Any) -> TorchDecoder:
    fast = FusedDecoder(model, ReferenceKernels())
    names = {id(module): name for name, module in model.named_modules()}
    return TorchDecoder(fast, 4, Angles(fast, model.config, 128), names)


def test_torch_serving_keeps_the_term_of_each_row_in_bf16() -> None:
    model = wide_model()
    blocks = torch_blocks(model)
    torch.manual_seed(3)
    pair = ModuleLora(torch.randn(R, 128) / 8, torch.randn(64, R) * 2e-5, 4.0)
    blocks.factors.add("a", {"model.layers.0.mlp.down_proj": pair})
    x = torch.randn(16, 128).bfloat16()
    slots = torch.tensor([0, -1] * 8)
    gaps, terms = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        x = torch.randn(16, 128).bfloat16()
        y = blocks._product(3, x, lambda site, y, x: blocks._serving.adapt(y, x, blocks.factors.stacks[site], slots))
        base = blocks._product(3, x, lambda site, y, x: None)
        assert torch.equal(y[1::2], base[1::2])  # rows of the base have the bits that they have alone
        gaps.append((y - base)[::2])
        terms.append(4.0 * (x[::2].double() @ pair.a.double().T) @ pair.b.double().T)
    assert 0.8 < effect(torch.cat(gaps), torch.zeros(320, 64), torch.cat(terms)) < 1.2


def loud_model() -> Any:
    """A bf16 model whose losses are large, and round by tenths of a nat."""
    model = tiny.model(num_hidden_layers=2, tie_word_embeddings=False)
    model.lm_head.weight.data *= 400
    return model.bfloat16().requires_grad_(False)


def short_rows(count: int = 24) -> list[TokenizedExample]:
    torch.manual_seed(4)
    lengths = [6 + number % 7 for number in range(count)]
    return [
        TokenizedExample(torch.randint(3, tiny.SIZE, (size,)).tolist(), [False] * 2 + [True] * (size - 2))
        for size in lengths
    ]


def test_fast_path_is_taken_where_both_ways_round_alike() -> None:
    model = small_lora(loud_model(), size=0.05).eval()
    rows = short_rows()
    plain = transformers_backend.row_losses(model, rows, CPU).detach()
    with torch.no_grad(), fp32_copy.in_fp32(model):
        right = transformers_backend.row_losses(model, rows, CPU)
    assert transformers_backend._root_mean_square(plain - right) > 0.25
    assert transformers_backend.choose_loss_backend(model, rows, CPU).name == "fast"


def test_wrong_fast_path_is_refused_and_told_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_lora(loud_model(), size=0.05).eval()
    original = FusedDecoder.losses
    monkeypatch.setattr(FusedDecoder, "losses", lambda self, batch: original(self, batch) * 1.1)
    path = transformers_backend.choose_loss_backend(model, short_rows(), CPU)
    assert path.name == "general"
    assert "differs from the model's own losses by" in path.reason
    assert "times as long as on the fast path" in path.reason


def test_refusal_without_a_fast_path_says_its_cost_is_unknown() -> None:
    model = small_lora(loud_model(), dropout=0.1, size=0.05).eval()
    assert "cannot be timed here" in transformers_backend.choose_loss_backend(model, short_rows(), CPU).reason


def test_in_fp32_matches_an_fp32_model_and_restores_the_weights() -> None:
    """Afterwards weights, types and forward methods are as they were."""
    narrow, wide = loud_model(), loud_model().float()
    rows = short_rows(4)
    before = {name: part.clone() for name, part in narrow.named_parameters()}
    with torch.no_grad(), fp32_copy.in_fp32(narrow):
        got = transformers_backend.row_losses(narrow, rows, CPU)
    with torch.no_grad():
        assert torch.allclose(got, transformers_backend.row_losses(wide, rows, CPU), atol=1e-5)
    after = dict(narrow.named_parameters())
    assert all(after[name].dtype == part.dtype and torch.equal(after[name], part) for name, part in before.items())
    assert all("forward" not in vars(module) for module in narrow.modules())


def test_in_fp32_gives_back_after_an_error() -> None:
    model = loud_model()

    def fail(*given: Any) -> None:
        raise ValueError("in the middle")

    model.model.layers[1].input_layernorm.register_forward_hook(fail)
    with pytest.raises(ValueError, match="in the middle"), torch.no_grad(), fp32_copy.in_fp32(model):
        transformers_backend.row_losses(model, short_rows(2), CPU)
    assert {part.dtype for part in model.parameters()} == {torch.bfloat16}


def test_bits_32_asks_for_fp32_where_auto_means_bf16(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sartor.models import base as module

    monkeypatch.setattr(module, "best_dtype", lambda device: torch.bfloat16)
    loaded = recipe.load({"base": {"name": str(tiny_base), "bits": 32}, "data": {"path": "rows"}})
    assert open_base(loaded.base.name, bits=loaded.base.bits, device=CPU).dtype == torch.float32
    assert open_base(loaded.base.name, bits="auto", device=CPU).dtype == torch.bfloat16


def test_bf16_losses_of_both_paths_follow_the_adapter() -> None:
    """An adapter of which every term is below a bf16 step still moves the losses as it does in fp32."""
    model = small_lora(wide_model(), size=2e-4).eval()
    rows = [packing.TokenizedExample(row.ids, row.learnt) for row in short_rows(64)]
    fast = FusedDecoder(transformers_backend.without_peft(model), kernels.choose_kernels(CPU)[0])
    with torch.no_grad(), fp32_copy.in_fp32(model):
        right = transformers_backend.row_losses(model, rows, CPU)
    with torch.no_grad(), model.disable_adapter(), fp32_copy.in_fp32(model):
        base = transformers_backend.row_losses(model, rows, CPU)
    for losses in (
        lambda: fast.losses(packing.pack(rows, CPU)),
        lambda: transformers_backend.row_losses(model, rows, CPU),
    ):
        with torch.no_grad():
            got = losses()
        assert effect(got, base, right - base) > 0.5


def test_peft_layer_calls_its_factors_where_hooks_wait_for_them() -> None:
    model = small_lora(wide_model(), size=0.05)
    layer, _ = layer_and_term(model, torch.zeros(1, 64))
    heard: list[tuple[int, ...]] = []
    hook = layer.lora_A["default"].register_forward_hook(lambda module, given, made: heard.append(made.shape))
    layer(torch.randn(3, 64).bfloat16())
    hook.remove()
    layer(torch.randn(5, 64).bfloat16())
    assert heard == [(3, R)]


def test_composed_base_with_media_takes_the_fast_path_in_bf16(tmp_path: Path) -> None:
    """Losses of its image and audio rows are off by more than 0.25 nats; embeddings stay bit for bit."""
    base = open_base(str(tiny.write_base(tmp_path / "base", tie_word_embeddings=False)), bits=16, device=CPU)
    base.model.lm_head.weight.data *= 400  # both ways then round by tenths of a nat
    base = compose_base(base, {"image": Fake(), "audio": Fake("audio", stack=4)})
    model = small_lora(base.model, size=0.05).eval()
    rows = [
        base.chat.encode(
            said(picture(4 + number, f"a{number}", kind), "what colour is the sky", reply="the sky is blue")
        )
        for number in range(8)
        for kind in ("image", "audio")
    ]
    features = [part.clone() for part in base.model.get_input_embeddings().parameters()]
    plain = transformers_backend.row_losses(model, rows, CPU).detach()
    right = transformers_backend._fp32_losses(model, rows, CPU)
    assert right is not None and transformers_backend._root_mean_square(plain - right) > 0.25
    assert transformers_backend.choose_loss_backend(model, rows, CPU).name == "fast"
    after = base.model.get_input_embeddings().parameters()
    assert all(torch.equal(now, before) for now, before in zip(after, features, strict=True))


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=tiny.SIZE, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    return transformers.GPT2LMHeadModel(config).bfloat16().requires_grad_(False)


def test_conv1d_layers_of_gpt2_keep_the_term_too() -> None:
    model = small_lora(gpt2(), size=1e-5)
    layer = transformers_backend.without_peft(model).transformer.h[0].mlp.c_fc
    x = torch.randn(N, 64).bfloat16()
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    term = (layer.scaling["default"] * (x.double() @ a.T) @ b.T).detach()
    with torch.no_grad():
        assert 0.75 < effect(layer(x), layer.base_layer(x), term) < 1.25
    assert adapted_layers.rounded_twice(model) == 0


def test_fused_experts_are_said_to_round_twice() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MixtralConfig(vocab_size=tiny.SIZE, num_key_value_heads=2, num_local_experts=2, **sizes)
    model = transformers.MixtralForCausalLM(config).bfloat16().requires_grad_(False)
    model = small_lora(model, size=1e-3).eval()
    kept = adapted_layers.rounded_twice(model)
    assert (f"{kept} adapted layers" in transformers_backend.choose_loss_backend(model, short_rows(), CPU).reason) == (
        kept > 0
    )
