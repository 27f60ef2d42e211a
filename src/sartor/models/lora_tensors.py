"""LoRA tensors by PEFT name in numpy; nested ranks.

The shared product is a sum over ranks, B A = sum_k b_k a_k. A client with less memory trains the ranks below r and
holds the
others still: they stay a part of its model, as a second frozen adapter, or added to its base. What it sends is zero
there, so the mean over clients is still the exact mean of their products; a rank that few clients train moves by their
share only. HetLoRA (arXiv:2401.06432) cuts the adapter and so forgets the tail in every round; here nothing shrinks.

A linear module has two: `NAME.lora_A.weight` (R, in) and `NAME.lora_B.weight` (out, R); it computes scale * B A beside
the frozen weight. Any other tensor is one that is trained whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sartor.core.errors import ConfigError, InputError

Array = NDArray[np.floating]
Tensors = Mapping[str, Array]
A, B = ".lora_A.weight", ".lora_B.weight"
_REMEDY = "leave this client out of the round, and look at what it runs"


@dataclass(frozen=True)
class LoraPair:
    """The factors of one module: A (R, in), B (out, R)."""

    a: Array
    b: Array

    @property
    def product(self) -> NDArray[np.float64]:
        """B A (out, in), without the scale."""
        return self.b.astype(np.float64) @ self.a.astype(np.float64)


def modules(tensors: Iterable[str]) -> list[str]:
    """Names of the modules that have factors, sorted. Raises InputError for one half alone."""
    names = set(tensors)
    with_a, with_b = ({name.removesuffix(suffix) for name in names if name.endswith(suffix)} for suffix in (A, B))
    if unpaired := sorted(with_a ^ with_b):
        raise InputError(f"{unpaired[0]} has one of its two factors", "send both, as the adapter's file has them")
    return sorted(with_a)


def pair(tensors: Tensors, module: str) -> LoraPair:
    """The factors of a module."""
    return LoraPair(tensors[module + A], tensors[module + B])


def add_changes(tensors: Tensors, changes: Tensors, sign: float = 1.0) -> dict[str, Array]:
    """`tensors` with the changes added where there are some."""
    return {
        name: (value.astype(np.float64) + sign * changes[name]).astype(value.dtype) if name in changes else value
        for name, value in tensors.items()
    }


def norm(tensors: Tensors) -> float:
    """The Euclidean norm of all tensors as one vector."""
    return float(np.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in tensors.values())))


def flat(tensors: Tensors) -> NDArray[np.float64]:
    """All values as one vector (P,), in the order of the names."""
    return np.concatenate([tensors[name].astype(np.float64).ravel() for name in sorted(tensors)])


def unflat(vector: NDArray[np.float64], like: Tensors) -> dict[str, Array]:
    """The tensors of a vector that `flat` made, in the shapes and dtypes of `like`."""
    names = sorted(like)
    parts = np.split(vector, np.cumsum([like[name].size for name in names])[:-1])
    return {
        name: part.reshape(like[name].shape).astype(like[name].dtype) for name, part in zip(names, parts, strict=True)
    }


def split_ranks(shared: Tensors, rank: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """(what a client of this rank trains, what it holds still beside that); their products add up to the shared one.

    Both are used with the shared scale, alpha / R. A module of no higher rank is whole in the first and absent in the
    second.
    Raises ConfigError for a rank below 1.
    """
    if rank < 1:
        raise ConfigError(f"a client of rank {rank} trains nothing", "a rank of at least 1, or leave this client out")
    trained, tail = dict(shared), {}
    for module in modules(shared):
        a, b = shared[module + A], shared[module + B]
        trained[module + A], trained[module + B] = a[:rank], b[:, :rank]
        if len(a) > rank:
            tail[module + A], tail[module + B] = a[rank:], b[:, rank:]
    return trained, tail


def join_ranks(trained: Tensors, tail: Tensors) -> dict[str, Array]:
    """One adapter of the ranks of both, whose products are the sums of theirs: what `cut` parted. Both on one scale.

    Raises InputError unless both have the same modules.
    """
    if unmatched := sorted(set(modules(trained)) ^ set(modules(tail))):
        raise InputError(f"{unmatched[0]} has factors in one of the two adapters", "join adapters of the same modules")
    joined = dict(trained)
    for module in modules(trained):
        joined[module + A] = np.concatenate([trained[module + A], tail[module + A]])
        joined[module + B] = np.concatenate([trained[module + B], tail[module + B]], axis=1)
    return joined


def zero_adapter(like: Tensors) -> dict[str, Array]:
    """An adapter of these shapes that changes nothing."""
    return {name: np.zeros_like(value) for name, value in like.items()}


def rank_of(tensors: Tensors) -> int:
    """The rank R of an adapter whose modules all have one. Raises InputError for one without factors, or of several
    ranks.
    """
    ranks = {len(tensors[module + A]) for module in modules(tensors)}
    if len(ranks) != 1:
        raise InputError(f"the adapter's modules have the ranks {sorted(ranks)}", "an adapter of one rank")
    return ranks.pop()


def pad_ranks(trained: Tensors, shared: Tensors) -> dict[str, Array]:
    """What a client trained, with the ranks behind that it held still. Raises InputError where the two do not fit."""
    padded = dict(trained)
    for module in modules(trained):
        a, b = trained[module + A], trained[module + B]
        if module + A not in shared:
            raise InputError(f"the shared adapter has no module {module}", "train the shared adapter")
        shared_a, shared_b = shared[module + A], shared[module + B]
        rank = len(a)
        if (
            b.shape[1] != rank
            or rank > len(shared_a)
            or (b.shape[0], a.shape[1]) != (shared_b.shape[0], shared_a.shape[1])
        ):
            shapes = f"A {a.shape} and B {b.shape}; the shared ones are {shared_a.shape} and {shared_b.shape}"
            raise InputError(f"{module} was trained as {shapes}", "train what `cut` gives for this client's rank")
        padded[module + A] = np.concatenate([a, shared_a[rank:].astype(a.dtype)])
        padded[module + B] = np.concatenate([b, shared_b[:, rank:].astype(b.dtype)], axis=1)
    return padded


def alpha_of(alpha: float, shared_rank: int, rank: int) -> float:
    """The alpha under which an adapter of `rank` has the shared one's scale: PEFT divides by each adapter's own
    rank.
    """
    return alpha * rank / shared_rank
