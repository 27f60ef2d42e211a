"""Terms of a secure sum: cohort, threshold, layout and mask graph.

The sparse graph is a circulant graph. Names stand on a ring in an order drawn from the seed. Each is joined with those
at k/2 offsets, drawn from the seed too, on both sides. A random circulant graph of more than log n offsets is an
expander with high probability (Alon and Roichman 1994), so no small group can be cut off from the rest. The offset 1
keeps the graph connected in any case.
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
    """Mask graph: the neighbours of each name.

    degree: number of neighbours; 0 joins everyone with everyone.
    seed: 64 hex digits.
    Raises ConfigError for a degree that is odd or too large.
    """

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
        """Return the clients that `name` shares masks with; never itself."""
        if not self._degree:
            return frozenset(self._names) - {name}
        ring, positions, offsets = self._ring
        position, count = positions[name], len(ring)
        return frozenset(ring[(position + sign * offset) % count] for offset in offsets for sign in (1, -1))


def most_degree(count: int) -> int:
    """Return the largest degree of a sparse graph over `count` names."""
    return 2 * ((count - 1) // 2)


def failure_bound(count: int, degree: int, share_threshold: int, vanished: int) -> float:
    """Return an upper bound on the probability that a round fails if `vanished` random clients do.

    It fails if one client has fewer than `share_threshold` holders left. With n = `count`, d = `degree`, v =
    `vanished`, t = `share_threshold`, the bound is a union over clients of a hypergeometric tail:

        n sum_{k < t} C(n - 1 - v, k) C(v, d - k) / C(n - 1, d)

    at most 1. A client that stays is its own holder; the bound leaves that out.
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


# largest positive integer of the ring
MOST_SUM = (1 << 31) - 1
_DIGEST = re.compile(r"[0-9a-f]{64}")


def least_threshold(cohort_size: int) -> int:
    """Return the smallest t with t > 2n/3."""
    return 2 * cohort_size // 3 + 1


def default_colluders(cohort_size: int) -> int:
    """Return how many clients are assumed to pool their secrets, if nothing is stated: max(1, floor((n - 1) / 3)).

    Fewer than a third, as the secure sum assumes too; at least one, since each client can subtract its own noise.
    """
    return max(1, (cohort_size - 1) // 3)


@dataclass(frozen=True)
class TensorSlot:
    """Position of a tensor in the vector.

    scale: value of one unit of the ring, the same for every client.
    """

    name: str
    shape: tuple[int, ...]
    scale: float

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class SecureSumTerms:
    """Terms of a secure sum.

    cohort: names, sorted.
    threshold: number of clients that must stay to the end.
    degree, seed: of the graph; degree 0 joins everyone with everyone.
    Raises ConfigError for terms that allow no sum.
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
                    f"the tensor {slot.name!r:.80} has the scale {slot.scale}",
                    "give it a scale above 0: fixed_point.scale_for(largest, clients)",
                )
        self.graph  # noqa: B018  a degree that cannot be is found here

    @cached_property
    def graph(self) -> Graph:
        """Graph of the clients that share masks."""
        return Graph(self.cohort, self.degree, self.seed)

    @cached_property
    def size(self) -> int:
        """Number of values in the vector, S."""
        return sum(slot.size for slot in self.layout)

    @property
    def max_units(self) -> int:
        """Largest magnitude, in units of the ring, that each client may send; the sum then stays in the ring."""
        return MOST_SUM // len(self.cohort)

    @property
    def holders(self) -> int:
        """Number of holders of one client's shares, h, the client itself among them."""
        return self.degree + 1 if self.degree else len(self.cohort)

    @property
    def share_threshold(self) -> int:
        """Number of shares that rebuild a secret: ceil(t h / n), the threshold's fraction of the holders."""
        return -(-self.threshold * self.holders // len(self.cohort))

    @cached_property
    def share_indices(self) -> Mapping[str, int]:
        """Index of each client's shares, from 1."""
        return {name: index for index, name in enumerate(self.cohort, 1)}

    def as_json(self) -> dict[str, Any]:
        """Return the terms as a manifest holds them."""
        layout = [asdict(slot) for slot in self.layout]
        # asdict would copy the cohort name by name
        return {
            "cohort": self.cohort,
            "threshold": self.threshold,
            "layout": layout,
            "degree": self.degree,
            "seed": self.seed,
        }

    @classmethod
    def of(cls, payload: Any) -> SecureSumTerms:
        """Return the terms from a manifest. Raises ArtifactError for a malformed payload."""
        try:
            layout = tuple(
                TensorSlot(str(item["name"]), tuple(map(_whole, item["shape"])), _number(item["scale"]))
                for item in payload["layout"]
            )
            terms = cls(
                cohort=tuple(payload["cohort"]),
                threshold=_whole(payload["threshold"]),
                layout=layout,
                degree=_whole(payload["degree"]),
                seed=str(payload["seed"]),
            )
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError, ConfigError) as error:
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
    """Minimum terms that a client demands, whatever the coordinator signs.

    least_cohort: 3, since of two clients each subtracts its own vector from the sum and has the other's.
    least_degree: least degree of a graph in which not everyone is joined.
    """

    least_cohort: int = 3
    least_degree: int = 64

    def check(self, terms: SecureSumTerms, name: str, pinned: Iterable[str]) -> None:
        """Raise RoundError for a sum in which this client, called `name`, does not take part.

        pinned: names whose keys it has.
        """
        count = len(terms.cohort)
        if count < self.least_cohort:
            raise RoundError(
                f"the cohort has {count} clients; this client takes part among {self.least_cohort} or more",
                f"sartor federate coordinator ... --clients with {self.least_cohort} names or more; or a smaller "
                "--min-cohort of this client, if its owner trusts the others",
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
    """One secure sum.

    digest: of the signed manifest; every key, mask and signature is bound to it.
    coordinator: name of the coordinator.
    """

    digest: str
    terms: SecureSumTerms
    coordinator: str

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.digest) or self.coordinator in self.terms.share_indices:
            raise ConfigError(
                "a round has the digest of its manifest, and a coordinator outside the cohort",
                "take Manifest.digest for the digest, and name a coordinator that is no client of the round",
            )
