"""What is said of a round where all updates are seen, as in a simulation: a line of the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sartor.federate.aggregate import exactness
from sartor.federate.aggregate.modes import Combined
from sartor.federate.aggregate.tensors__updates import Update, mean
from sartor.federate.rounds import tensors as arrays
from sartor.federate.rounds.manifest import Rules
from sartor.federate.rounds.task import Learnt
from sartor.models.lora_tensors import Tensors, norm, plus


@dataclass(frozen=True)
class Line:
    """One round. losses: mean over clients, of their first and last updates. clipped: clients whose update was too long; these
    are None where updates stay unseen, as over a network.

    exactness_error: of the adapter that the mean makes, before the ring's rounding and noise, from the mean of the clients'
    products, relative (`aggregate.exactness`); over a network it has the ring's rounding in it, and is None under noise
    (`canaries`). quantisation_error: of the mean by the ring's rounding, over the mean's norm; None under noise and over a
    network. uploaded_bytes: of all clients. epsilon: spent with this round; None without privacy; of the worst client where
    each has a budget of its own, which epsilons has. verdicts: of a robust rule.
    """

    round: int
    clients: int
    clipped: int | None
    update_norm: float
    exactness_error: float | None
    quantisation_error: float | None
    uploaded_bytes: int
    loss_first: float | None
    loss_last: float | None
    epsilon: float | None = None
    epsilons: Mapping[str, float] = field(default_factory=dict)
    verdicts: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """A line of log.jsonl, and of the journal."""
        return asdict(self)


def seen(learnt: Mapping[str, Learnt], rules: Rules) -> list[Update]:
    """The updates as they are weighed and summed: clipped, and none of more examples than count."""
    return [
        Update(name, arrays.clipped(one.tensors, rules.clip), min(one.examples, rules.most_examples))
        for name, one in learnt.items()
    ]


def clipped_of(learnt: Mapping[str, Learnt], rules: Rules) -> int:
    """How many updates are longer than the clip."""
    return sum(norm(one.tensors) > rules.clip for one in learnt.values())


def exactness_error(shared: Tensors, updates: list[Update], seed: int) -> float:
    """How far the adapter of the mean change is from the mean of the clients' products, on a canary of this seed."""
    canary = exactness.draw(shared, seed)
    answers = [Update(one.client, canary.responses(plus(shared, one.tensors)), one.examples) for one in updates]
    return exactness.exactness_error(canary, Combined(plus(shared, mean(updates))), mean(answers))


def rounding_error(found: Tensors, updates: list[Update]) -> float:
    """The distance of the mean that came out of the ring from the mean that went in, over its norm."""
    wanted = mean(updates)
    length = norm(wanted)
    return norm(plus(wanted, found, -1.0)) / length if length else 0.0
