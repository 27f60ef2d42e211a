"""How much is left of a mean under noise: few clients and many values leave nothing, and that is said before a round."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sartor.federate.privacy.accountant import Budget, calibrated


@dataclass(frozen=True)
class Worth:
    """Of one round. noise_to_signal: norm of the mean's noise over the largest norm that the mean can have, C.

    clients_needed: with so many, and the same fraction of them sharing the noise, the two would be equal.
    """

    clients: int
    values: int
    rounds: int
    budget: Budget
    noise_multiplier: float
    noise_to_signal: float
    clients_needed: int

    def __str__(self) -> str:
        said = (
            f"epsilon {self.budget.epsilon:g} over {self.rounds} rounds of {self.clients} clients needs noise of "
            f"{self.noise_multiplier:.2f} clips: in the mean of {self.values:,} values the noise is "
            f"{_figure(self.noise_to_signal)} times as long as the longest update"
        )
        if self.noise_to_signal <= 1:
            return f"{said}; the mean can be learnt from"
        if self.noise_to_signal <= 10:
            return f"{said}; only what all clients share will be learnt; {self.clients_needed:,} clients would make them equal"
        return (
            f"{said}, so nothing will be learnt from it; {self.clients_needed:,} clients would make them equal: "
            "protect rows instead (example-level DP-SGD in each client), or train fewer values"
        )


def worth(budget: Budget, rounds: int, clients: int, values: int, sharers: int | None = None) -> Worth:
    """What client-level noise would leave. sharers: as in ClientNoise; all clients by default.

    Raises BudgetError, ExtraError as `calibrated` does.
    """
    noise = calibrated(budget, rounds)
    ratio = noise * math.sqrt(values) * math.sqrt(clients / (sharers or clients)) / clients
    return Worth(clients, values, rounds, budget, noise, ratio, math.ceil(ratio * clients))


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
