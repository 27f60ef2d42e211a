"""Privacy accountant: the budget on disk, and the utility that remains under noise.

Renyi differential privacy (Mironov 2017, arXiv:1702.07476), computed by Google's dp-accounting. A release is a
Gaussian mechanism of a noise multiplier z, the standard deviation over the most that one client, or row, can change.
It may use a Poisson sample and may be repeated. Neighbouring data sets differ by the presence of one client, or row.
For k releases without sampling at order alpha > 1:

    rdp(alpha) = k alpha / (2 z^2)                                               (corollary 3, proposition 1)
    epsilon(delta) <= min over alpha of rdp(alpha) + log(1 / delta) / (alpha - 1)    (proposition 3)

dp-accounting uses a tighter conversion than proposition 3. The account is written before the noise is used, never
after:

    {"schema": 1, "kind": "privacy-account", "budget": {"epsilon": 8.0, "delta": 1e-05},
     "spent": [{"name": "round-1", "noise_multiplier": 1.1, "fraction": 1.0, "times": 1}]}

Sampling amplifies privacy only towards those who do not know who was drawn. A coordinator that invites clients knows
it. Rounds are therefore spent with fraction 1, unless clients draw in secret whether they take part.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ArtifactError, BudgetError, ConfigError, ConflictError, missing_package
from sartor.core.filesystem import write_file_atomic

SCHEMA, KIND = 1, "privacy-account"
MOST_TIMES = 10_000_000
# Renyi orders alpha for a Poisson-sampled Gaussian. dp-accounting's own set is finer, but below 2 its series does not
# converge for large sampling fractions. Any set of orders gives a valid bound; this one's is less than 1 % higher.
SAMPLED_ORDERS = [
    *(tenths / 10 for tenths in range(20, 60)),
    *(halves / 2 for halves in range(12, 22)),
    *range(11, 64),
    128,
    512,
]


@dataclass(frozen=True)
class PrivacyBudget:
    """Limit on what all releases together may reveal of one client, or row: (epsilon, delta)."""

    epsilon: float = option(REQUIRED, "above 0; below 1 is strong, above 10 says little")
    delta: float = option(
        1e-5, "chance that epsilon does not hold, 0..1; below one over the number of those who are protected"
    )

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf and 0 < self.delta < 1):
            problem = f"epsilon is {self.epsilon}, delta {self.delta}; epsilon must be above 0 and delta in 0..1"
            raise ConfigError(problem, "epsilon: 8, delta: 1.0e-5")


@dataclass(frozen=True)
class Spending:
    """One release, or `times` equal ones.

    name: name of what was released.
    fraction: probability, in (0, 1], with which each client or row is drawn into it, independently.
    """

    name: str
    noise_multiplier: float
    fraction: float = 1.0
    times: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.noise_multiplier < math.inf and 0 < self.fraction <= 1 and 1 <= self.times <= MOST_TIMES):
            problem = (
                f"{self.name}: noise_multiplier {self.noise_multiplier}, fraction {self.fraction}, times {self.times}"
            )
            raise ConfigError(problem, f"noise_multiplier at least 0, fraction in 0..1, times 1 to {MOST_TIMES:,}")


def epsilon_of(spent: Sequence[Spending], delta: float) -> float:
    """Return the epsilon of all these releases together; infinite where one has no noise.

    Raises ExtraError without dp-accounting.
    """
    if any(not spending.noise_multiplier for spending in spent):
        return math.inf
    if not spent:
        return 0.0
    try:
        import dp_accounting
    except ImportError:
        raise missing_package("dp-accounting", "federated") from None
    times: Counter[tuple[float, float]] = Counter()
    for spending in spent:
        times[spending.noise_multiplier, spending.fraction] += spending.times
    is_sampled = any(fraction < 1 for _, fraction in times)
    accountant = dp_accounting.rdp.RdpAccountant(SAMPLED_ORDERS if is_sampled else None)
    for (noise, fraction), count in times.items():
        event = dp_accounting.GaussianDpEvent(noise)
        accountant.compose(event if fraction == 1 else dp_accounting.PoissonSampledDpEvent(fraction, event), count)
    return float(accountant.get_epsilon(delta))


def calibrated(budget: PrivacyBudget, times: int, fraction: float = 1.0, spent: Sequence[Spending] = ()) -> float:
    """Return the least noise multiplier with which `times` more releases stay within the budget.

    It is found by bisection, to a relative 0.001 (absolute below 1) and never too small. spent: releases that count
    already. Raises BudgetError where no noise is enough.
    """

    def fits(noise: float) -> bool:
        return epsilon_of([*spent, Spending("next", noise, fraction, times)], budget.delta) <= budget.epsilon

    high = 1.0
    while not fits(high):
        high *= 2
        if high > 1e6:
            problem = (
                f"epsilon {epsilon_of(spent, budget.delta):.3g} of {budget.epsilon:g} is spent; no noise is enough "
                "for more"
            )
            raise BudgetError(problem, "release what is there, or begin with other data and a new budget")
    # invariant: `high` fits; `low` does not, or is 0
    low = 0.0 if high == 1.0 else high / 2
    while high - low > 1e-3 * min(1.0, high):
        middle = (low + high) / 2
        low, high = (low, middle) if middle > 0 and fits(middle) else (middle, high)
    return high


def most_times(budget: PrivacyBudget, spending: Spending, spent: Sequence[Spending] = ()) -> int:
    """Return how many releases like this the budget still allows after `spent`; 0 if none."""

    def fits(times: int) -> bool:
        return epsilon_of([*spent, replace(spending, times=times)], budget.delta) <= budget.epsilon

    return _most(fits)


def _most(fits: Callable[[int], bool]) -> int:
    if not fits(1):
        return 0
    high = 2
    while high <= MOST_TIMES and fits(high):
        high *= 2
    low, high = high // 2, min(high, MOST_TIMES + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class Account:
    """Account of a budget in a file, created where there is none. Several processes may use one.

    Raises ArtifactError for a file that is no account. Raises ConflictError for an account with another budget: what
    was promised to the people in the data does not change later.
    """

    def __init__(self, file: Path, budget: PrivacyBudget) -> None:
        self.file, self.budget = file, budget
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{file}.lock")
        with self._lock:
            if file.exists():
                self.spent()
            else:
                self._write([])

    def spent(self) -> list[Spending]:
        """Return the recorded releases, in order.

        Raises ArtifactError for a file that is no account, ConflictError for an account with another budget.
        """
        try:
            fields = json.loads(self.file.read_text(encoding="utf-8"))
            if (fields["schema"], fields["kind"]) != (SCHEMA, KIND):
                raise ValueError("another schema or kind")
            budget, spent = PrivacyBudget(**fields["budget"]), [Spending(**item) for item in fields["spent"]]
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise ArtifactError(
                f"{self.file} is no privacy account: {error!r}", f"cp BACKUP/{self.file.name} {self.file}"
            ) from None
        if budget != self.budget:
            terms = f"epsilon {budget.epsilon:g}, delta {budget.delta:g}"
            raise ConflictError(f"{self.file} was begun with {terms}; asked is {self.budget}", f"keep {terms}")
        return spent

    def epsilon(self) -> float:
        """Return the epsilon spent so far."""
        return epsilon_of(self.spent(), self.budget.delta)

    def remaining(self, spending: Spending) -> int:
        """Return how many more releases like this the budget allows."""
        return most_times(self.budget, spending, self.spent())

    def spend(self, spending: Spending) -> float:
        """Record a release before its noise is drawn, and return the epsilon with it.

        The same release under the same name costs once, so a round resumed after a kill is not paid for twice. Its
        noise must then be the same too, or it needs another name. Raises ConflictError for another release under a
        recorded name, and BudgetError beyond the budget, with what would fit. Nothing is written in either case.
        """
        with self._lock:
            spent = self.spent()
            if recorded := [entry for entry in spent if entry.name == spending.name]:
                if recorded != [spending]:
                    raise ConflictError(
                        f"{spending.name} was spent as {recorded[0]}; asked is {spending}",
                        f"name={spending.name + '-2'!r} for the Spending that differs",
                    )
                return epsilon_of(spent, self.budget.delta)
            epsilon = epsilon_of([*spent, spending], self.budget.delta)
            if epsilon > self.budget.epsilon:
                raise self._over(spending, epsilon, spent)
            self._write([*spent, spending])
            return epsilon

    def _over(self, spending: Spending, epsilon: float, spent: Sequence[Spending]) -> BudgetError:
        current, max_epsilon = epsilon_of(spent, self.budget.delta), self.budget.epsilon
        budget = f"the budget is {max_epsilon:g} at delta {self.budget.delta:g}"
        problem = f"{spending.name} would bring epsilon from {current:.3g} to {epsilon:.3g}; {budget}"
        if fewer := most_times(self.budget, spending, spent):
            return BudgetError(problem, f"times={fewer} of {spending.times}, with the same noise")
        try:
            noise = calibrated(self.budget, spending.times, spending.fraction, spent)
        except BudgetError as error:
            return BudgetError(problem, error.remedy)
        return BudgetError(
            problem,
            f"noise_multiplier={noise:.3f} (asked was {spending.noise_multiplier:g}), or release what is there",
        )

    def _write(self, spent: Sequence[Spending]) -> None:
        fields: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": KIND,
            "budget": asdict(self.budget),
            "spent": list(map(asdict, spent)),
        }
        write_file_atomic(self.file, json.dumps(fields, indent=1).encode() + b"\n")


@dataclass(frozen=True)
class NoiseUtility:
    """Noise of one round, compared with the signal.

    noise_to_signal: norm of the mean's noise over the largest norm that the mean can have, the clip C.
    clients_needed: number of clients, with the same fraction of them sharing the noise, that makes the two norms
    equal.
    """

    clients: int
    values: int
    rounds: int
    budget: PrivacyBudget
    noise_multiplier: float
    noise_to_signal: float
    clients_needed: int

    def __str__(self) -> str:
        ratio = self.noise_to_signal
        times = f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"
        text = (
            f"epsilon {self.budget.epsilon:g} over {self.rounds} rounds of {self.clients} clients needs noise of "
            f"{self.noise_multiplier:.2f} clips: in the mean of {self.values:,} values the noise is "
            f"{times} times as long as the longest update"
        )
        if self.noise_to_signal <= 1:
            return f"{text}; the mean can be learnt from"
        if self.noise_to_signal <= 10:
            return (
                f"{text}; only what all clients share will be learnt; {self.clients_needed:,} clients would make them "
                "equal"
            )
        return (
            f"{text}, so nothing will be learnt from it; {self.clients_needed:,} clients would make them equal: "
            "protect rows instead (example-level DP-SGD in each client), or train fewer values"
        )


def noise_utility(
    budget: PrivacyBudget, rounds: int, clients: int, values: int, sharers: int | None = None
) -> NoiseUtility:
    """Compute the signal that remains under client-level noise.

    values: P, numbers of an update. sharers: t, as in ClientNoise; all clients by default. Raises BudgetError,
    ExtraError as `calibrated` does.
    """
    noise = calibrated(budget, rounds)
    # n clients, t sharers: each adds sigma^2 = (z C)^2 / t, so the mean of P values has noise of norm
    # sqrt(P) z C sqrt(n / t) / n; the ratio divides it by C
    ratio = noise * math.sqrt(values) * math.sqrt(clients / (sharers or clients)) / clients
    return NoiseUtility(
        clients,
        values,
        rounds,
        budget,
        noise_multiplier=noise,
        noise_to_signal=ratio,
        clients_needed=math.ceil(ratio * clients),
    )
