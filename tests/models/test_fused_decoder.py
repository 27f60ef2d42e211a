"""The fast path against transformers' own modules, and its savings against the plain computation."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sartor.models import adapters, packing
from sartor.models.kernels import cpu
from sartor.models.kernels.reference import ReferenceKernels
from sartor.models.losses import transformers_backend
from sartor.models.losses.fused_decoder import FAMILIES, FusedDecoder
from sartor.models.losses.lora_linear import Unsupported
from sartor.models.losses.loss_backend import LossOptions, measure_savings_error
from tiny_families import MODELS, SHAPE, V, fast_path, rows, tuned


def kernels() -> list[ReferenceKernels]:
    made: list[ReferenceKernels] = [ReferenceKernels()]
    with contextlib.suppress(cpu.NoKernels):
        made.append(cpu.load())
    return made


def gradients(model: Any, losses: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad((losses * weights).sum(), trained, allow_unused=True)
    return [
        torch.zeros_like(parameter) if grad is None else grad for grad, parameter in zip(found, trained, strict=True)
    ]


def apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).detach().norm() / wanted.detach().norm().clamp_min(1e-30))


def worst(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    return max(apart(one, other) for one, other in zip(got, wanted, strict=True))


def test_every_family_in_the_table_is_tested() -> None:
    assert set(MODELS) == set(FAMILIES)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("made", kernels(), ids=lambda made: made.name)
@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_and_gradients_are_transformers_own_in_fp64(kind: str, made: ReferenceKernels, recompute: bool) -> None:
    model, examples = tuned(kind), rows(20, 5, 33, 12, 1, 40)
    wanted = transformers_backend.row_losses(model, examples, "cpu")
    fast = FusedDecoder(transformers_backend.without_peft(model), made, recompute=recompute)
    got = fast.losses(packing.pack(examples))
    assert apart(got, wanted) < 1e-6  # the head of transformers' path is asked in fp64, its rotary angles in fp32
    assert worst(gradients(model, got), gradients(model, wanted)) < 1e-6


@pytest.mark.parametrize("made", kernels(), ids=lambda made: made.name)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_match_transformers_in_fp32_and_bf16(
    kind: str, made: ReferenceKernels, dtype: torch.dtype, limit: float
) -> None:
    """Within a relative 1e-5 in fp32 and 0.03 in bf16, which training uses."""
    model, examples = tuned(kind, dtype), rows(20, 5, 33, 12)
    got = FusedDecoder(transformers_backend.without_peft(model), made).losses(packing.pack(examples, share=True))
    assert apart(got, transformers_backend.row_losses(model, examples, "cpu")) < limit


@pytest.mark.parametrize("made", kernels(), ids=lambda made: made.name)
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("top", [2, 1])
def test_tokens_that_fill_a_pack_up_change_nothing(kind: str, made: ReferenceKernels, top: int) -> None:
    """Neither losses nor gradients; `top` layers are adapted."""
    model, examples = tuned(kind, top=top), rows(20, 5, 33, 12, 1, 40, head=10)
    fast = FusedDecoder(transformers_backend.without_peft(model), made)
    for share in (False, True):
        plain, filled = (packing.pack(examples, share=share, multiple=multiple) for multiple in (1, 32))
        assert filled.tokens % 32 == 0 and plain.tokens <= filled.tokens < plain.tokens + 32
        output_rows, places = filled.output_rows
        assert len(output_rows) % 32 == 0 and torch.equal(output_rows[places], filled.predict)
        assert torch.equal(output_rows, output_rows.unique())
        wanted, got = fast.losses(plain), fast.losses(filled)
        assert apart(got, wanted) < 1e-10
        assert worst(gradients(model, got), gradients(model, wanted)) < 1e-10


def test_packs_are_filled_up_in_16_bits_alone() -> None:
    """In fp32 the bits of older runs stay."""
    examples = rows(20, 5, 33)
    for dtype, multiple in ((torch.bfloat16, 32), (torch.float32, 1), (torch.float64, 1)):
        path = fast_path(tuned("llama", dtype), examples)
        assert path.fast.token_multiple == multiple
        assert path.pack(examples).tokens == -(-58 // multiple) * multiple


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(sorted(FAMILIES)),
    lengths=st.lists(st.integers(1, 45), min_size=1, max_size=6),
    head=st.integers(0, 30),
    groups=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([3, 8, 100]),
    softcap=st.sampled_from([None, 2.0, 20.0]),
    seed=st.integers(0, 1000),
)
def test_shared_prefixes_change_nothing(
    kind: str, lengths: list[int], head: int, groups: int, window: int, softcap: float | None, seed: int
) -> None:
    changes: dict[str, Any] = {"num_key_value_heads": groups}
    if "sliding_window" in MODELS[kind][1]:
        changes["sliding_window"] = window
    if kind == "gemma2":
        changes["attn_logit_softcapping"] = softcap
    examples = rows(*lengths, head=head, seed=seed)
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model = tuned(kind, dtype, **changes)
        for made in kernels():
            fast = FusedDecoder(transformers_backend.without_peft(model), made)
            plain, shared = (fast.losses(packing.pack(examples, share=share)) for share in (False, True))
            if len(plain):
                assert apart(shared, plain) <= limit
                assert worst(gradients(model, shared), gradients(model, plain)) <= limit


def test_shared_prefixes_are_laid_once() -> None:
    examples = rows(40, 45, 50, head=30)
    assert packing.pack(examples, share=True).tokens == 30 + 10 + 15 + 20
    assert packing.pack([*examples, *examples], share=True).tokens == 30 + 10 + 15 + 20  # whole rows twice, too


@pytest.mark.parametrize("made", kernels(), ids=lambda made: made.name)
@pytest.mark.parametrize("kind", FAMILIES)
def test_frozen_activations_from_disk_change_nothing(kind: str, made: ReferenceKernels) -> None:
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, examples = tuned(kind, dtype, top=1), rows(20, 5, 33, 12, 40, head=10)
        path = fast_path(model, examples, reuse_bytes=1 << 30)
        assert path.frozen is not None
        proof = measure_savings_error(path, examples)
        assert proof["loss"] <= limit and 0 <= proof["gradient"] <= limit
        assert (path.frozen.computed, path.frozen.reused) == (1, 0)
        again = fast_path(model, examples, reuse_bytes=1 << 30)
        assert torch.equal(again.losses(examples[::-1])[0], path.losses(examples[::-1])[0])
        assert again.frozen is not None and (again.frozen.computed, again.frozen.reused) == (0, 1)


def test_a_damaged_or_foreign_file_of_activations_is_made_again() -> None:
    from sartor.core.home import folder

    model, examples = tuned("llama", torch.float32, top=1), rows(20, 30)
    wanted = fast_path(model, examples, reuse_bytes=1 << 30).losses(examples)[0]
    (file,) = folder("activations").glob("*/*.safetensors")
    content = file.read_bytes()
    for damage in (b"", content[:-5], content[:-1] + bytes([content[-1] ^ 1])):
        file.write_bytes(damage)
        path = fast_path(model, examples, reuse_bytes=1 << 30)
        assert torch.equal(path.losses(examples)[0], wanted)
        assert path.frozen is not None and path.frozen.computed == 1
        assert len(file.read_bytes()) == len(content)


def test_activation_cache_stays_within_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is computed again, a notice says so, and losses stay the same."""
    from sartor.core.home import folder
    from sartor.models.losses import loss_backend

    monkeypatch.setattr(loss_backend, "PACK_TOKENS", 40)
    model = tuned("llama", torch.float32, top=1)
    said: list[str] = []
    limit = 100 * 32 * 4 + 2000  # 100 tokens of width 32 in fp32, and room for two headers
    for seed in range(3):
        examples = rows(40, 40, 40, seed=seed)
        path = fast_path(model, examples, reuse_bytes=limit, notice=said.append)
        plain = fast_path(model, examples)
        assert apart(path.losses(examples)[0], plain.losses(examples)[0]) < 1e-5
        stored = sum(file.stat().st_size for file in folder("activations").glob("*/*.safetensors"))
        assert 0 < stored <= limit
    assert "1 are computed anew" in said[0]


def test_activations_are_not_stored_without_reuse() -> None:
    """Nothing is stored if every layer is adapted, or if rows are read only once."""
    examples = rows(20, 30)
    assert fast_path(tuned("llama", torch.float32), examples, reuse_bytes=1 << 30).frozen is None
    assert fast_path(tuned("llama", torch.float32, top=1), examples).frozen is None


def test_head_computes_supervised_tokens_only() -> None:
    """With top=1 the lowest adapted layer is the last of three."""
    model, examples = tuned("llama", torch.float32, top=1), rows(20, 30)
    fast = FusedDecoder(transformers_backend.without_peft(model), ReferenceKernels())
    assert fast.lowest == 2
    seen: list[int] = []
    fast.kernels.cross_entropy = lambda logits, *rest: (
        seen.append(len(logits)),
        ReferenceKernels().cross_entropy(logits, *rest),
    )[1]  # type: ignore[method-assign]
    fast.losses(packing.pack(examples)).sum().backward()
    assert seen == [sum(row.supervised_tokens for row in examples)]


def test_the_base_is_not_copied() -> None:
    model = tuned("llama", torch.float32)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    fast = FusedDecoder(transformers_backend.without_peft(model), ReferenceKernels())
    attention = model.get_base_model().model.layers[0].self_attn
    fused = fast.blocks[0].attention_in.weight()
    for module in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert module.base_layer.weight.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize(
    ("kind", "changes", "wish", "reason"),
    [
        ("llama", {"attention_dropout": 0.1}, {}, "the base has attention_dropout"),
        ("llama", {"hidden_act": "relu"}, {}, "the activation 'relu'"),
        ("llama", {}, {"fast": False}, "compute.path is general"),
    ],
)
def test_general_path_states_why_the_fast_path_is_not_taken(
    kind: str, changes: dict[str, Any], wish: dict[str, Any], reason: str
) -> None:
    """Attention dropout, an unknown activation, or a recipe that asks for the general path."""
    path = transformers_backend.choose_loss_backend(
        tuned(kind, torch.float32, **changes), rows(20, 9), torch.device("cpu"), LossOptions(**wish)
    )
    assert path.name == "general"
    assert reason in path.reason


def test_an_unknown_architecture_and_dropout_go_the_general_way() -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    path = transformers_backend.choose_loss_backend(
        transformers.GPTNeoXForCausalLM(config).eval(), rows(20, 9), torch.device("cpu")
    )
    assert path.name == "general" and "'gpt_neox' is not in the fast path's table" in path.reason
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).requires_grad_(False)
    dropping = adapters.inject_lora(llama, rank=4, alpha=8, dropout=0.1, targets="all-linear", seed=0).eval()
    with pytest.raises(Unsupported, match="dropout before A"):
        FusedDecoder(transformers_backend.without_peft(dropping), ReferenceKernels())


@pytest.mark.parametrize("made", kernels(), ids=lambda made: made.name)
def test_a_value_that_is_not_finite_is_not_hidden(made: ReferenceKernels) -> None:
    model, examples = tuned("llama", torch.float32), rows(20, 9)
    model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight.data[0, 0] = float("nan")
    assert not torch.isfinite(
        FusedDecoder(transformers_backend.without_peft(model), made).losses(packing.pack(examples))
    ).all()


@pytest.mark.parametrize("compiler", [None, "false"])
def test_without_a_compiler_torchs_operations_serve_and_say_so(
    compiler: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("SARTOR_KERNELS", str(tmp_path))
    monkeypatch.setattr(cpu, "_compilers", lambda: (compiler,))
    monkeypatch.setitem(sys.modules, "ziglang", None)
    cpu.load.cache_clear()
    try:
        path = fast_path(tuned("llama", torch.float32), rows(20, 9))
        assert type(path.fast.kernels) is ReferenceKernels
        assert ("no C++ compiler" if compiler is None else "false failed") in path.reason
    finally:
        cpu.load.cache_clear()


def test_compiler_of_a_package_serves_where_the_system_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`python -m ziglang c++`, here a package of that name that calls g++ and notes how it was called."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    package, calls = tmp_path / "packages" / "ziglang", tmp_path / "calls"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        f"import subprocess, sys\nopen({str(calls)!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))\n"
        "sys.exit(subprocess.run(['g++', *sys.argv[2:]]).returncode)\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("SARTOR_KERNELS", str(tmp_path))
    monkeypatch.setattr(cpu, "_compilers", lambda: ("no-such-compiler",))
    cpu.load.cache_clear()
    try:
        assert cpu.difference(cpu.load()) == ""
    finally:
        cpu.load.cache_clear()
    lines = calls.read_text().splitlines()
    assert len(lines) == 4 and all(line.startswith("c++ ") for line in lines)
    assert "-fopenmp" not in " ".join(lines[1:]).split()  # zig's has no runtime of OpenMP


def test_kernels_that_compute_something_else_are_found_out() -> None:
    made = kernels()[-1]
    assert cpu.difference(made) == ""

    class Wrong(ReferenceKernels):
        def glu_backward(self, d: Any, gate_up: Any, activation: str) -> Any:
            out, gradient = ReferenceKernels.glu_backward(self, d, gate_up, activation)
            return out, gradient * 1.01

    assert cpu.difference(Wrong()) == "glu_backward silu"


def test_rows_with_a_common_prefix_share_a_micro_batch() -> None:
    """Without prefix sharing the rows keep their order."""
    one, other = rows(30, 32, 34, head=20, seed=1), rows(30, 32, 34, head=20, seed=2)
    mixed = [row for pair in zip(one, other, strict=True) for row in pair]
    cut = packing.micro_batches(mixed, 60, share=True)
    assert sorted(len(group) for group in cut) == [3, 3]
    assert all(packing.pack(group, share=True).tokens <= 60 for group in cut)
    assert [row for group in packing.micro_batches(mixed, 60, share=False) for row in group] == mixed
