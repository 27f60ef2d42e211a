"""Canary exposure (Carlini et al. 2019, arXiv:1802.08232): a made-up row with a secret, among rows with other secrets.

Exposure is log2 |R| - log2 rank, where R are all candidates, the canary with them, ordered by loss. A model that never saw the
canary gives it any rank, so an exposure of x or more has a chance of 2^-x. The most that can be seen is log2 |R|.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sartor.core.errors import ConfigError


@dataclass(frozen=True)
class Exposure:
    """Of one canary, in bits. repeats: how often it was trained on; chance: of so much or more where it was not."""

    name: str
    repeats: int
    bits: float
    most_bits: float
    chance: float

    def __str__(self) -> str:
        return f"canary {self.name}, trained on {self.repeats} times: {self.bits:.1f} of at most {self.most_bits:.1f} bits"


def exposure(name: str, repeats: int, loss: float, candidates: Sequence[float]) -> Exposure:
    """candidates: losses of the same row with other secrets, drawn as the canary's was. Ties count against the model.

    Raises ConfigError without candidates.
    """
    if not len(candidates):
        raise ConfigError(f"canary {name!r} has no candidates to be compared with", "255 other secrets show up to 8 bits")
    rank, count = 1 + int((np.asarray(candidates, float) < loss).sum()), len(candidates) + 1
    return Exposure(name, repeats, math.log2(count / rank), math.log2(count), rank / count)
