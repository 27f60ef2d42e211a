"""Frozen linear layers fused into one product with LoRA.

    y = x W^T + bias + scale (x A^T) B^T

Forward and backward are written out (Hu et al. 2021, arXiv:2106.09685), so that nothing is kept but x A^T and nothing
computed that the factors' gradients do not need. W is one tensor for all modules, made when it is first wanted; the
modules' own weights become views of it, so the base is in memory once and transformers' module computes with the same
numbers.

In 16 bits the order of the two products matters. x W^T rounded to bf16 stands on a grid of 2^-8 of its size; a
low-rank term below half a step of that grid, added afterwards, is rounded away, and with it what the adapter has
learnt. So the low-rank product is made first and the frozen one is accumulated onto it: a matrix product adds to its
output in fp32 and rounds the sum once. The same holds for dx = dy W + (scale dy B) A. The residual stream is added
last: on its coarser grid the low-rank term alone would be lost. In fp32 the order is as it always was, so that
checkpoints go on bit-equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sartor.models import hardware
from sartor.models.quantization import dense_weight, is_quantised

Gradients = list[torch.Tensor]


@dataclass(frozen=True)
class LoraFactors:
    """LoRA on rows [low, high) of the fused output: a (R, D), b (high - low, R), fp32 masters."""

    low: int
    high: int
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float


class MappedLinear(torch.nn.Linear):
    """A frozen linear module whose weight is a view of a mapped file, in the dtype that it has there.

    It is widened for each product and let go: what a device then holds of the base is the kernel's page cache, which
    it may take back at any time.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    def widen(self, out: torch.Tensor, low: int = 0) -> torch.Tensor:
        """Rows of the weight from `low` on, as many as `out` (rows, D) has, written into it in its dtype."""
        return out.copy_(self.weight.detach()[low : low + len(out)])


class TransposedLinear(torch.nn.Linear):
    """A frozen linear module whose weight is stored as (in, out), as transformers' Conv1D of GPT-2 has it."""

    def __init__(self, conv: Any) -> None:
        torch.nn.Module.__init__(self)
        self._conv = (conv,)  # not a module of this one
        self.in_features, self.out_features = conv.weight.shape

    @property
    def weight(self) -> torch.Tensor:
        """(out, in), a view."""
        return self._conv[0].weight.T

    @property
    def bias(self) -> torch.Tensor | None:
        """(out,)."""
        bias: torch.Tensor | None = self._conv[0].bias
        return bias


class LoraLinear(torch.nn.Module):
    """A frozen linear module and LoRA factors on it, where there is no peft (a device): a (R, D), b (outs, R),
    fp32.
    """

    def __init__(self, base: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.base_layer, self.scale = base, scale
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)


class Unsupported(Exception):
    """Why the fast path cannot take a module."""


class Projection:
    """Modules q, k, v (say) as one. Outputs stand side by side: (N, sum of outs)."""

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype, *, dropout: bool = False) -> None:
        """dropout: whether the caller applies the modules' dropout before A; else a module that has one is refused."""
        self.dtype = dtype
        self.factors: list[LoraFactors] = []
        frozen, low = [], 0
        for module in modules:
            layer = getattr(module, "base_layer", module)
            base = TransposedLinear(layer) if type(layer).__name__ == "Conv1D" else layer
            if not isinstance(base, torch.nn.Linear):  # bitsandbytes' layers are
                raise Unsupported(f"a {type(base).__name__} where a linear module is expected")
            high = low + base.out_features
            if layer is not module:
                self.factors.extend(_factors(module, low, high, dropout))
            frozen.append(base)
            low = high
        self.modules = frozen
        biases = [base.bias for base in frozen if base.bias is not None]
        if len(biases) not in (0, len(frozen)):
            raise Unsupported("some of the fused modules have a bias and others none")
        self.bias = torch.cat([bias.detach().to(dtype) for bias in biases]) if biases else None
        # W is held in fewer bits, and made dense for each product
        self.is_narrow = any(_is_narrow(base) for base in frozen)
        self._fused: torch.Tensor | None = None
        unexpected_dtypes = [
            base.weight.dtype for base in frozen if not _is_narrow(base) and base.weight.dtype != self.dtype
        ]
        if unexpected_dtypes:
            raise Unsupported(f"weights in {unexpected_dtypes[0]} where the base computes in {self.dtype}")

    def _fuse(self) -> torch.Tensor:
        originals = [base.weight.detach() for base in self.modules]
        fused, low = torch.cat(originals), 0
        for base in self.modules:
            # a second projection over the same module must find the same storage, not make another
            base.weight.data = fused[low : low + base.out_features]
            low += base.out_features
        if fused.device.type == "cpu":
            hardware.drop_mapped_pages(originals)
        return fused

    def release(self) -> None:
        """Let W go, here and in the modules: its holder has another copy, and nothing else will compute with it."""
        self._fused = None
        for base in self.modules:
            base.weight.data = base.weight.data.new_empty(0)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The factors in order: a, b of the first, a, b of the second, ... Also those that do not learn."""
        return [part for factors in self.factors for part in (factors.a, factors.b)]

    def weight(self) -> torch.Tensor:
        """The frozen W, (outs, D). A quantised or mapped one is made dense for this one product and not kept."""
        if not self.is_narrow and len(self.modules) == 1:
            return self.modules[0].weight.detach()  # not kept: another projection may have moved it into its own W
        if not self.is_narrow:
            self._fused = self._fuse() if self._fused is None else self._fused
            return self._fused
        if all(isinstance(base, MappedLinear) for base in self.modules):
            return self._widened()
        parts = [_dense(base, self.dtype) for base in self.modules]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _widened(self) -> torch.Tensor:
        """All weights, each written straight to its place: never one of them twice in memory."""
        out = torch.empty(
            sum(base.out_features for base in self.modules), self.modules[0].in_features, dtype=self.dtype
        )
        low = 0
        for base in self.modules:
            base.widen(out[low : low + base.out_features])
            low += base.out_features
        return out

    def forward(
        self, x: torch.Tensor, onto: torch.Tensor | None = None, dropout_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return y (N, outs), added to `onto` (N, outs) if given, and x A^T (N, sum of R) for the backward.

        x: (N, D). dropout_mask: (N, D) factors of a dropout before A, 0 or 1 / (1 - p).
        """
        if not self.factors:
            return self._frozen(x, onto), None
        low_rank = (x if dropout_mask is None else x * dropout_mask) @ self._stacked().T
        if rounds(self.dtype):
            return self._rounded_once(x, low_rank, onto), low_rank
        y, rank = self._frozen(x, onto), 0
        for factors in self.factors:
            part = low_rank[:, rank : rank + len(factors.a)]
            y[:, factors.low : factors.high].addmm_(part, factors.b.detach().to(self.dtype).T, alpha=factors.scale)
            rank += len(factors.a)
        return y, low_rank

    def _rounded_once(self, x: torch.Tensor, low_rank: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        """Return x W^T + bias + scale low_rank B^T + onto, (N, outs), both products in one fp32 accumulator."""
        weight = self.weight()
        if self.bias is None:
            y = low_rank_product(low_rank, self.factors, len(weight)).addmm_(x, weight.T)
        else:
            # a bias may be much larger than the low-rank term, so all three meet in one product: [x, x A^T] [W, scale
            # B]^T
            b, rank = weight.new_zeros(len(weight), low_rank.shape[1]), 0
            for factors in self.factors:
                b[factors.low : factors.high, rank : rank + len(factors.a)] = factors.b.detach() * factors.scale
                rank += len(factors.a)
            y = torch.addmm(self.bias, torch.cat([x, low_rank], 1), torch.cat([weight, b], 1).T)
        return y if onto is None else y.add_(onto)

    def _frozen(self, x: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        """Return x W^T + bias + onto, (N, outs)."""
        weight = self.weight()
        if onto is None:
            return x @ weight.T if self.bias is None else torch.addmm(self.bias, x, weight.T)
        y = torch.addmm(onto, x, weight.T)
        if self.bias is not None:
            y += self.bias
        return y

    def lower(self, dy: torch.Tensor) -> torch.Tensor | None:
        """dy (N, outs) -> scale dy B, (N, sum of R): the gradient of x A^T."""
        if not self.factors:
            return None
        parts = [
            (dy[:, factors.low : factors.high] @ factors.b.detach().to(self.dtype)).mul_(factors.scale)
            for factors in self.factors
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def input_gradient(
        self, dy: torch.Tensor, lowered: torch.Tensor | None, dropout_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return dx (N, D) = dy W + lowered A, the second term times `dropout_mask` (N, D) if there was a dropout."""
        if lowered is None:
            return dy @ self.weight()
        if rounds(self.dtype) or dropout_mask is not None:
            dx = lowered @ self._stacked()
            if dropout_mask is not None:
                dx *= dropout_mask
            return dx.addmm_(dy, self.weight())
        return (dy @ self.weight()).addmm_(lowered, self._stacked())

    def factor_gradients(
        self, dy: torch.Tensor, x: torch.Tensor, low_rank: torch.Tensor | None, lowered: torch.Tensor | None
    ) -> Gradients:
        """Return dA and dB of each factor pair, in the order of `parameters`, fp32 (fp64 for fp64).

        x: (N, D), what A was multiplied with.
        """
        if low_rank is None or lowered is None:
            return []
        gradients: Gradients = []
        rank = 0
        da = lowered.T @ x
        for factors in self.factors:
            ranks = slice(rank, rank + len(factors.a))
            db = (dy[:, factors.low : factors.high].T @ low_rank[:, ranks]).to(factors.b.dtype).mul_(factors.scale)
            gradients.extend((da[ranks].to(factors.a.dtype), db))
            rank += len(factors.a)
        return gradients

    def _stacked(self) -> torch.Tensor:
        """All A, (sum of R, D), in the base's dtype."""
        parts = [factors.a.detach().to(self.dtype) for factors in self.factors]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def rounds(dtype: torch.dtype) -> bool:
    """Return whether a product in `dtype` is rounded so coarsely that a low-rank term must be added before."""
    return dtype.itemsize < 4


def low_rank_product(low_rank: torch.Tensor, pairs: Sequence[LoraFactors], outs: int) -> torch.Tensor:
    """Return scale (x A^T) B^T of every pair, (N, outs), zero where no module has factors. low_rank: x A^T, (N, sum of
    R).
    """
    covers_all = sum(pair.high - pair.low for pair in pairs) == outs
    y = (low_rank.new_empty if covers_all else low_rank.new_zeros)(len(low_rank), outs)
    rank = 0
    for pair in pairs:
        part, b = low_rank[:, rank : rank + len(pair.a)], pair.b.detach().to(low_rank.dtype)
        y[:, pair.low : pair.high].addmm_(part, b.T, beta=0, alpha=pair.scale)
        rank += len(pair.a)
    return y


def _is_narrow(base: Any) -> bool:
    return isinstance(base, MappedLinear) or is_quantised(base)


def _dense(base: Any, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(base, MappedLinear):
        return base.widen(torch.empty(base.out_features, base.in_features, dtype=dtype))
    return dense_weight(base, dtype) if is_quantised(base) else base.weight.detach().to(dtype)


def _factors(module: Any, low: int, high: int, dropout: bool) -> list[LoraFactors]:
    """The LoRA factors of a module that are switched on and trained."""
    if isinstance(module, LoraLinear):
        return [LoraFactors(low, high, module.a, module.b, module.scale)]
    from peft.tuners.lora import LoraLayer  # 190 MB, and a device has none

    if not isinstance(module, LoraLayer):
        raise Unsupported(f"a {type(module).__name__} adapter")
    if set(module.active_adapters) != {"default"} or module.merged_adapters:
        raise Unsupported("an adapter that is merged, or more than one")
    if module.use_dora.get("default"):
        raise Unsupported("DoRA")
    if module.lora_bias.get("default"):
        raise Unsupported("LoRA with a bias")
    if not dropout and not isinstance(module.lora_dropout["default"], torch.nn.Identity):
        raise Unsupported("dropout before A")
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return [LoraFactors(low, high, a, b, float(module.scaling["default"]))]
