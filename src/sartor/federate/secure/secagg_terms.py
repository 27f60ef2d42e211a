"""Cohort, threshold, layout and mask graph.

The sparse graph is a circulant one: names on a ring in an order drawn from the seed, each joined with those at k/2
offsets drawn from the seed, to both sides. A random circulant graph of more than log n offsets is an expander with
high probability (Alon and Roichman 1994), so no small group can be cut off from the rest; the offset 1 keeps it in one
piece in any case.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sartor.core.config import is_valid_name
from sartor.core.errors import ArtifactError, ConfigError, RoundError


class Graph:
    """The neighbours of each name. `degree` 0: everyone is everyone's. `seed`: 64 hex digits."""

    def __init__(self, names: Sequence[str], degree: int, seed: str) -> None:
        if degree and (degree % 2 or not 2 <= degree <= most_degree(len(names))):
            raise ConfigError(
                f"the graph's degree is {degree}: of {len(names)} clients it is even and at most "
                f"{most_degree(len(names))}",
                "degree: 0 joins everyone with everyone",
            )
        self._names, self._degree, self._seed = tuple(names), degree, seed

    @cached_property
    def _ring(self) -> tuple[list[str], dict[str, int], list[int]]:
        ring = sorted(self._names, key=self._draw)
        offsets = sorted(range(2, (len(ring) + 1) // 2), key=lambda offset: self._draw(str(offset)))[
            : self._degree // 2 - 1
        ]
        return ring, {name: index for index, name in enumerate(ring)}, [1, *offsets]

    def _draw(self, label: str) -> bytes:
        return hashlib.sha256(f"{self._seed} {label}".encode()).digest()

    def neighbours(self, name: str) -> frozenset[str]:
        """Whom `name` shares masks with; never itself."""
        if not self._degree:
            return frozenset(self._names) - {name}
        ring, positions, offsets = self._ring
        position, count = positions[name], len(ring)
        return frozenset(ring[(position + sign * offset) % count] for offset in offsets for sign in (1, -1))


def most_degree(count: int) -> int:
    """The largest degree of a sparse graph over `count` names."""
    return 2 * ((count - 1) // 2)


def failure_bound(count: int, degree: int, share_threshold: int, vanished: int) -> float:
    """An upper bound on the probability, 0..1, that a round fails where `vanished` of `count` clients do, drawn at
    random.

    It fails where one client has fewer than `share_threshold` holders left: a hypergeometric tail for the `degree`
    neighbours of each, summed over clients. A client that is there is its own holder; the bound leaves that out.
    """
    staying, leaving = count - 1 - vanished, vanished

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    holder_counts = range(max(0, degree - leaving), min(share_threshold - 1, staying, degree) + 1)
    log_total = log_choose(count - 1, degree)
    probabilities = np.exp(
        [log_choose(staying, k) + log_choose(leaving, degree - k) - log_total for k in holder_counts]
    )
    return min(1.0, count * float(probabilities.sum()))


# the largest integer of the ring that is positive
MOST_SUM = (1 << 31) - 1
_DIGEST = re.compile(r"[0-9a-f]{64}")


def least_threshold(cohort_size: int) -> int:
    """The smallest t with t > 2n/3."""
    return 2 * cohort_size // 3 + 1


@dataclass(frozen=True)
class TensorSlot:
    """Where a tensor stands in the vector. `scale`: the value of one unit of the ring; every client's is the same."""

    name: str
    shape: tuple[int, ...]
    scale: float

    @property
    def size(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class SecureSumTerms:
    """cohort: names in order. threshold: how many must stay to the end. degree, seed: of the graph, 0: everyone with
    everyone.

    Raises ConfigError for what can be no sum.
    """

    cohort: tuple[str, ...]
    threshold: int
    layout: tuple[TensorSlot, ...]
    degree: int = 0
    seed: str = "0" * 64

    def __post_init__(self) -> None:
        if not all(map(is_valid_name, self.cohort)) or list(self.cohort) != sorted(set(self.cohort)):
            raise ConfigError("the cohort is not a list of different names in order", "sorted(set(names))")
        if not 1 <= self.threshold <= len(self.cohort):
            raise ConfigError(
                f"the threshold is {self.threshold}, of {len(self.cohort)} clients",
                f"threshold: {least_threshold(len(self.cohort))}",
            )
        if not _DIGEST.fullmatch(self.seed):
            raise ConfigError(f"the graph's seed is {self.seed!r:.80}", "64 hex digits")
        if len({slot.name for slot in self.layout}) != len(self.layout) or not self.size:
            raise ConfigError(
                "two tensors of the layout have one name, or it holds no number", "a name for each tensor"
            )
        for slot in self.layout:
            if not (math.isfinite(slot.scale) and slot.scale > 0 and all(side >= 0 for side in slot.shape)):
                raise ConfigError(
                    f"the tensor {slot.name!r:.80} has the scale {slot.scale}", "a scale above 0: ring.scale_for"
                )
        self.graph  # noqa: B018  a degree that cannot be is found here

    @cached_property
    def graph(self) -> Graph:
        """Who shares masks with whom."""
        return Graph(self.cohort, self.degree, self.seed)

    @cached_property
    def size(self) -> int:
        """Numbers in the vector."""
        return sum(slot.size for slot in self.layout)

    @property
    def max_units(self) -> int:
        """The largest magnitude, in units of the ring, that each client may send: the sum of all of them stays in the
        ring.
        """
        return MOST_SUM // len(self.cohort)

    @property
    def holders(self) -> int:
        """How many hold shares of one client's secrets, the client itself among them."""
        return self.degree + 1 if self.degree else len(self.cohort)

    @property
    def share_threshold(self) -> int:
        """How many shares rebuild a secret: the same fraction of the holders as `threshold` is of the cohort, rounded
        up.
        """
        return -(-self.threshold * self.holders // len(self.cohort))

    @cached_property
    def share_indices(self) -> Mapping[str, int]:
        """The place of each client's shares, from 1."""
        return {name: index for index, name in enumerate(self.cohort, 1)}

    def as_json(self) -> dict[str, Any]:
        """As a manifest says it."""
        layout = [asdict(slot) for slot in self.layout]
        # not asdict: it copies the cohort name by name
        return {
            "cohort": self.cohort,
            "threshold": self.threshold,
            "layout": layout,
            "degree": self.degree,
            "seed": self.seed,
        }

    @classmethod
    def of(cls, payload: Any) -> SecureSumTerms:
        """What a manifest says. Raises ArtifactError for what is of another form."""
        try:
            layout = tuple(
                TensorSlot(str(item["name"]), tuple(map(_whole, item["shape"])), _number(item["scale"]))
                for item in payload["layout"]
            )
            terms = cls(
                tuple(payload["cohort"]),
                _whole(payload["threshold"]),
                layout,
                _whole(payload["degree"]),
                str(payload["seed"]),
            )
        except (TypeError, KeyError, ValueError, AttributeError, ConfigError) as error:
            raise ArtifactError(f"the terms of a sum are malformed: {error}", "look at who sends them") from None
        return terms


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r:.40} is no whole number")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{value!r:.40} is no number")
    return float(value)


@dataclass(frozen=True)
class SecureSumPolicy:
    """What a client demands, whatever the coordinator signs. `least_degree`: of a graph in which not everyone is
    joined.

    The least cohort is 3: of two, each subtracts its own vector from the sum and has the other's.
    """

    least_cohort: int = 3
    least_degree: int = 64

    def check(self, terms: SecureSumTerms, name: str, pinned: Iterable[str]) -> None:
        """Raise RoundError for a sum that this client, called `name`, will not take part in. `pinned`: whose keys it
        has.
        """
        count = len(terms.cohort)
        if count < self.least_cohort:
            raise RoundError(
                f"the cohort has {count} clients; this client takes part among {self.least_cohort} or more",
                f"sartor federate coordinator ... --clients with {self.least_cohort} names or more",
                "cohort",
            )
        if name not in terms.share_indices:
            raise RoundError(
                f"the cohort does not name {name}", "nothing is to be done: the round is for others", "cohort"
            )
        if strangers := sorted(set(terms.cohort) - set(pinned)):
            named = ", ".join(strangers[:3]) + " and others" * (len(strangers) > 3)
            raise RoundError(
                f"the cohort names {named}, whose keys are not pinned here",
                "enrol them, if you know them",
                "cohort",
            )
        if 3 * terms.threshold <= 2 * count:
            raise RoundError(
                f"the threshold is {terms.threshold} of {count}; at or below 2/3 two lists could each find a quorum",
                f"threshold: {least_threshold(count)} or more",
                "threshold",
            )
        if terms.degree and terms.degree < self.least_degree:
            raise RoundError(
                f"each client has {terms.degree} neighbours; this client wants {self.least_degree} or more",
                f"degree: {self.least_degree}, or 0 for everyone with everyone",
                "cohort",
            )


@dataclass(frozen=True)
class Round:
    """One sum. `digest`: of the signed manifest, which every key, mask and signature is bound to. coordinator: its
    name.
    """

    digest: str
    terms: SecureSumTerms
    coordinator: str

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.digest) or self.coordinator in self.terms.share_indices:
            raise ConfigError(
                "a round has the digest of its manifest, and a coordinator outside the cohort", "see Manifest"
            )
