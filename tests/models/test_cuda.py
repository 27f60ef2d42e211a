"""Every maker of CUDA kernels gives `Eager`'s results. Here on the CPU: flash kernels by stand-ins that check what they are
called with, Liger through Triton's interpreter, torch.compile through g++."""

from __future__ import annotations

import importlib.metadata
import math
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tiny
from sartor.models import adapters, packing
from sartor.models.kernels import cuda
from sartor.models.kernels.reference import AttentionLayout, Geometry, ReferenceKernels
from sartor.models.losses import transformers_backend
from sartor.models.losses.fused_decoder import FusedDecoder
from sartor.models.packing import AttentionShape, TokenizedExample

CPU = torch.device("cpu")
INT = torch.int32


def spans(sizes: Any) -> list[tuple[int, ...]]:
    queries, keys = (x.tolist() for x in sizes[:2])
    return list(zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True))


def heads(q: Any, k: Any, v: Any, span: tuple[int, ...]) -> list[torch.Tensor]:
    """Queries, keys and values of a span, (H, tokens, K) fp32, a key head repeated for its query heads."""
    a, b, c, e = span
    parts = [x.float().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (q[a:b], k[c:e], v[c:e])]
    return [part.transpose(0, 1) for part in parts]


def scored(
    q: torch.Tensor, k: torch.Tensor, scale: float, left: int, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores, and which of them a query must not see: causal and windowed as from the span's last query and last key."""
    scores = q @ k.transpose(1, 2) * scale
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    hidden = (distance < 0) | (distance > left) if left >= 0 else distance < 0
    return softcap * torch.tanh(scores / softcap) if softcap else scores, hidden


def varlen(
    q: Any, k: Any, v: Any, sizes: Any, scale: float, left: int, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a flash kernel computes."""
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[1], len(q))
    for a, b, c, e in spans(sizes):
        own, keys, values = heads(q, k, v, (a, b, c, e))
        scores, hidden = scored(own, keys, scale, left, softcap)
        scores = scores.masked_fill(hidden, -math.inf)
        lse[:, a:b] = scores.logsumexp(-1)
        out[a:b] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out, lse


def varlen_backward(d: Any, q: Any, k: Any, v: Any, sizes: Any, scale: float, left: int, softcap: float) -> Any:
    """The gradients of q, k and v, written out: an operator's implementation runs below autograd."""
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    for a, b, c, e in spans(sizes):
        own, keys, values = heads(q, k, v, (a, b, c, e))
        scores, hidden = scored(own, keys, scale, left, softcap)
        weights, dy = scores.masked_fill(hidden, -math.inf).softmax(-1), d[a:b].float().transpose(0, 1)
        slope = dy @ values.transpose(1, 2)
        slope = weights * (slope - (slope * weights).sum(-1, keepdim=True))
        slope = slope * (1 - (scores / softcap) ** 2) if softcap else slope
        dq[a:b] = (slope @ keys * scale).transpose(0, 1)
        for room, part in ((dk, slope.transpose(1, 2) @ own * scale), (dv, weights.transpose(1, 2) @ dy)):
            room[c:e] = part.unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def checked(q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int) -> None:
    """What flash kernels themselves refuse, and silently misread."""
    assert {q.dtype, k.dtype, v.dtype} in ({torch.bfloat16}, {torch.float16})
    assert (q.stride(-1), k.stride(-1), v.stride(-1)) == (1, 1, 1)
    assert q.dim() == k.dim() == v.dim() == 3
    assert k.shape == v.shape
    assert q.shape[2] == k.shape[2]
    assert q.shape[2] % 8 == 0
    assert cu_q.dtype == cu_k.dtype == INT
    assert (int(cu_q[-1]), int(cu_k[-1])) == (len(q), len(k))
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))


class Interface(types.ModuleType):
    """`flash_attn.flash_attn_interface` as of 2.7.1 to 2.8.3: names and order of arguments are those of its source."""

    calls = 0

    def _flash_attn_varlen_forward(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
        leftpad_k=None,
        seqused_k=None,
        zero_tensors=False,
    ):
        Interface.calls += 1
        sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        checked(q, k, v, *sizes)
        assert (dropout_p, causal, window_size_right) == (0.0, True, 0)
        out, lse = varlen(q, k, v, sizes, softmax_scale, window_size_left, softcap)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        self,
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
        zero_tensors=False,
    ):
        sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        checked(q, k, v, *sizes)
        assert (dropout_p, causal, window_size_right, alibi_slopes, deterministic) == (0.0, True, 0, None, True)
        assert dout.shape == out.shape == q.shape == dq.shape
        assert (dk.shape, dv.shape) == (k.shape, v.shape)
        assert softmax_lse.shape == (q.shape[1], len(q))
        assert {x.is_contiguous() for x in (dq, dk, dv)} == {True}
        gradients = varlen_backward(dout, q, k, v, sizes, softmax_scale, window_size_left, softcap)
        for room, gradient in zip((dq, dk, dv), gradients, strict=True):
            room.copy_(gradient)
        return torch.empty(0)


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> Interface:
    package = types.ModuleType("flash_attn")
    package.__version__ = "2.8.3"
    interface = Interface("flash_attn.flash_attn_interface")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    return interface


@pytest.fixture
def torch_flash() -> Iterator[None]:
    """CPU implementations for torch's own operators: the call goes through torch's schema."""
    library = torch.library.Library("aten", "IMPL", "CPU")

    def forward(
        q,
        k,
        v,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout,
        causal,
        debug,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
        **more,
    ):
        checked(q, k, v, cu_q, cu_k, max_q, max_k)
        assert (dropout, causal, debug, window_size_right) == (0.0, True, False, 0)
        out, lse = varlen(q, k, v, (cu_q, cu_k, max_q, max_k), scale, window_size_left, 0.0)
        return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(
        d,
        q,
        k,
        v,
        out,
        lse,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout,
        causal,
        state,
        unused,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
    ):
        assert torch.are_deterministic_algorithms_enabled()
        checked(q, k, v, cu_q, cu_k, max_q, max_k)
        assert d.is_contiguous()
        return varlen_backward(d, q, k, v, (cu_q, cu_k, max_q, max_k), scale, window_size_left, 0.0)

    library.impl("_flash_attention_forward", forward)
    library.impl("_flash_attention_backward", backward)
    yield
    library._destroy()


def maker(name: str, request: pytest.FixtureRequest) -> ReferenceKernels:
    if name == "torch.compile":
        return cuda.Compiled()
    request.getfixturevalue({"flash-attn": "flash_attn", "torch": "torch_flash"}[name])
    return cuda.Flash() if name == "flash-attn" else cuda.TorchFlash()


@pytest.mark.parametrize("name", ["flash-attn", "torch"])
def test_a_flash_kernel_attends_as_torchs_operations_do(name: str, request: pytest.FixtureRequest) -> None:
    assert cuda.difference(maker(name, request), "attention", CPU) == ""


@pytest.mark.parametrize("part", ["norms", "activations", "losses", "rotation"])
@pytest.mark.services
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # inductor's own imports
def test_compiled_functions_compute_as_torchs_operations_do(part: str, request: pytest.FixtureRequest) -> None:
    assert cuda.difference(maker("torch.compile", request), part, CPU) == ""


def geometry_of(rows: list[list[int]], shape: AttentionShape, width: int, *, share: bool) -> Geometry:
    pack = packing.pack([TokenizedExample(row, [True] * len(row)) for row in rows], share=share)
    angles = torch.rand(pack.tokens, 4).repeat(1, 2)
    return Geometry(shape, width, angles.cos(), angles.sin(), AttentionLayout(pack.segments, pack.rows, pack.tokens))


def test_pack_without_shared_prefixes_copies_no_keys(flash_attn: Interface) -> None:
    """Its spans are computed once and then reused."""
    geometry = geometry_of([[1] * 5, [2] * 3, [3] * 9], AttentionShape(4, 2, 0.3), 16, share=False)
    made = cuda.spans_of(geometry.layout, CPU)
    assert made.sizes[0].tolist() == made.sizes[1].tolist() == [0, 5, 8, 17]
    assert (made.sizes[2:], made.gather) == ((9, 9), None)
    assert cuda.spans_of(geometry.layout, CPU) is made


def test_a_forests_segments_gather_the_keys_that_they_continue(flash_attn: Interface) -> None:
    geometry = geometry_of([[*range(9), 1], [*range(9), 2, 3]], AttentionShape(4, 2, 0.3), 16, share=True)
    made = cuda.spans_of(geometry.layout, CPU)
    assert made.sizes[0].tolist() == [0, 9, 10, 12]
    assert made.sizes[1].tolist() == [0, 9, 19, 30]
    assert made.gather is not None
    assert made.gather.tolist() == [*range(9), *range(10), *range(9), 10, 11]


@pytest.mark.parametrize(
    ("dtype", "width", "softcap"), [(torch.float32, 16, None), (torch.bfloat16, 12, None), (torch.bfloat16, 16, 2.0)]
)
def test_flash_kernel_falls_back_to_torch_bit_for_bit(
    dtype: torch.dtype, width: int, softcap: float | None, torch_flash: None
) -> None:
    """Forward and backward in fp32, with a head width of 12, or with a softcap."""
    geometry = geometry_of([[1] * 9, [2] * 4], AttentionShape(4, 2, 0.3, softcap), width, share=False)
    qkv, d = torch.randn(13, 8 * width, dtype=dtype), torch.randn(13, 4 * width, dtype=dtype)
    made = []
    for kernels in (cuda.TorchFlash(), ReferenceKernels()):
        mixed, kept = kernels.attention(qkv, geometry)
        assert kept is None
        made.append((mixed, kernels.attention_backward(d, qkv, mixed, kept, geometry)))
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


@pytest.mark.parametrize("window", [None, 4])
def test_torchs_own_shape_function_takes_the_calls(window: int | None) -> None:
    """On the `meta` device torch runs its registered shape functions: names, order and shapes are the real operators'."""
    shape = AttentionShape(4, 4, 0.3, None, window)
    parts = tuple(torch.empty(12, 4, 16, dtype=torch.bfloat16, device="meta") for _ in range(3))
    ends = torch.empty(3, dtype=INT, device="meta")
    made = cuda.Spans((ends, ends, 7, 7), None)
    kernels = cuda.TorchFlash()
    mixed, lse = kernels._forward(parts, made, shape)  # type: ignore[arg-type]
    assert (mixed.shape, lse.shape) == ((12, 4, 16), (4, 12))
    gradients = kernels._backward(mixed, parts, mixed, lse, made, shape)  # type: ignore[arg-type]
    assert [x.shape for x in gradients] == [(12, 4, 16)] * 3


class Broken(ReferenceKernels):
    """Fails, or computes something else."""

    name = "broken"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def rms_norm(self, x: torch.Tensor, *rest: Any) -> Any:
        if self.error:
            raise self.error
        y, rstd = super().rms_norm(x, *rest)
        return y * 1.05, rstd


@pytest.mark.parametrize("error", [None, RuntimeError("no kernel image is available for this device\nmore")])
def test_failing_or_wrong_kernels_are_left_out_with_a_reason(error: Exception | None) -> None:
    """The reason is a single line."""
    refused: dict[str, str] = {}
    assert type(cuda._first({"broken": lambda: Broken(error)}, "norms", CPU, refused)) is ReferenceKernels
    (why,) = refused.values()
    assert why.startswith("no kernel image is available for this device" if error else "rms_norm is off by 0.0")
    assert "\n" not in why


def test_a_maker_that_fails_later_is_left_and_the_name_says_so() -> None:
    kernels = cuda.Cuda({part: Broken(RuntimeError("out of shared memory")) for part in cuda.PARTS}, {})
    x, weight = torch.randn(3, 8), torch.randn(8)
    y, _ = kernels.rms_norm(x, weight, 1e-6, 0.0)
    assert torch.equal(y, ReferenceKernels().rms_norm(x, weight, 1e-6, 0.0)[0])
    assert "not broken for norms: out of shared memory" in kernels.name
    assert "broken (attention, activations, losses)" in kernels.name
    full = cuda.Cuda({part: Broken(torch.OutOfMemoryError("full")) for part in cuda.PARTS}, {})
    with pytest.raises(torch.OutOfMemoryError):
        full.rms_norm(x, weight, 1e-6, 0.0)


def test_fp64_and_empty_tensors_are_torchs_operations() -> None:
    kernels = cuda.Cuda({part: Broken(RuntimeError("never called")) for part in cuda.PARTS}, {})
    for x in (torch.randn(3, 8, dtype=torch.float64), torch.randn(0, 8)):
        kernels.rms_norm(x, torch.ones(8, dtype=x.dtype), 1e-6, 0.0)
    assert kernels.refused == {}


@pytest.mark.parametrize("at_once", [True, False])
def test_load_names_what_makes_each_part_and_why_not_another(
    at_once: bool, flash_attn: Interface, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail if at_once else lambda function, **options: fail)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    cuda.load.cache_clear()
    try:
        kernels, name = cuda.load(CPU)
    finally:
        cuda.load.cache_clear()
    assert name == kernels.name
    assert name.startswith("flash-attn 2.8.3 (attention), torch's own operations (norms, activations, losses); not ")
    assert ("not torch.compile: no compiler" if at_once else "not torch.compile for losses: no compiler") in name
    assert "not Liger: " in name


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", ["flash-attn", "torch"])
def test_a_models_losses_and_gradients_through_flash_attention(
    name: str, share: bool, request: pytest.FixtureRequest
) -> None:
    kernels = cuda.Cuda(dict.fromkeys(cuda.PARTS, ReferenceKernels()) | {"attention": maker(name, request)}, {})
    rows = [[*range(10, 30), *tail] for tail in ([40, 41], [42], [43, 44, 45])]
    pack = packing.pack([TokenizedExample(row, [True] * len(row)) for row in rows], share=share)
    made = []
    for one in (kernels, ReferenceKernels()):
        model = adapters.inject_lora(
            tiny.model().bfloat16(), rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=0
        )
        losses = FusedDecoder(transformers_backend.without_peft(model), one).losses(pack)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(losses.mean(), trained)
        made.append((losses, torch.cat([gradient.flatten() for gradient in gradients])))
    (losses, gradients), (wanted, wanted_gradients) = made
    assert kernels.refused == {}
    assert (losses - wanted).norm() / wanted.norm() < 0.01
    assert (gradients - wanted_gradients).norm() / wanted_gradients.norm() < 0.03


LIGER = """
import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter
from sartor.models.kernels import cuda
from sartor.models.kernels.reference import ReferenceKernels

plain = interpreter._implicit_cvt
def with_floats(x):
    # a compiled kernel gets a float as an fp32 scalar; the interpreter leaves it Python's, which has no `.to`
    if type(x) is not float:
        return plain(x)
    return tl.tensor(interpreter.TensorHandle(numpy.array([x], numpy.float32), tl.float32), tl.float32)
interpreter._implicit_cvt = with_floats

kernels, cpu = cuda.Liger(), torch.device("cpu")
# NVIDIA's library of device functions exists on NVIDIA GPUs alone
kernels._norm.rsqrt = lambda x: tl.rsqrt(x)  # looked up when called: the interpreter puts its own there meanwhile
kernels._gelu.tanh = kernels._loss.tanh = lambda x: 1 - 2 / (tl.exp(2 * x) + 1)
# the interpreter keeps bf16 as uint16 and multiplies that, and Liger's activations do multiply two bf16 numbers
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    parts = ("norms", "losses") if dtype == torch.bfloat16 else ("norms", "losses", "activations")
    print([part for part in parts if not cuda.difference(kernels, part, cpu, dtype)])
x = torch.randn(5, 24) * 3
for softcap in (None, 2.0):
    for gradient in (False, True):
        got, wanted = (one.cross_entropy(x.clone(), torch.tensor([0, 5, 23, 1, 2]), softcap, gradient) for one in (kernels, ReferenceKernels()))
        assert torch.allclose(got[0], wanted[0], atol=1e-5), (got, wanted)
        assert (got[1] is None) == (wanted[1] is None) and (got[1] is None or torch.allclose(got[1], wanted[1], atol=1e-6))
assert kernels.cross_entropy(x.bfloat16(), torch.zeros(5, dtype=torch.long), None, True)[0].dtype == torch.float32
"""


def test_ligers_kernels_compute_as_torchs_operations_do() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    for package in ("triton", "liger-kernel"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"no {package} here: pip install triton liger-kernel")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LIGER], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    three, two = "['norms', 'losses', 'activations']", "['norms', 'losses']"
    assert done.stdout.splitlines() == [three, three, two]
