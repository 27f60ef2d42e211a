r"""Client updates: checks, packing, clipping and the weighted mean.

    {"a.weight":[8,4],"b.weight":[4]}\n<values, little-endian float32, in the order of the names>

Weights: each client sends w_i u_i and w_i itself as one more number, with w_i = examples_i / most_examples. The
quotient of the two sums, sum_i w_i u_i / sum_i w_i, is the mean weighted by examples. No client's count is revealed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sartor.core import records
from sartor.core.errors import ArtifactError, ConfigError, InputError, RoundError
from sartor.models.lora_tensors import _REMEDY, Array, Tensors, norm

# name of the weight, which each client sends as one more number of the sum
WEIGHT = "weight of the update"


def pack_tensors(tensors: Tensors) -> bytes:
    """Return the tensors as bytes, which are equal exactly if names, shapes and fp32 values are."""
    head = {name: list(tensors[name].shape) for name in tensors}
    return (
        records.canonical(head)
        + b"\n"
        + b"".join(np.asarray(tensors[name], "<f4").tobytes() for name in sorted(tensors))
    )


def unpack_tensors(content: bytes) -> dict[str, npt.NDArray[np.float32]]:
    """Return the tensors of packed bytes, in the shapes of their first line, fp32.

    Raises ArtifactError for bytes that are no packed tensors.
    """
    line, _, values = content.partition(b"\n")
    try:
        head = json.loads(line)
        sizes = {name: math.prod(shape) for name, shape in head.items()}
        if len(values) != 4 * sum(sizes.values()) or any(size < 0 for size in sizes.values()):
            raise ValueError(f"{len(values)} bytes of values")
        tensors, start = {}, 0
        for name in sorted(head):
            tensors[name] = np.frombuffer(values, "<f4", sizes[name], 4 * start).astype(np.float32).reshape(head[name])
            start += sizes[name]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"these are no tensors of a round: {error}", "get them again from the coordinator"
        ) from None
    return tensors


def digest(content: bytes) -> str:
    """Return the sha256 of packed tensors, in hex."""
    return hashlib.sha256(content).hexdigest()


def clipped(tensors: Tensors, clip: float) -> dict[str, npt.NDArray[np.float32]]:
    """Return the update scaled down to the norm `clip` if it is longer: u min(1, clip / ||u||).

    Same shapes, fp32. Raises ConfigError for values that are not finite.
    """
    length = norm(tensors)
    if not math.isfinite(length):
        raise ConfigError("the update holds a value that is not finite", "look at the tuning: its loss has diverged")
    factor = min(1.0, clip / length) if length else 1.0
    return {name: (np.asarray(value, np.float64) * factor).astype(np.float32) for name, value in tensors.items()}


def weighted(tensors: Tensors, weight: float) -> dict[str, npt.NDArray[np.float64]]:
    """Return the terms of the sum: w u in the same shapes, and w as (1,) under the name `WEIGHT`; fp64.

    weight: w, in (0, 1].
    """
    scaled = {name: np.asarray(value, np.float64) * weight for name, value in tensors.items()}
    return {**scaled, WEIGHT: np.array([weight], np.float64)}


def mean_of(summed: Tensors) -> dict[str, npt.NDArray[np.float32]]:
    """Return the weighted mean, sum(w u) / sum(w), in the same shapes, fp32.

    summed: the sums over clients of what `weighted` returns. Raises RoundError if the weights do not sum to a positive
    number, which means that a client sent a false weight.
    """
    total = float(summed[WEIGHT][0])
    if not total > 0:
        raise RoundError(f"the weights of the clients sum to {total}", "begin a new round; a client lies", "shares")
    return {name: (value / total).astype(np.float32) for name, value in summed.items() if name != WEIGHT}


@dataclass(frozen=True)
class Update:
    """Update of one client.

    examples: number of rows it was trained on, its weight in the mean; at least 1.
    """

    client: str
    tensors: Tensors
    examples: int = 1


def check_update(update: Update, like: Tensors) -> Update:
    """Return the update if it has exactly the tensors of `like`, in their shapes, with finite values.

    Otherwise raises InputError with the client and the tensor.
    """
    client = f"client {update.client!r}"
    if update.examples < 1:
        raise InputError(f"{client} says that it learnt from {update.examples} examples; at least 1 is due", _REMEDY)
    if mismatched := sorted(set(update.tensors) ^ set(like)):
        verb = "lacks" if mismatched[0] in like else "sends, unasked,"
        raise InputError(f"{client} {verb} {mismatched[0]} and {len(mismatched) - 1} more", _REMEDY)
    for name, tensor in update.tensors.items():
        if tensor.shape != like[name].shape:
            raise InputError(
                f"{client} sends {name} of shape {tensor.shape}; the round has {like[name].shape}", _REMEDY
            )
        if not np.isfinite(tensor).all():
            raise InputError(f"{client} sends values that are not finite, in {name}", _REMEDY)
    return update


def cohort(updates: Sequence[Update], like: Tensors) -> None:
    """Raise an error unless the updates form a round: at least one, each valid, no client twice.

    like: tensors whose names and shapes each update must have. Raises ConfigError if there are none, InputError
    otherwise.
    """
    if not updates:
        raise ConfigError("a round without one update has no mean", "wait for clients, or give the round up")
    for update in updates:
        check_update(update, like)
    if len({update.client for update in updates}) < len(updates):
        names = [update.client for update in updates]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise InputError(
            f"client {duplicate!r} sent two updates for one round",
            f"keep the first update of {duplicate} and leave out the others",
        )


def mean(updates: Sequence[Update]) -> dict[str, Array]:
    """Return the mean weighted by examples, summed in fp64, in the shapes and dtypes of the updates."""
    total = sum(update.examples for update in updates)
    means = {}
    for name, tensor in updates[0].tensors.items():
        parts = [(update.examples / total) * update.tensors[name].astype(np.float64) for update in updates]
        means[name] = np.sum(parts, axis=0).astype(tensor.dtype)
    return means
