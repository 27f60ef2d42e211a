"""LoRA tensors by PEFT name in numpy; nested ranks.

A linear module has two: `NAME.lora_A.weight` (R, in) and `NAME.lora_B.weight` (out, R). It computes scale * B A beside
the frozen weight. Any other tensor is one that is trained whole.

The shared product is a sum over ranks, B A = sum_k b_k a_k. A client with less memory trains the ranks below r and
keeps the others frozen. They stay a part of its model, as a second frozen adapter, or added to its base. Its update is
zero there, so the mean over clients is still the exact mean of their products. A rank that few clients train changes
by their share only. HetLoRA (arXiv:2401.06432) truncates the adapter and so loses the tail in every round; here
nothing is lost.
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
    """Factors of one module: A (R, in), B (out, R)."""

    a: Array
    b: Array

    @property
    def product(self) -> NDArray[np.float64]:
        """Product B A, (out, in), without the scale."""
        return self.b.astype(np.float64) @ self.a.astype(np.float64)


def modules(tensors: Iterable[str]) -> list[str]:
    """Return the names of the modules that have factors, sorted. Raises InputError for a single factor."""
    names = set(tensors)
    with_a = {name.removesuffix(A) for name in names if name.endswith(A)}
    with_b = {name.removesuffix(B) for name in names if name.endswith(B)}
    if unpaired := sorted(with_a ^ with_b):
        raise InputError(f"{unpaired[0]} has one of its two factors", "send both, as the adapter's file has them")
    return sorted(with_a)


def pair(tensors: Tensors, module: str) -> LoraPair:
    """Return the factors of a module: A of shape (R, in) and B of shape (out, R)."""
    return LoraPair(tensors[module + A], tensors[module + B])


def add_changes(tensors: Tensors, changes: Tensors, sign: float = 1.0) -> dict[str, Array]:
    """Return `tensors` with `sign` times the changes added. Tensors without a change, of any shape, are returned as
    they are.
    """
    return {
        name: (value.astype(np.float64) + sign * changes[name]).astype(value.dtype) if name in changes else value
        for name, value in tensors.items()
    }


def norm(tensors: Tensors) -> float:
    """Return the Euclidean norm of all tensors as one vector, a scalar."""
    return float(np.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in tensors.values())))


def flat(tensors: Tensors) -> NDArray[np.float64]:
    """Return all values as one vector (P,), in the order of the names."""
    return np.concatenate([tensors[name].astype(np.float64).ravel() for name in sorted(tensors)])


def unflat(vector: NDArray[np.float64], like: Tensors) -> dict[str, Array]:
    """Return the tensors of a vector (P,) from `flat`, in the shapes and dtypes of `like`."""
    names = sorted(like)
    parts = np.split(vector, np.cumsum([like[name].size for name in names])[:-1])
    return {
        name: part.reshape(like[name].shape).astype(like[name].dtype) for name, part in zip(names, parts, strict=True)
    }


def split_ranks(shared: Tensors, rank: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the tensors that a client of this rank trains, and those of the frozen higher ranks.

    trained: A (r, in), B (out, r). tail: A (R - r, in), B (out, R - r). Their products add up to the shared one; both
    are used with the shared scale, alpha / R. A module of no higher rank is whole in the first and absent in the
    second. Raises ConfigError for a rank below 1.
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
    """Return one adapter that concatenates the ranks of both, the inverse of `split_ranks`.

    Its A has shape (r + r', in) and its B (out, r + r'), so its products are the sums of theirs. Both have one scale.
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
    """Return an adapter of these shapes that is zero."""
    return {name: np.zeros_like(value) for name, value in like.items()}


def rank_of(tensors: Tensors) -> int:
    """Return the rank R that all modules of an adapter have, from A of shape (R, in).

    Raises InputError for an adapter without factors, or with several ranks.
    """
    ranks = {len(tensors[module + A]) for module in modules(tensors)}
    if len(ranks) != 1:
        raise InputError(f"the adapter's modules have the ranks {sorted(ranks)}", "an adapter of one rank")
    return ranks.pop()


def pad_ranks(trained: Tensors, shared: Tensors) -> dict[str, Array]:
    """Return a client's trained tensors with the shared, frozen higher ranks appended.

    A: (R, in), B: (out, R). Raises InputError if the two do not fit.
    """
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
            raise InputError(
                f"{module} was trained as {shapes}", "train what `split_ranks` gives for this client's rank"
            )
        padded[module + A] = np.concatenate([a, shared_a[rank:].astype(a.dtype)])
        padded[module + B] = np.concatenate([b, shared_b[:, rank:].astype(b.dtype)], axis=1)
    return padded


def alpha_of(alpha: float, shared_rank: int, rank: int) -> float:
    """Return the alpha that gives an adapter of `rank` the shared adapter's scale.

    PEFT divides alpha by each adapter's own rank.
    """
    return alpha * rank / shared_rank
