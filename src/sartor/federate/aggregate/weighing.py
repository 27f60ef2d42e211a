"""Weights by examples under a secure sum: each sends tensors times its weight, and the weight; the sums give the mean.

sum(w_i u_i) / sum(w_i), where w_i = examples / most. How many examples a client has is in its own upload only, which nobody
sees. Where noise is added for privacy all weights are equal: the noise is fitted to what one client can change at most, and the
sum of the weights would be a second thing that a client changes.
"""

from __future__ import annotations

import numpy as np

from sartor.core.errors import ConfigError, InputError
from sartor.federate.aggregate.tensors import Array, Tensors

WEIGHT = "weight"


def weighted(upload: Tensors, examples: int, most: int) -> dict[str, Array]:
    """What a client puts into the sum. most: the examples that the manifest lets a client count at most; more count as these.

    So a weight is in (0, 1], and norms do not grow. Raises ConfigError for counts below 1.
    """
    if examples < 1 or most < 1:
        raise ConfigError(f"{examples} examples of at most {most}; both must be at least 1", "leave an empty client out")
    share = min(examples, most) / most
    scaled = {name: (value.astype(np.float64) * share).astype(value.dtype) for name, value in upload.items()}
    return {**scaled, WEIGHT: np.array([share], np.float32)}


def mean_of(summed: Tensors) -> dict[str, Array]:
    """The weighted mean, from the sum of what clients put in. Raises InputError where the sum of the weights is not above 0."""
    total = float(summed[WEIGHT][0])
    if not total > 0:
        raise InputError(f"the weights of this round sum to {total}", "give the round up: no client was in the sum")
    return {name: (value.astype(np.float64) / total).astype(value.dtype) for name, value in summed.items() if name != WEIGHT}
