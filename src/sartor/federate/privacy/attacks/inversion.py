"""Which tokens stand in the rows of a first update? What a server sees of a client where there is no secure sum.

An embedding's gradient has a row for each token that was read, and zeros elsewhere. A factor's does not say it so plainly: the
change of B is a sum over tokens t of g_t (A x_t)^T, so its rows lie in the span of A x_t, and of the first layer's x_v, the
normalised embedding, the server knows one for each word v of the vocabulary: those with A x_v in the span were read (DAGER,
Petrov et al. 2024, arXiv:2405.15586, there for full gradients). It is blind once the rows have more tokens than the adapter has
ranks, and for a sum of clients, since that has all their tokens; several steps of an optimiser such as Adam bend the span.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from sartor.core.errors import ConfigError
from sartor.models.lora_tensors import Array


@dataclass(frozen=True)
class Inversion:
    """attack: of what; precision: of the tokens that were named, recall: of those that were there, both 0..1.

    is_blind: the update spans everything, and nothing can be said of it.
    """

    attack: str
    named: int
    precision: float
    recall: float
    is_blind: bool = False

    def __str__(self) -> str:
        if self.is_blind:
            return f"inversion of the {self.attack}: blind, more tokens than ranks"
        found = f"precision {self.precision:.2f}, recall {self.recall:.2f}"
        return f"inversion of the {self.attack}: {self.named} tokens named, {found}"


def from_embedding(gradient: Array, tolerance: float = 1e-6) -> set[int]:
    """Tokens with a gradient (V, D), beside the largest row's norm."""
    rows = np.linalg.norm(gradient.astype(np.float64), axis=1)
    return set(np.flatnonzero(rows > tolerance * rows.max()).tolist()) if rows.any() else set()


def from_factor(change: Array, a: Array, inputs: Array, tolerance: float = 1e-3) -> set[int] | None:
    """Tokens v whose A x_v lies in the row space of `change`; None where that is everything, or full without one of them.

    change: (out, R) of B; a: (R, in); inputs: x_v (V, in), what the module reads where token v is alone, as in a first layer.
    tolerance: distance from the span over length. Raises ConfigError for shapes that do not fit.
    """
    if change.shape[1] != a.shape[0] or a.shape[1] != inputs.shape[1]:
        shapes = f"change {change.shape}, A {a.shape}, inputs {inputs.shape}"
        raise ConfigError(f"{shapes} do not fit each other", "give all three of one module")
    _, sizes, rows = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    span = rows[sizes > tolerance * sizes[0]] if len(sizes) and sizes[0] else rows[:0]
    if len(span) == change.shape[1]:
        return None
    mapped = inputs.astype(np.float64) @ a.astype(np.float64).T
    outside = np.linalg.norm(mapped - mapped @ span.T @ span, axis=1)
    lengths = np.linalg.norm(mapped, axis=1)
    found = set(np.flatnonzero((outside <= tolerance * lengths) & (lengths > 0)).tolist())
    # a module of few outputs spans no more than so many tokens, and of more says as little as one of few ranks
    return None if not found and len(span) == min(change.shape) else found


def judged(attack: str, named: Collection[int] | None, true: Collection[int]) -> Inversion:
    """Held against the tokens that were there."""
    if named is None:
        return Inversion(attack, 0, 0.0, 0.0, is_blind=True)
    right = len(set(named) & set(true))
    return Inversion(attack, len(named), right / len(named) if named else 0.0, right / len(true) if true else 0.0)
