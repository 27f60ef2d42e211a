"""Who shares masks and secrets with whom: everyone with everyone, or a k-regular graph for large cohorts (Bell et al. 2020).

The sparse graph is a circulant one: names on a ring in an order drawn from the seed, each joined with those at k/2 offsets
drawn from the seed, to both sides. A random circulant graph of more than log n offsets is an expander with high probability
(Alon and Roichman 1994), so no small group can be cut off from the rest; the offset 1 keeps it in one piece in any case.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from sartor.core.errors import ConfigError


class Graph:
    """The neighbours of each name. `degree` 0: everyone is everyone's. `seed`: 64 hex digits."""

    def __init__(self, names: Sequence[str], degree: int, seed: str) -> None:
        if degree and (degree % 2 or not 2 <= degree <= most_degree(len(names))):
            raise ConfigError(
                f"the graph's degree is {degree}: of {len(names)} clients it is even and at most {most_degree(len(names))}",
                "degree: 0 joins everyone with everyone",
            )
        self._names, self._degree, self._seed = tuple(names), degree, seed

    @cached_property
    def _ring(self) -> tuple[list[str], dict[str, int], list[int]]:
        ring = sorted(self._names, key=self._drawn)
        offsets = sorted(range(2, (len(ring) + 1) // 2), key=lambda offset: self._drawn(str(offset)))[: self._degree // 2 - 1]
        return ring, {name: place for place, name in enumerate(ring)}, [1, *offsets]

    def _drawn(self, what: str) -> bytes:
        return hashlib.sha256(f"{self._seed} {what}".encode()).digest()

    def neighbours(self, name: str) -> frozenset[str]:
        """Whom `name` shares masks with; never itself."""
        if not self._degree:
            return frozenset(self._names) - {name}
        ring, places, offsets = self._ring
        place, count = places[name], len(ring)
        return frozenset(ring[(place + sign * offset) % count] for offset in offsets for sign in (1, -1))


def most_degree(count: int) -> int:
    """The largest degree of a sparse graph over `count` names."""
    return 2 * ((count - 1) // 2)


def failure_bound(count: int, degree: int, share_threshold: int, vanished: int) -> float:
    """An upper bound on the probability, 0..1, that a round fails where `vanished` of `count` clients do, drawn at random.

    It fails where one client has fewer than `share_threshold` holders left: a hypergeometric tail for the `degree` neighbours
    of each, summed over clients. A client that is there is its own holder; the bound leaves that out.
    """
    staying, leaving = count - 1 - vanished, vanished

    def log_choose(of: int, some: int) -> float:
        return math.lgamma(of + 1) - math.lgamma(some + 1) - math.lgamma(of - some + 1)

    left = range(max(0, degree - leaving), min(share_threshold - 1, staying, degree) + 1)
    whole = log_choose(count - 1, degree)
    each = np.exp([log_choose(staying, some) + log_choose(leaving, degree - some) - whole for some in left])
    return min(1.0, count * float(each.sum()))
