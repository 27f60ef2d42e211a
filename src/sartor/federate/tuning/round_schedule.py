"""Schedule of LoRA rounds, and their metrics.

A client adds R_i = (B_i A_i - B A) X (out, K) of its clipped update: the change of the shared adapter's response. X is
the probe of `aggregation.draw`, from the recipe's seed and the round's number. The quotient of sums sum_i w_i R_i /
sum_i w_i is the mean of products that no server sees. The coordinator compares the new adapter with it. Both have
passed through the ring, so the error includes the ring's rounding. In the exact modes R_i is linear in the update: its
sum reveals nothing that the sum of the updates does not. Under noise no client sends a response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sartor.core.config import REQUIRED, option
from sartor.federate import aggregation
from sartor.federate import updates as arrays
from sartor.federate.aggregation import PREFIX, Combined, ExactnessProbe
from sartor.federate.privacy.accountant import Account, PrivacyBudget, epsilon_of
from sartor.federate.privacy.client_noise import noise_of, values_of, without_collusion
from sartor.federate.recipe import MODES, ModeName
from sartor.federate.robust_aggregation import AnyRule, Pooled
from sartor.federate.rounds.round_coordinator import RoundPlan
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.round_manifest import LocalUpdate, Manifest, SideTensor, UpdateRules
from sartor.federate.updates import Update, mean
from sartor.models.lora_tensors import A, Array, B, Tensors, add_changes, norm

# K, columns of X: enough for an estimate, and half a percent of the upload of a model of 100 M weights
_COLUMNS = 2
# bound for a module without trained tensors, whose response does not change
_LEAST = 1e-9


def of_round(shared: Tensors, seed: int, number: int) -> ExactnessProbe:
    """Return the probe of a round, with inputs X of shape (in, K), K = 2; seed: the recipe's."""
    return aggregation.draw(shared, seed + number, columns=_COLUMNS)


def side_tensors(canary: ExactnessProbe, shared: Tensors, trained: Tensors, clip: float) -> list[SideTensor]:
    """Return the responses that a round asks for, one a module with its shape (out, K) and a bound.

    bound: largest magnitude for an update of norm `clip`, so ||dA||, ||dB|| <= clip. trained: the tensors that change.
    For a column x of X:

        ||dB A x|| <= clip ||A x||,   ||B dA x|| <= clip ||B||_F ||x||,   ||dB dA x|| <= clip^2 ||x||
    """
    tensors = []
    for module, inputs in canary.inputs.items():
        a, b = shared[module + A].astype(np.float64), shared[module + B].astype(np.float64)
        bound, longest = 0.0, float(np.linalg.norm(inputs, axis=0).max())
        if module + B in trained:
            bound += clip * float(np.linalg.norm(a @ inputs, axis=0).max())
        if module + A in trained:
            bound += clip * norm({"": b}) * longest
        if {module + A, module + B} <= set(trained):
            bound += clip**2 * longest
        # slightly more, as responses are rounded to float32
        tensors.append(SideTensor(PREFIX + module, (b.shape[0], _COLUMNS), max(bound, _LEAST) * (1 + 1e-5)))
    return tensors


def responses(manifest: Manifest, shared: Tensors, change: Tensors, seed: int) -> dict[str, Array]:
    """Return what a client adds to the sum besides its change: R_i, (out, K) for each module of the probe.

    change: tensors in the shapes of the upload. Empty if the round does not ask for it.
    """
    if not any(slot.name.startswith(PREFIX) for slot in manifest.terms.layout):
        return {}
    canary = of_round(shared, seed, manifest.number)
    changed = canary.responses(add_changes(shared, arrays.clipped(change, manifest.rules.clip)))
    return add_changes(changed, canary.responses(shared), -1.0)


def error_of(shared: Tensors, mean: Tensors, seed: int, number: int) -> float | None:
    """Return the relative distance of the new adapter from the mean of the clients' products.

    mean: of the updates and, under the probe's names, of the responses, shape (out, K). None if no responses were
    requested.
    """
    canary = of_round(shared, seed, number)
    if not all(PREFIX + module in mean for module in canary.inputs):
        return None
    expected = add_changes(canary.responses(shared), mean)
    return aggregation.exactness_error(canary, Combined(add_changes(shared, mean)), expected)


@dataclass(frozen=True)
class RoundMetrics:
    """Metrics of one round.

    clipped: number of clients whose update was longer than the clip.
    loss_first, loss_last: means over clients, of their first and last updates; like `clipped` None where updates stay
    unseen, as over a network.
    exactness_error: relative distance of the new adapter, before the ring's rounding and noise, from the mean of the
    clients' products (`aggregation.exactness_error`); over a network it includes the ring's rounding, and is None
    under noise.
    quantisation_error: error of the mean by the ring's rounding, over the mean's norm; None under noise and over a
    network.
    uploaded_bytes: of all clients.
    epsilon: spent with this round; None without privacy; of the worst client where each has a budget of its own.
    epsilon_without_collusion: of noise in the secure sum, if none of the assumed colluders is one; else None.
    epsilons: of each client where each has a budget of its own.
    verdicts: of a robust rule, and of clients that declined.
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
    epsilon_without_collusion: float | None = None
    epsilons: Mapping[str, float] = field(default_factory=dict)
    verdicts: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the metrics as a line of log.jsonl, and of the journal."""
        return asdict(self)


def weighted_updates(local_updates: Mapping[str, LocalUpdate], rules: UpdateRules) -> list[Update]:
    """Return the updates as they are weighted and summed: clipped, with at most `most_examples` examples each."""
    return [
        Update(name, arrays.clipped(update.tensors, rules.clip), min(update.examples, rules.most_examples))
        for name, update in local_updates.items()
    ]


def clipped_of(local_updates: Mapping[str, LocalUpdate], rules: UpdateRules) -> int:
    """Return the number of updates that are longer than the clip."""
    return sum(norm(update.tensors) > rules.clip for update in local_updates.values())


def exactness_error(shared: Tensors, updates: list[Update], seed: int) -> float:
    """Return the relative distance of the new adapter from the mean of the clients' products.

    It is measured with a probe of this seed; the updates have the shapes of `shared`, for the trained tensors.
    """
    canary = aggregation.draw(shared, seed)
    answers = [
        Update(update.client, canary.responses(add_changes(shared, update.tensors)), update.examples)
        for update in updates
    ]
    return aggregation.exactness_error(canary, Combined(add_changes(shared, mean(updates))), mean(answers))


def rounding_error(ring_mean: Tensors, updates: list[Update]) -> float:
    """Return ||ring mean - exact mean|| / ||exact mean||; the means have the shapes of the updates."""
    exact_mean = mean(updates)
    length = norm(exact_mean)
    return norm(add_changes(exact_mean, ring_mean, -1.0)) / length if length else 0.0


@dataclass(frozen=True)
class LoraOptions:
    """Options of the rounds of the task `lora` that differ by round or are the coordinator's alone."""

    mode: ModeName = option(REQUIRED, "what clients train and send")
    seed: int = option(0, "the recipe's: of the canary")
    privacy: PrivacyBudget | None = option(None, "what the adapter may tell of one client")
    robust: AnyRule | None = option(None, "of inspectable rounds: how the updates become one")


class Observer(Protocol):
    """Source of the metrics that only those who see every update know, as in a simulation."""

    def metrics(self, manifest: Manifest, shared: Tensors, mean: Tensors) -> Mapping[str, Any]:
        """Return fields of RoundMetrics, which replace the coordinator's; mean: of the updates."""
        ...


class LoraSchedule:
    """Round schedule of the task `lora`.

    plan: common part of all rounds.
    account: file in which spent privacy is recorded.
    observer: of a simulation; its rounds sum no responses of a probe, as it measures the updates themselves.
    """

    def __init__(
        self,
        options: LoraOptions,
        plan: RoundPlan,
        journal: RoundJournal,
        account: Path,
        observer: Observer | None = None,
    ) -> None:
        self._options, self._common, self._journal, self._observer = options, plan, journal, observer
        self._account = Account(account, options.privacy) if options.privacy else None
        self._seen: tuple[list[Update], Pooled] | None = None

    def plan(self, number: int, shared: Tensors) -> tuple[RoundPlan, Sequence[SideTensor]]:
        """Return the plan of a round, which trains what its mode sends, and its side tensors.

        Private rounds without noise and observer also sum the responses of a probe, one a module with shape (out, K).
        """
        trained = MODES[self._options.mode].sent(shared, number)
        plan = replace(self._common, trained=tuple(trained))
        if self._observer or plan.rules.noise or plan.rules.mode != "private":
            return plan, ()
        canary = of_round(shared, self._options.seed, number)
        return plan, side_tensors(canary, shared, trained, plan.rules.clip)

    def pay(self, manifest: Manifest) -> None:
        """Record the spending of the round's noise. Raises BudgetError for a round beyond the budget."""
        if self._account:
            self._account.spend(noise_of(manifest).spending(_spending_name(manifest.number), values_of(manifest)))

    def _epsilon_without_collusion(self, manifest: Manifest) -> float | None:
        """Return the epsilon spent if nobody colludes; None without an account. All rounds of a run share terms."""
        if not self._account:
            return None
        manifests = {_spending_name(number): manifest for number in range(1, manifest.number + 1)}
        return epsilon_of(without_collusion(self._account.spent(), manifests), self._account.budget.delta)

    def pool(self, updates: Sequence[Update]) -> Tensors:
        """Return the result of the recipe's robust rule, in the shapes of an update.

        Raises GuardError if it stops the run.
        """
        assert self._options.robust
        self._seen = list(updates), self._options.robust.pool(updates)
        return self._seen[1].tensors

    def line(self, manifest: Manifest, active: Sequence[str], shared: Tensors, mean: Tensors) -> dict[str, Any]:
        """Return the metrics of a round, as RoundMetrics has them."""
        metrics = RoundMetrics(
            manifest.number,
            clients=len(active),
            clipped=None,
            update_norm=norm({name: value for name, value in mean.items() if name in shared}),
            exactness_error=error_of(shared, mean, self._options.seed, manifest.number),
            quantisation_error=None,
            uploaded_bytes=self._journal.bytes_of(manifest.digest, "answer"),
            loss_first=None,
            loss_last=None,
            epsilon=self._account.epsilon() if self._account else None,
            epsilon_without_collusion=self._epsilon_without_collusion(manifest),
        )
        if self._seen:
            updates, pooled = self._seen
            error = exactness_error(shared, updates, self._options.seed + manifest.number)
            verdicts = tuple(verdict_lines(pooled))
            metrics = replace(metrics, exactness_error=error, quantisation_error=0.0, verdicts=verdicts)
        if self._observer:
            metrics = replace(metrics, **self._observer.metrics(manifest, shared, mean))
        return metrics.as_json()


def _spending_name(number: int) -> str:
    return f"round-{number}"


def verdict_lines(pooled: Pooled) -> list[str]:
    """Return the verdicts of a robust rule, one a line."""
    return [f"{verdict.client} {verdict.action}: {verdict.reason}" for verdict in pooled.verdicts]
