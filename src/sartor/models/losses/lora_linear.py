"""Frozen linear layers fused into one product with LoRA.

    y = x W^T + bias + scale (x A^T) B^T

Forward and backward are written out (Hu et al. 2021, arXiv:2106.09685). So only x A^T is kept, and nothing is computed
that the factors' gradients do not need. W is one tensor for all fused modules, made at its first use. The modules' own
weights become views of it, so the base is in memory once and transformers' module computes with the same numbers.

In 16 bits the order of the two products matters. x W^T rounded to bf16 lies on a grid of 2^-8 of its size. A low-rank
term below half a step of that grid, added afterwards, is rounded away, and with it what the adapter has learnt. So the
low-rank product is computed first and the frozen one is accumulated onto it: a matrix product adds to its output in
fp32 and rounds the sum once. The same holds for dx = dy W + (scale dy B) A. The residual stream is added last: on its
coarser grid the low-rank term alone would be lost. In fp32 the frozen product comes first, so that runs resumed from
older checkpoints stay bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sartor.models import hardware
from sartor.models.quantization import dense_weight, is_quantised

Gradients = list[torch.Tensor]
# Name of the frozen second adapter of a PiSSA run, the negative of the factors at which it began (models/adapters.py)
PISSA_START = "start"


@dataclass(frozen=True)
class LoraFactors:
    """LoRA factors on outputs [low, high) of the fused product.

    a: (R, D) and b: (high - low, R), fp32 master weights.
    """

    low: int
    high: int
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float


class MappedLinear(torch.nn.Linear):
    """Frozen linear module whose weight is a view of a memory-mapped file, in the file's dtype.

    The weight is widened for each product and freed afterwards. So a device holds the base only as page cache, which
    the operating system may reclaim at any time.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)

    def widen(self, out: torch.Tensor, low: int = 0) -> torch.Tensor:
        """Copy rows [low, low + len(out)) of the weight into `out`, in its dtype, and return it.

        out: shape (rows, D).
        """
        return out.copy_(self.weight.detach()[low : low + len(out)])


class TransposedLinear(torch.nn.Linear):
    """Frozen linear module whose weight is stored as (in, out), as transformers' Conv1D of GPT-2 does."""

    def __init__(self, conv: Any) -> None:
        torch.nn.Module.__init__(self)
        self._conv = (conv,)  # not a module of this one
        self.in_features, self.out_features = conv.weight.shape

    @property
    def weight(self) -> torch.Tensor:
        """Weight, (out, in), a view."""
        return self._conv[0].weight.T

    @property
    def bias(self) -> torch.Tensor | None:
        """Bias, (out,), or None."""
        bias: torch.Tensor | None = self._conv[0].bias
        return bias


class LoraLinear(torch.nn.Module):
    """Frozen linear module with LoRA factors, for edge devices without peft.

    a: (R, D), b: (outs, R), fp32.
    """

    def __init__(self, base: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.base_layer, self.scale = base, scale
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)


class Unsupported(Exception):
    """Reason why the fused path cannot compute a model or a module."""


class Projection:
    """Several linear modules on one input (q, k and v, say), fused into one: (N, D) -> (N, sum of outs)."""

    def __init__(self, modules: Sequence[Any], dtype: torch.dtype, *, dropout: bool = False) -> None:
        """Fuse `modules`, linear modules or LoRA layers around them.

        dropout: true if the caller applies the modules' dropout before A; otherwise a module with dropout is refused.
        Raises Unsupported for modules that cannot be fused, or weights that are not in `dtype`.
        """
        self.dtype = dtype
        self.factors: list[LoraFactors] = []
        frozen, low = [], 0
        for module in modules:
            layer = getattr(module, "base_layer", module)
            base = TransposedLinear(layer) if type(layer).__name__ == "Conv1D" else layer
            if not isinstance(base, torch.nn.Linear):  # bitsandbytes' layers are subclasses
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
        # some weight is quantised or mapped, so W is made dense for each product
        self.is_narrow = any(_is_narrow(base) for base in frozen)
        self._fused: torch.Tensor | None = None
        # factors of the last forward in 16 bits, (A, scale B) of all modules, for its backward
        self._narrowed: tuple[torch.Tensor, torch.Tensor] | None = None
        # receives the factors and the arguments of `factor_gradients` (row_gradients.py)
        self.observer: Callable[..., None] | None = None
        unexpected_dtypes = [
            base.weight.dtype for base in frozen if not _is_narrow(base) and base.weight.dtype != self.dtype
        ]
        if unexpected_dtypes:
            raise Unsupported(f"weights in {unexpected_dtypes[0]} where the base computes in {self.dtype}")

    def _fuse(self) -> torch.Tensor:
        """Return W (outs, D), and make the modules' weights views of it."""
        originals = [base.weight.detach() for base in self.modules]
        fused, low = torch.cat(originals), 0
        for base in self.modules:
            # a second projection over the same module must find this storage and not allocate another
            base.weight.data = fused[low : low + base.out_features]
            low += base.out_features
        if fused.device.type == "cpu":
            hardware.drop_mapped_pages(originals)
        return fused

    def release(self) -> None:
        """Free W, here and in the modules. The caller holds another copy, and nothing else will compute with it."""
        self._fused = None
        for base in self.modules:
            base.weight.data = base.weight.data.new_empty(0)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Factors in order: a, b of the first module, a, b of the second, ..., also those that are not trained."""
        return [part for factors in self.factors for part in (factors.a, factors.b)]

    def weight(self) -> torch.Tensor:
        """Return the frozen W, of shape (outs, D).

        A quantised or mapped weight is made dense for this product and not kept.
        """
        if not self.is_narrow and len(self.modules) == 1:
            return self.modules[0].weight.detach()  # not kept: another projection may move it into its own W
        if not self.is_narrow:
            self._fused = self._fuse() if self._fused is None else self._fused
            return self._fused
        if all(isinstance(base, MappedLinear) for base in self.modules):
            return self._widened()
        parts: list[torch.Tensor] = []
        for base in self.modules:
            if isinstance(base, MappedLinear):
                parts.append(base.widen(torch.empty(base.out_features, base.in_features, dtype=self.dtype)))
            elif is_quantised(base):
                parts.append(dense_weight(base, self.dtype))
            else:
                parts.append(base.weight.detach().to(self.dtype))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _widened(self) -> torch.Tensor:
        """Return W (outs, D) of mapped modules.

        Each weight is widened straight into its rows, so no weight is in memory twice.
        """
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
        masked = x if dropout_mask is None else x * dropout_mask
        if rounds(self.dtype):
            self._narrowed = self._narrow()
            a, b = self._narrowed
            # low_rank (N, sum of R) = (x * mask) A^T
            low_rank = masked @ a.T
            return self._rounded_once(x, low_rank, b, onto), low_rank
        low_rank = masked @ self._stacked().T
        # y[:, low:high] += scale low_rank_i B_i^T, (N, high - low) for each factor pair i
        y, rank = self._frozen(x, onto), 0
        for factors in self.factors:
            part = low_rank[:, rank : rank + len(factors.a)]
            y[:, factors.low : factors.high].addmm_(part, factors.b.detach().T, alpha=factors.scale)
            rank += len(factors.a)
        return y, low_rank

    def _rounded_once(
        self, x: torch.Tensor, low_rank: torch.Tensor, b: torch.Tensor, onto: torch.Tensor | None
    ) -> torch.Tensor:
        """Return x W^T + bias + low_rank b^T + onto, (N, outs), both products in one fp32 accumulator.

        b: scale B of all modules, (outs, sum of R).
        """
        weight = self.weight()
        if self.bias is None:
            y = (low_rank @ b.T).addmm_(x, weight.T)
        else:
            # A bias may be much larger than the low-rank term, so all three are summed in one product:
            # y (N, outs) = bias + [x, low_rank] [W, b]^T
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
        """Return scale dy B, (N, sum of R), the gradient of x A^T; None without factors. dy: (N, outs)."""
        if not self.factors:
            return None
        if rounds(self.dtype):
            _, b = self._narrowed or self._narrow()
            return dy @ b
        # d(x A^T)_i = scale dy[:, low:high] B_i, (N, high - low) (high - low, R) -> (N, R) for each pair i
        parts = [
            (dy[:, factors.low : factors.high] @ factors.b.detach()).mul_(factors.scale) for factors in self.factors
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def input_gradient(
        self, dy: torch.Tensor, lowered: torch.Tensor | None, dropout_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return dx (N, D) = dy W + lowered A.

        dy: (N, outs). lowered: (N, sum of R) from `lower`. dropout_mask: (N, D) of `forward`, which multiplies the
        second term.
        """
        if lowered is None:
            return dy @ self.weight()
        # dx = mask * (lowered A) + dy W, (N, sum of R) (sum of R, D) + (N, outs) (outs, D); the small term first
        if rounds(self.dtype) or dropout_mask is not None:
            a = self._stacked() if self._narrowed is None else self._narrowed[0]
            dx = lowered @ a
            if dropout_mask is not None:
                dx *= dropout_mask
            return dx.addmm_(dy, self.weight())
        return (dy @ self.weight()).addmm_(lowered, self._stacked())

    def factor_gradients(
        self, dy: torch.Tensor, x: torch.Tensor, low_rank: torch.Tensor | None, lowered: torch.Tensor | None
    ) -> Gradients:
        """Return dA (R, D) and dB (outs, R) of each factor pair, in the order and dtypes of `parameters`.

        dy: (N, outs). x: (N, D), the input of A. low_rank: (N, sum of R) x A^T from `forward`. lowered: (N, sum of R)
        from `lower`.
        """
        if low_rank is None or lowered is None:
            return []
        if self.observer is not None:
            self.observer(self.factors, dy, x, low_rank=low_rank, lowered=lowered)
        gradients: Gradients = []
        rank = 0
        # dA = (scale dy B)^T x, (sum of R, N) (N, D): all modules at once
        da = lowered.T @ x
        # in 16 bits also dy^T (x A^T), (outs, N) (N, sum of R), of which a module's own rows and columns are read: one
        # small product costs less than several smaller ones
        all_db = dy.T @ low_rank if rounds(self.dtype) else None
        for factors in self.factors:
            ranks = slice(rank, rank + len(factors.a))
            # dB_i = scale dy[:, low:high]^T (x A_i^T), (high - low, N) (N, R)
            if all_db is None:
                db = dy[:, factors.low : factors.high].T @ low_rank[:, ranks]
            else:
                db = all_db[factors.low : factors.high, ranks]
            db = db.to(factors.b.dtype, copy=True, memory_format=torch.contiguous_format).mul_(factors.scale)
            gradients.extend((da[ranks].to(factors.a.dtype), db))
            rank += len(factors.a)
        return gradients

    def _narrow(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all A stacked, (sum of R, D), and all scale B on a diagonal of blocks, (outs, sum of R)."""
        outs = sum(base.out_features for base in self.modules)
        a = self._stacked()
        b, rank = a.new_zeros(outs, len(a)), 0
        for factors in self.factors:
            block = b[factors.low : factors.high, rank : rank + len(factors.a)]
            block.copy_(factors.b.detach() * factors.scale)
            rank += len(factors.a)
        return a, b

    def _stacked(self) -> torch.Tensor:
        """Return all A stacked, (sum of R, D), in the base's dtype."""
        parts = [factors.a.detach().to(self.dtype) for factors in self.factors]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def rounds(dtype: torch.dtype) -> bool:
    """Return whether `dtype` has fewer than 32 bits: a low-rank term must then be added before rounding."""
    return dtype.itemsize < 4


def _is_narrow(base: Any) -> bool:
    """Return whether a module's weight is mapped or quantised, and so made dense for each product."""
    return isinstance(base, MappedLinear) or is_quantised(base)


def _factors(module: Any, low: int, high: int, dropout: bool) -> list[LoraFactors]:
    """Return the active LoRA factors of a module. Raises Unsupported for adapters other than plain LoRA."""
    if isinstance(module, LoraLinear):
        return [LoraFactors(low, high, a=module.a, b=module.b, scale=module.scale)]
    from peft.tuners.lora import LoraLayer  # imported here: it takes 190 MB, and an edge device does not have it

    if not isinstance(module, LoraLayer):
        raise Unsupported(f"a {type(module).__name__} adapter")
    names = list(module.active_adapters)
    if names not in (["default"], ["default", PISSA_START]) or module.merged_adapters:
        raise Unsupported("an adapter that is merged, or more than one")
    if module.use_dora.get("default"):
        raise Unsupported("DoRA")
    if module.lora_bias.get("default"):
        raise Unsupported("LoRA with a bias")
    if not dropout and not isinstance(module.lora_dropout["default"], torch.nn.Identity):
        raise Unsupported("dropout before A")
    result = []
    for name in names:
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        result.append(LoraFactors(low, high, a=a, b=b, scale=float(module.scaling[name])))
    return result
