"""An audit of a run's rounds: canaries of made-up clients, in by coin, looked for in what comes out.

A canary is a direction: values of an update that are no other canary's, with random signs. A client of the audit sends the sum
of those of its canaries whose coins say so, as long as the clip, through the same rounds that tuned the adapter: the clip, the
noise as it is really drawn, the ring, the secure sum, as many rounds (as Andrew et al. 2023, arXiv:2302.03098, do with random
directions, and as the worst case of Nasr et al. 2021, arXiv:2101.04535). How far the shared adapter moved along a canary is its
score; guessing the coins from the scores bounds epsilon from below (`privacy.attacks.audit.one_run`).

What is measured is the mechanism as installed here, not the shipped adapter, which holds no canary. A client has many canaries,
so one is a part of what a client can change: the bound holds for the client's epsilon, and is looser than with one each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sartor.federate.aggregate.modes import Mode
from sartor.federate.privacy.accountant import Budget
from sartor.federate.privacy.attacks import audit
from sartor.federate.privacy.attacks.audit import Audit
from sartor.federate.rounds.manifest import Manifest
from sartor.federate.rounds.task import Learnt
from sartor.federate.tuning.task import Losses
from sartor.models.lora_tensors import Tensors, flat, unflat

LEAST, MOST = 64, 16_384


def canaries_for(claim: Budget, values: int) -> int:
    """As many as can show a tenth more than the claim if every guess is right, where an update has room for them."""
    wanted = 2 * math.ceil(-math.log(1 - audit.CONFIDENCE) * math.exp(min(1.1 * claim.epsilon, 20.0)))
    return max(10, min(max(LEAST, wanted), MOST, values))


@dataclass(frozen=True)
class Canaries:
    """count canaries over an update's values (P,): `signs` (P,), each value's canary `owner` (P,), and the coins `is_in`."""

    owner: NDArray[np.int64]
    signs: NDArray[np.float64]
    is_in: NDArray[np.bool_]

    @classmethod
    def drawn(cls, count: int, values: int, seed: int) -> Canaries:
        """From a seed."""
        source = np.random.default_rng([seed, 1])
        owner = source.permutation(np.arange(values, dtype=np.int64) % count)
        return cls(owner, np.where(source.random(values) < 0.5, 1.0, -1.0), audit.coins(count, seed))

    def sent(self, canaries: Sequence[int], like: Tensors, length: float) -> Tensors:
        """The update of a client that has these canaries: those that are in, together as long as `length`; zeros for none."""
        chosen = np.isin(self.owner, [one for one in canaries if self.is_in[one]])
        whole = np.where(chosen, self.signs, 0.0)
        norm = float(np.linalg.norm(whole))
        return unflat(whole * (length / norm if norm else 0.0), like)

    def scores(self, moved: Tensors) -> NDArray[np.float64]:
        """(count,): how far each canary's direction was gone along."""
        along = np.bincount(self.owner, flat(moved) * self.signs, len(self.is_in))
        return np.asarray(along / np.sqrt(np.bincount(self.owner, minlength=len(self.is_in))))

    def audited(self, moved: Tensors, claim: Budget) -> Audit:
        """What guessing the coins shows."""
        return audit.one_run(self.scores(moved).tolist(), self.is_in.tolist(), claim.delta)


@dataclass
class CanaryTask:
    """A client of the audit: it trains nothing. canaries: which are its own."""

    mode: Mode
    drawn: Canaries
    canaries: Sequence[int]
    losses: dict[int, Losses] = field(default_factory=dict)

    def update(self, manifest: Manifest, shared: Tensors) -> Learnt:
        """See Task: the same in each round that sends the tensors of the first one, and nothing in another."""
        like = self.mode.sent(shared, manifest.number)
        if set(like) != set(self.mode.sent(shared, 1)):
            return Learnt({name: np.zeros_like(value) for name, value in like.items()}, 1)
        return Learnt(self.drawn.sent(self.canaries, like, manifest.rules.clip), 1)
