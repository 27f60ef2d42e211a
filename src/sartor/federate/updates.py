r"""Named float32 arrays as bytes; an update as it goes into the sum, and the mean that comes out.

    {"a.weight":[8,4],"b.weight":[4]}\n<values, little-endian float32, in the order of the names>

Weights: each client sends its update times w = examples / most_examples, and w as one more number of the sum; the quotient of
the two sums is the mean weighted by examples, and nobody's count is told.
"""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import numpy.typing as npt

from sartor.core import records
from sartor.core.errors import ArtifactError, ConfigError, RoundError
from sartor.models.lora_tensors import Tensors, norm

# the name of the one more number
WEIGHT = "weight of the update"


def pack(tensors: Tensors) -> bytes:
    """The bytes of the tensors, which are equal exactly when the tensors are."""
    head = {name: list(tensors[name].shape) for name in tensors}
    return records.canonical(head) + b"\n" + b"".join(np.asarray(tensors[name], "<f4").tobytes() for name in sorted(tensors))


def unpack(content: bytes) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of such bytes. Raises ArtifactError for what are none."""
    line, _, values = content.partition(b"\n")
    try:
        head = json.loads(line)
        sizes = {name: math.prod(shape) for name, shape in head.items()}
        if len(values) != 4 * sum(sizes.values()) or any(size < 0 for size in sizes.values()):
            raise ValueError(f"{len(values)} bytes of values")
        found, start = {}, 0
        for name in sorted(head):
            found[name] = np.frombuffer(values, "<f4", sizes[name], 4 * start).astype(np.float32).reshape(head[name])
            start += sizes[name]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"these are no tensors of a round: {error}", "get them again from the coordinator") from None
    return found


def digest(content: bytes) -> str:
    """sha256 of packed tensors, hex."""
    return hashlib.sha256(content).hexdigest()


def clipped(tensors: Tensors, clip: float) -> dict[str, npt.NDArray[np.float32]]:
    """The update scaled down to the norm `clip`, if it is longer. Raises ConfigError for values that are not finite."""
    length = norm(tensors)
    if not math.isfinite(length):
        raise ConfigError("the update holds a value that is not finite", "look at the tuning: its loss has diverged")
    factor = min(1.0, clip / length) if length else 1.0
    return {name: (np.asarray(value, np.float64) * factor).astype(np.float32) for name, value in tensors.items()}


def weighted(tensors: Tensors, weight: float) -> dict[str, npt.NDArray[np.float64]]:
    """What goes into the sum. weight: in (0, 1]."""
    scaled = {name: np.asarray(value, np.float64) * weight for name, value in tensors.items()}
    return {**scaled, WEIGHT: np.array([weight], np.float64)}


def mean_of(summed: Tensors) -> dict[str, npt.NDArray[np.float32]]:
    """The weighted mean. Raises RoundError where the weights sum to nothing, which no honest cohort does."""
    total = float(summed[WEIGHT][0])
    if not total > 0:
        raise RoundError(f"the weights of the clients sum to {total}", "begin a new round; a client lies", "shares")
    return {name: (value / total).astype(np.float32) for name, value in summed.items() if name != WEIGHT}
