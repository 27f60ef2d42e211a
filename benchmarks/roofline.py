"""How long one LoRA update's matrix products alone take, at the shapes and in the dtype that the update has them.

Counted are the products that no implementation can leave out: every frozen linear forward and its input gradient, the
LoRA factors' products, the LM head on the supervised rows and its input gradient. No gradient goes below the first
adapted layer's q, k and v. Attention's own products (a row sees only itself) and everything elementwise are not
counted, so the fraction that is made of this, needed seconds / update seconds, errs low.

Each distinct product is timed alone, with warm caches; fusing q, k and v or gate and up into one product could make
the sum smaller than it is here.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

REPEATS = 7
# the projections that read the layer's input: at the lowest adapted layer nothing below them wants a gradient
READ_INPUT = ("q_proj", "k_proj", "v_proj", "qkv_proj")


@dataclass(frozen=True)
class Product:
    """(m, k) x (k, n). `left`, `right`: whether that operand lies transposed in memory."""

    m: int
    k: int
    n: int
    left: bool = False
    right: bool = False

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.k * self.n


@dataclass(frozen=True)
class Needed:
    """What one update's products need on this machine."""

    seconds: float
    flops: int


def measure(model: Any, tokens: int, supervised: int, rank: int) -> Needed:
    """The products of one update of T `tokens`, S of them `supervised`, over `model` with or without injected
    adapters.
    """
    counted = products(linears(model), head(model), tokens, supervised, rank)
    weight = model.get_output_embeddings().weight
    seconds = sum(times * product_seconds(product, weight.dtype, weight.device) for product, times in counted.items())
    return Needed(seconds, sum(times * product.flops for product, times in counted.items()))


def linears(model: Any) -> list[tuple[str, int, int]]:
    """(name, out, in) of every frozen linear of the decoder's layers, in the model's order."""
    output = model.get_output_embeddings()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not output and ".lora_" not in name:
            found.append((name.removesuffix(".base_layer"), *module.weight.shape))
    return found


def head(model: Any) -> tuple[int, int]:
    """(V, D) of the LM head."""
    return tuple(model.get_output_embeddings().weight.shape)


def products(
    frozen: Iterable[tuple[str, int, int]], head: tuple[int, int], tokens: int, supervised: int, rank: int
) -> Counter[Product]:
    """How often an update computes each product. Every linear in `frozen` is adapted."""
    counted: Counter[Product] = Counter()
    lowest = None
    for name, wide, narrow in frozen:
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        lowest = layer if lowest is None else lowest
        counted.update(_adapted(wide, narrow, tokens, rank))
        if not (layer == lowest and name.rpartition(".")[2] in READ_INPUT):
            counted[Product(tokens, wide, narrow)] += 1  # dY W
            counted[Product(tokens, rank, narrow)] += 1  # (dY B) A
    vocabulary, width = head
    counted[Product(supervised, width, vocabulary, right=True)] += 1
    counted[Product(supervised, vocabulary, width)] += 1
    return counted


def _adapted(wide: int, narrow: int, tokens: int, rank: int) -> list[Product]:
    """Of one linear W (out, in) with A (R, in) and B (out, R): everything but the gradient of its input."""
    return [
        Product(tokens, narrow, wide, right=True),  # X W'
        Product(tokens, narrow, rank, right=True),  # X A'
        Product(tokens, rank, wide, right=True),  # (X A') B'
        Product(tokens, wide, rank),  # dY B
        Product(wide, tokens, rank, left=True),  # dB = dY' (X A')
        Product(rank, tokens, narrow, left=True),  # dA = (dY B)' X
    ]


def product_seconds(product: Product, dtype: torch.dtype, device: torch.device) -> float:
    """Median seconds of that product."""
    left = torch.randn(*((product.k, product.m) if product.left else (product.m, product.k)), device=device).to(dtype)
    right = torch.randn(*((product.n, product.k) if product.right else (product.k, product.n)), device=device).to(
        dtype
    )
    left, right = left.t() if product.left else left, right.t() if product.right else right
    out = torch.empty(product.m, product.n, dtype=dtype, device=device)
    took = []
    for _ in range(REPEATS + 1):
        _finish(device)
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        _finish(device)
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
