"""Fastest CUDA kernels on this machine that agree with torch's operations.

    attention                    flash-attn; else the flash kernels that torch carries; else torch's operations
    norms, activations, losses   Liger; else torch.compile of the reference functions; else torch's operations

`load` tries the implementations of a part in that order on a few small cases. One that cannot be imported, fails or
computes something else is skipped, with the reason in the kernels' name. So a missing compiler or an unsupported GPU
costs speed, never a run. An implementation that fails later, at a shape that it does not support, is replaced from
then on. Docs: decisions/005-cuda.md.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from sartor.models.kernels.reference import AttentionLayout, Geometry, ReferenceKernels, rotate
from sartor.models.packing import AttentionShape, group_segments, share_prefixes

Turn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Case = tuple[str, tuple[Any, ...]]
Draw = Callable[..., torch.Tensor]
Makers = Mapping[str, Callable[[], ReferenceKernels]]
PARTS = {
    "attention": ("attention", "attention_backward"),
    "norms": ("rms_norm", "rms_norm_backward"),
    "activations": ("glu", "glu_backward"),
    "losses": ("cross_entropy",),
}
DEVICE = torch.device("cuda")
# Largest relative deviation (norm of the difference over norm) of an implementation from fp32 arithmetic on the same
# bf16 inputs. Three roundings to bf16 (2^-9 each, relative) stay below it; a wrong mask, offset or sign does not.
TOLERANCE = 0.02


class Liger(ReferenceKernels):
    """Liger's Triton kernels (Hsu et al. 2024, arXiv:2410.10989), called without autograd. fp32, bf16, fp16."""

    def __init__(self) -> None:
        names = ("rms_norm", "swiglu", "geglu", "cross_entropy", "utils")
        self._norm, self._silu, self._gelu, self._loss, self._utils = (
            importlib.import_module(f"liger_kernel.ops.{name}") for name in names
        )
        self.name = f"Liger {importlib.metadata.version('liger-kernel')}"

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y (N, D) and 1 / rms(x) (N,), as `ReferenceKernels.rms_norm` does.

        Liger's casting mode `gemma` is ours: all arithmetic in fp32, whatever the family.
        """
        y, _, rstd, *_ = self._norm.rms_norm_forward(x.contiguous(), weight, float(eps), float(offset), "gemma", None)
        return y, rstd

    def rms_norm_backward(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        rstd: torch.Tensor,
        offset: float,
        add: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return dloss/dx (N, D), as `ReferenceKernels.rms_norm_backward` does."""
        block, warps = self._utils.calculate_settings(x.shape[1])
        mode = self._norm._str_to_casting_mode["gemma"]
        arguments = (dy.contiguous(), x.contiguous(), weight, rstd, float(offset), mode, block, warps, False, None)
        dx, _ = self._norm.rms_norm_backward(*arguments, needs_dw=False)
        return dx if add is None else dx.add_(add)

    def glu(self, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        """Return act(gate) * up, (T, I), as `ReferenceKernels.glu` does.

        Liger's GeGLU expects gate and up as separate contiguous tensors.
        """
        if activation == "silu":
            return self._silu.swiglu_fused_gate_up_forward(gate_up.contiguous())[1]
        return self._gelu.geglu_forward(*map(torch.Tensor.contiguous, gate_up.chunk(2, -1)))[2]

    def glu_backward(
        self, d: torch.Tensor, gate_up: torch.Tensor, activation: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return act(gate) * up (T, I) and dloss/dgate_up (T, 2 I). Overwrites gate_up for silu."""
        value, d = self.glu(gate_up, activation), d.contiguous()
        if activation == "silu":
            gradient = self._silu.swiglu_fused_gate_up_backward(gate_up.contiguous(), d, in_place=True)
            return value, gradient.view(gate_up.shape)
        gate, up = map(torch.Tensor.contiguous, gate_up.chunk(2, -1))
        return value, torch.cat(self._gelu.geglu_backward(gate, up, d), -1)

    def cross_entropy(
        self, logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return losses (N,) in nats and dloss/dlogits (N, V), which overwrites logits.

        This launches Liger's kernel directly. Liger's Python function computes losses in the dtype of the logits
        (three digits in bf16) and waits for the GPU to check targets.
        """
        logits, targets = logits.contiguous(), targets.contiguous()
        losses = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
        block = min(self._loss.MAX_FUSED_SIZE, 1 << (logits.shape[1] - 1).bit_length())
        self._loss.liger_cross_entropy_kernel[(len(logits),)](
            X_ptr=logits,
            X_stride=logits.stride(0),
            Y_ptr=targets,
            Y_stride=1,
            n_cols=logits.shape[1],
            loss_ptr=losses,
            loss_stride=1,
            reduction="none",
            n_non_ignore=1,
            ignore_index=-100,
            softcap=softcap,
            HAS_SOFTCAPPING=bool(softcap),
            HAS_GRADIENTS=gradient,
            weight_ptr=None,
            weight_sum=0.0,
            sum_non_ignore_weight=1,
            HAS_WEIGHT=False,
            z_loss_ptr=None,
            lse_square_scale=0.0,
            RETURN_Z_LOSS=False,
            label_smoothing=0.0,
            token_accuracy_ptr=None,
            token_accuracy_stride=0,
            RETURN_TOKEN_ACCURACY=False,
            predicted_tokens_ptr=None,
            predicted_tokens_stride=0,
            RETURN_PREDICTED_TOKENS=False,
            BLOCK_SIZE=block,
            num_warps=32,
        )
        return losses, logits if gradient else None


class Compiled(ReferenceKernels):
    """The reference functions and the rotation through torch.compile, each fused into one or two kernels."""

    name = "torch.compile"

    def __init__(self) -> None:
        for operation in (*PARTS["norms"], *PARTS["activations"], *PARTS["losses"]):
            setattr(self, operation, torch.compile(getattr(ReferenceKernels(), operation), dynamic=True))
        self.rotate: Turn = torch.compile(rotate, dynamic=True)


@dataclass(frozen=True)
class Spans:
    """Layout for flash kernels, whose causal mask is aligned to the last query and key of each span.

    sizes: (N + 1,) int32 offsets of N spans among the queries, the same among the keys, and the largest number of
    queries and of keys in a span.
    gather: positions in the pack of each span's keys, concatenated; None if the keys are the queries' own tokens.
    """

    sizes: tuple[torch.Tensor, torch.Tensor, int, int]
    gather: torch.Tensor | None


def spans_of(layout: AttentionLayout, device: torch.device) -> Spans:
    """Return the spans of a layout, computed once per layout.

    A segment with ancestors attends to copies of its ancestors' keys and its own.
    """
    if "flash" not in layout.kernel_cache:
        order = sorted(layout.segments, key=lambda segment: segment.start)
        lengths = [segment.length for segment in order]
        reaches = [segment.first + segment.length for segment in order]
        gather = None
        if any(segment.ancestors for segment in order):
            spans = []
            for segment in order:
                spans += [layout.segments[index] for index in segment.ancestors]
                spans.append(segment)
            gather = torch.cat([torch.arange(span.start, span.start + span.length) for span in spans]).to(device)
        queries, keys = (
            torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device) for counts in (lengths, reaches)
        )
        layout.kernel_cache["flash"] = Spans((queries, keys, max(lengths), max(reaches)), gather)
    return layout.kernel_cache["flash"]


class Flash(ReferenceKernels):
    """Attention by flash-attn's kernels (Dao 2023, arXiv:2307.08691), from version 2.7.1 on.

    Forests of segments are supported. dtype bf16 or fp16, head width a multiple of 8 up to 256; other inputs go to
    `ReferenceKernels`. The log-sum-exp of the scores is kept for the backward.
    """

    soft_caps = True

    def __init__(self, turn: Turn = rotate) -> None:
        self._turn = turn
        self._package = importlib.import_module("flash_attn.flash_attn_interface")
        self.name = f"flash-attn {importlib.import_module('flash_attn').__version__}"

    def _forward(self, heads: Heads, spans: Spans, shape: AttentionShape) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the attention output (T, H, K) and the kernel's own log-sum-exp.

        heads: queries (T, H, K), keys and values (T', G, K), where T' counts gathered keys.
        """
        out, lse, *_ = self._package._flash_attn_varlen_forward(*heads, *spans.sizes, 0.0, shape.scale, **_mask(shape))
        return out, lse

    def _backward(
        self,
        d: torch.Tensor,
        heads: Heads,
        mixed: torch.Tensor,
        lse: torch.Tensor,
        spans: Spans,
        shape: AttentionShape,
    ) -> Heads:
        """Return the gradients of `heads`, in their shapes. d, mixed: (T, H, K)."""
        dq, dk, dv = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in heads)
        options = {**_mask(shape), "alibi_slopes": None, "deterministic": True}
        arguments = (d, *heads, mixed, lse, dq, dk, dv, *spans.sizes, 0.0, shape.scale)
        self._package._flash_attn_varlen_backward(*arguments, **options)
        return dq, dk, dv

    def attention(self, qkv: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attention output (T, H K) and the kernel's log-sum-exp."""
        if not self._takes(qkv, geometry):
            return super().attention(qkv, geometry)
        spans = spans_of(geometry.layout, qkv.device)
        mixed, lse = self._forward(self._heads(qkv, geometry, spans), spans, geometry.shape)
        return mixed.reshape(len(qkv), -1), lse

    def attention_backward(
        self, d: torch.Tensor, qkv: torch.Tensor, mixed: torch.Tensor, lse: torch.Tensor | None, geometry: Geometry
    ) -> torch.Tensor:
        """Return dloss/dqkv, (T, (H + 2 G) K), as `ReferenceKernels.attention_backward` does."""
        if lse is None or not self._takes(qkv, geometry):
            return super().attention_backward(d, qkv, mixed, lse=lse, geometry=geometry)
        # The forward's inputs again: rotated q (T, H, K), and k, v (T', G, K) gathered per span. Then dq, dk, dv in
        # their shapes by the flash kernel (Dao 2023, algorithm 2): with P = exp(scale q k^T - lse), dv = P^T do,
        # ds = P (do v^T - rowsum(do o)), dq = scale ds k, dk = scale ds^T q.
        spans, width = spans_of(geometry.layout, qkv.device), geometry.width
        d, mixed = (part.reshape(len(qkv), -1, width) for part in (d, mixed))
        heads = self._heads(qkv, geometry, spans)
        with _deterministic():
            dq, dk, dv = self._backward(d.contiguous(), heads, mixed.contiguous(), lse, spans, geometry.shape)
            # A shared prefix sums the gradients of all its copies, in fp32: dk[t] = sum_{j: gather_j = t} dk'_j, and
            # dv alike, (T', G, K) -> (T, G, K)
            if spans.gather is not None:
                dk, dv = (
                    part.new_zeros(len(qkv), *part.shape[1:], dtype=torch.float32).index_add_(
                        0, spans.gather, part.float()
                    )
                    for part in (dk, dv)
                )
        # The rotation R(cos, sin) has equal halves of cos and sin and is orthogonal up to their common scale, so its
        # transpose is the rotation by the negative angle: dq = R(cos, -sin) dq', dk = R(cos, -sin) dk'
        dq, dk = (self._turned(part.to(qkv.dtype), geometry.cos, -geometry.sin) for part in (dq, dk))
        return torch.cat([part.reshape(len(qkv), -1).to(qkv.dtype) for part in (dq, dk, dv)], 1)

    def _takes(self, qkv: torch.Tensor, geometry: Geometry) -> bool:
        """Return whether the flash kernels support these inputs."""
        fits = geometry.width % 8 == 0 and geometry.width <= 256 and len(qkv) > 0
        return fits and qkv.dtype in (torch.bfloat16, torch.float16) and (self.soft_caps or not geometry.shape.softcap)

    def _heads(self, qkv: torch.Tensor, geometry: Geometry, spans: Spans) -> Heads:
        """Return rotated queries (T, H, K), and keys and values (T', G, K), gathered for the spans."""
        shape, width = geometry.shape, geometry.width
        sizes = [shape.heads * width, shape.groups * width, shape.groups * width]
        query, key, value = (part.unflatten(1, (-1, width)) for part in qkv.split(sizes, 1))
        query, key = (self._turned(part, geometry.cos, geometry.sin) for part in (query, key))
        if spans.gather is not None:
            key, value = key.index_select(0, spans.gather), value.index_select(0, spans.gather)
        return query, key, value

    def _turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return `rotate` of x (T, heads, K), in that layout."""
        return self._turn(x.transpose(0, 1), cos, sin).transpose(0, 1)


def _mask(shape: AttentionShape) -> dict[str, Any]:
    """Return flash-attn's mask options. A left window of -1 sees all keys before the query."""
    window_left = shape.window - 1 if shape.window else -1
    return {
        "causal": True,
        "window_size_left": window_left,
        "window_size_right": 0,
        "softcap": float(shape.softcap or 0),
    }


class TorchFlash(Flash):
    """The flash kernels in every CUDA build of torch, also used by `torch.nn.attention.varlen`."""

    name = "torch's flash attention"
    soft_caps = False

    def __init__(self, turn: Turn = rotate) -> None:
        self._turn = turn

    def _forward(self, heads: Heads, spans: Spans, shape: AttentionShape) -> tuple[torch.Tensor, torch.Tensor]:
        options = {"scale": shape.scale, "window_size_left": _mask(shape)["window_size_left"], "window_size_right": 0}
        out, lse, *_ = torch.ops.aten._flash_attention_forward(*heads, *spans.sizes, 0.0, True, False, **options)
        return out, lse

    def _backward(
        self,
        d: torch.Tensor,
        heads: Heads,
        mixed: torch.Tensor,
        lse: torch.Tensor,
        spans: Spans,
        shape: AttentionShape,
    ) -> Heads:
        # the random state of dropout, which is not read without dropout
        state = (torch.zeros(2, dtype=torch.uint64, device=d.device), torch.empty(0, device=d.device))
        options = {"scale": shape.scale, "window_size_left": _mask(shape)["window_size_left"], "window_size_right": 0}
        return torch.ops.aten._flash_attention_backward(
            d, *heads, mixed, lse, *spans.sizes, 0.0, True, *state, **options
        )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Make torch use deterministic algorithms, for flash's dq and `index_add_`.

    Sums in a fixed order make a resumed run end as an uninterrupted one.
    """
    was_enabled, was_warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=was_warn_only)


class Cuda(ReferenceKernels):
    """CUDA kernels with one implementation for each of PARTS; fp64 and empty tensors go to `ReferenceKernels`.

    refused: reason why an earlier implementation was not taken, by name.
    """

    def __init__(self, makers: Mapping[str, ReferenceKernels], refused: Mapping[str, str]) -> None:
        self.makers, self.refused = dict(makers), dict(refused)
        for part, operations in PARTS.items():
            for operation in operations:
                setattr(self, operation, functools.partial(self._call, part, operation))

    @property
    def name(self) -> str:  # type: ignore[override]
        """The implementation of each part, and the reasons against the others."""
        makers: dict[str, list[str]] = {}
        for part, maker in self.makers.items():
            makers.setdefault(maker.name, []).append(part)
        summary = ", ".join(f"{name} ({', '.join(parts)})" for name, parts in makers.items())
        return "; ".join([summary, *(f"not {label}: {reason}" for label, reason in self.refused.items())])

    def _call(self, part: str, operation: str, *arguments: Any) -> Any:
        """Call an operation of a part; replace the part by `ReferenceKernels` if it raises, except when memory runs
        out.
        """
        is_plain = arguments[0].dtype == torch.float64 or not arguments[0].numel()
        maker = ReferenceKernels() if is_plain else self.makers[part]
        try:
            return getattr(maker, operation)(*arguments)
        except torch.OutOfMemoryError:
            raise  # the implementation is not at fault
        except Exception as error:  # Triton, flash-attn and torch.compile each raise their own exceptions
            if type(maker) is ReferenceKernels:
                raise
            self.makers[part] = ReferenceKernels()
            self.refused[f"{maker.name} for {part}"] = _reason(error)
            return getattr(self.makers[part], operation)(*arguments)


@functools.cache
def load(device: torch.device = DEVICE) -> tuple[Cuda, str]:
    """Return the kernels, each checked against `ReferenceKernels` on `device`, and their name."""
    refused: dict[str, str] = {}
    compilers: Makers = {Compiled.name: functools.cache(Compiled)}
    turner = _first(compilers, "rotation", device, refused)
    turn = turner.rotate if isinstance(turner, Compiled) else rotate
    elementwise: Makers = {"Liger": Liger, **compilers}
    makers: dict[str, Makers] = dict.fromkeys(PARTS, elementwise)
    makers["attention"] = {"flash-attn": lambda: Flash(turn), TorchFlash.name: lambda: TorchFlash(turn)}
    kernels = Cuda({part: _first(makers[part], part, device, refused) for part in PARTS}, refused)
    return kernels, kernels.name


def _first(makers: Makers, part: str, device: torch.device, refused: dict[str, str]) -> ReferenceKernels:
    """Return the first implementation of a part that loads and agrees with `ReferenceKernels`; else the latter."""
    for name, make in makers.items():
        try:
            maker = make()
        except Exception as error:  # not installed, or broken: the same for every part
            refused[name] = _reason(error)
            continue
        try:
            problem = difference(maker, part, device)
        except Exception as error:  # see Cuda._call
            problem = _reason(error)
        if not problem:
            return maker
        refused[f"{name} for {part}"] = problem
    return ReferenceKernels()


def difference(maker: ReferenceKernels, part: str, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """Return a description of the first operation of `maker` that is off on small cases; empty for none.

    The reference is fp32 arithmetic by torch's operations. dtype: of the cases; None for bf16, or fp16 on a GPU
    without it.
    """
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype, generator = dtype or (torch.bfloat16 if has_bf16 else torch.float16), torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        """Return a random tensor of shape `size`; the sequence of draws is the same in every run."""
        return torch.randn(size, generator=generator).to(device, dtype)

    with torch.no_grad():
        for operation, arguments in _cases(part, draw):
            actual = _call_and_flatten(maker, operation, [_copy(argument) for argument in arguments])
            expected = _call_and_flatten(
                ReferenceKernels(), operation, [_copy(argument, torch.float32) for argument in arguments]
            )
            deviation = float((actual - expected).norm() / expected.norm())
            if not deviation <= TOLERANCE:
                return f"{operation} is off by {deviation:.2g}"
    return ""


def _call_and_flatten(maker: ReferenceKernels, operation: str, arguments: Sequence[Any]) -> torch.Tensor:
    """Return all results of an operation as one fp32 vector.

    For `attention` they include those of its backward, run after its own forward. `ReferenceKernels` has no `rotate`,
    so the function of that name is taken.
    """
    if operation == "attention":
        d, qkv, geometry = arguments
        mixed, lse = maker.attention(qkv, geometry)
        results: Any = (mixed, maker.attention_backward(d, qkv, mixed, lse=lse, geometry=geometry))
    else:
        results = getattr(maker, operation, rotate)(*arguments)
    parts = results if isinstance(results, tuple) else (results,)
    return torch.cat([part.float().flatten() for part in parts])


def _copy(argument: Any, dtype: torch.dtype | None = None) -> Any:
    """Return a copy of a float tensor, in `dtype` if given; other values unchanged."""
    is_float = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.to(dtype or argument.dtype, copy=True) if is_float else argument


def _cases(part: str, draw: Draw) -> Iterator[Case]:
    """Yield (operation, arguments) of the test cases of a part.

    Attention is tested on whole rows and on a forest, without and with a window and a soft-cap.
    """
    if part == "norms":
        x, weight = draw(6, 48), draw(48)
        yield "rms_norm", (x, weight, 1e-6, 1.0)
        yield (
            "rms_norm_backward",
            (draw(6, 48), x, weight, ReferenceKernels().rms_norm(x, weight, 1e-6, 0.0)[1], 1.0, draw(6, 48)),
        )
    elif part == "activations":
        for activation in ("silu", "gelu_tanh"):
            yield "glu", (2 * draw(5, 64), activation)
            yield "glu_backward", (draw(5, 32), 2 * draw(5, 64), activation)
    elif part == "losses":
        for softcap in (None, 3.0):
            yield "cross_entropy", (3 * draw(4, 50), torch.tensor([0, 7, 49, 3], device=draw(1).device), softcap, True)
    elif part == "rotation":
        angles = draw(9, 4).repeat(1, 2)
        yield "rotate", (draw(3, 9, 16), angles.cos(), angles.sin())
    elif part == "attention":
        for rows in ([[1] * 33, [2] * 7, [3]], [[*range(40), 1, 2, 3], [*range(40), 9], [*range(20), 5], [7] * 3]):
            segments, _ = share_prefixes(rows)
            angles = draw(sum(segment.length for segment in segments), 4).repeat(1, 2)
            layout = AttentionLayout(segments, tuple(group_segments(segments, angles.device)), len(angles))
            for softcap, window in ((None, None), (None, 6), (2.0, 6)):
                shape = AttentionShape(heads=4, groups=2, scale=0.3, softcap=softcap, window=window)
                geometry = Geometry(shape, width=16, cos=angles.cos(), sin=angles.sin(), layout=layout)
                yield "attention", (draw(len(angles), 4 * 16), draw(len(angles), 8 * 16), geometry)


def _reason(error: Exception) -> str:
    """Return the first line of an exception's message, at most 160 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
