"""Clients of unequal ranks under one shared adapter of rank R: a client of rank r trains its first r ranks, nested.

The shared product is a sum over ranks, B A = sum_k b_k a_k. A client with less memory trains the ranks below r and holds the
others still: they stay a part of its model, as a second frozen adapter, or added to its base. What it sends is zero there, so
the mean over clients is still the exact mean of their products; a rank that few clients train moves by their share only.
HetLoRA (arXiv:2401.06432) cuts the adapter and so forgets the tail in every round; here nothing shrinks.
"""

from __future__ import annotations

import numpy as np

from sartor.core.errors import ConfigError, InputError
from sartor.federate.aggregate.tensors import A, Array, B, Tensors, modules


def cut(shared: Tensors, rank: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """(what a client of this rank trains, what it holds still beside that); their products add up to the shared one.

    Both are used with the shared scale, alpha / R. A module of no higher rank is whole in the first and absent in the second.
    Raises ConfigError for a rank below 1.
    """
    if rank < 1:
        raise ConfigError(f"a client of rank {rank} trains nothing", "a rank of at least 1, or leave this client out")
    own, tail = dict(shared), {}
    for module in modules(shared):
        a, b = shared[module + A], shared[module + B]
        own[module + A], own[module + B] = a[:rank], b[:, :rank]
        if len(a) > rank:
            tail[module + A], tail[module + B] = a[rank:], b[:, rank:]
    return own, tail


def joined(own: Tensors, tail: Tensors) -> dict[str, Array]:
    """One adapter of the ranks of both, whose products are the sums of theirs: what `cut` parted. Both on one scale.

    Raises InputError unless both have the same modules.
    """
    if strange := sorted(set(modules(own)) ^ set(modules(tail))):
        raise InputError(f"{strange[0]} has factors in one of the two adapters", "join adapters of the same modules")
    whole = dict(own)
    for module in modules(own):
        whole[module + A] = np.concatenate([own[module + A], tail[module + A]])
        whole[module + B] = np.concatenate([own[module + B], tail[module + B]], axis=1)
    return whole


def nothing(like: Tensors) -> dict[str, Array]:
    """An adapter of these shapes that changes nothing."""
    return {name: np.zeros_like(value) for name, value in like.items()}


def rank_of(tensors: Tensors) -> int:
    """The rank R of an adapter whose modules all have one. Raises InputError for one without factors, or of several ranks."""
    ranks = {len(tensors[module + A]) for module in modules(tensors)}
    if len(ranks) != 1:
        raise InputError(f"the adapter's modules have the ranks {sorted(ranks)}", "an adapter of one rank")
    return ranks.pop()


def widened(own: Tensors, shared: Tensors) -> dict[str, Array]:
    """What a client trained, with the ranks behind that it held still. Raises InputError where the two do not fit."""
    whole = dict(own)
    for module in modules(own):
        a, b = own[module + A], own[module + B]
        if module + A not in shared:
            raise InputError(f"the shared adapter has no module {module}", "train the shared adapter")
        held_a, held_b = shared[module + A], shared[module + B]
        rank = len(a)
        if b.shape[1] != rank or rank > len(held_a) or (b.shape[0], a.shape[1]) != (held_b.shape[0], held_a.shape[1]):
            shapes = f"A {a.shape} and B {b.shape}; the shared ones are {held_a.shape} and {held_b.shape}"
            raise InputError(f"{module} was trained as {shapes}", "train what `cut` gives for this client's rank")
        whole[module + A] = np.concatenate([a, held_a[rank:].astype(a.dtype)])
        whole[module + B] = np.concatenate([b, held_b[:, rank:].astype(b.dtype)], axis=1)
    return whole


def alpha_of(alpha: float, shared_rank: int, rank: int) -> float:
    """The alpha under which an adapter of `rank` has the shared one's scale: PEFT divides by each adapter's own rank."""
    return alpha * rank / shared_rank
