"""Adapters of clients, random and seeded: two modules and a tensor that is trained whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sartor.federate.aggregation import Mode
from sartor.models.lora_tensors import A, B, Tensors, pad_ranks, split_ranks

Q, V, WHOLE = (
    "base_model.model.model.layers.0.self_attn.q_proj",
    "base_model.model.model.layers.1.self_attn.v_proj",
    "projector.weight",
)


def shared(rank: int = 8, seed: int = 0, size: float = 1.0) -> dict[str, np.ndarray]:
    """size: of B, beside A's."""
    source = np.random.default_rng(seed)
    shapes = {Q + A: (rank, 24), Q + B: (32, rank), V + A: (rank, 24), V + B: (16, rank), WHOLE: (5, 3)}
    return {
        name: (source.standard_normal(shape) * (size if name.endswith(B) else 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def trained(
    mode: Mode, held: Tensors, number: int, seed: int, rank: int | None = None, step: float = 0.3
) -> dict[str, np.ndarray]:
    """What a client ends with: what the mode trains has moved at random."""
    source = np.random.default_rng([seed, 1])
    own = dict(held) if rank is None else split_ranks(held, rank)[0]
    return {
        name: (value + step * source.standard_normal(value.shape)).astype(np.float32)
        if mode.trains(name, number)
        else value
        for name, value in own.items()
    }


def true_products(adapters: Sequence[Tensors], examples: Sequence[int], held: Tensors) -> dict[str, np.ndarray]:
    """The weighted mean of B_i A_i, in fp64."""
    total = sum(examples)
    products: dict[str, np.ndarray] = {}
    for adapter, count in zip(adapters, examples, strict=True):
        whole = pad_ranks(adapter, held)
        for module in (Q, V):
            product = whole[module + B].astype(np.float64) @ whole[module + A].astype(np.float64)
            products[module] = products.get(module, 0) + product * count / total
    return products
