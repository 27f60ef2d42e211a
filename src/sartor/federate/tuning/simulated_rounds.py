"""Rounds of a simulation in one process: secure, inspected and residual.

All resume after a kill from journals on disk, to the bit. Rounding is drawn from the seed, and an interrupted client
repeats its work. Noise is the exception: it is drawn from the system, once, and stands in the journal.

Inspected and residual rounds see every client's factors. In residual rounds the part that the mean misses, E = B_E
A_E, is not folded into the base, which an Adapter is bound to. It is kept as ranks beyond the shared R, which all
clients freeze. The weights are the same:

    W + s E + s B A = W + s [B, B_E] [A; A_E]

Residuals add up over rounds. After each round E is reduced to the fewest ranks that compute it, at most min(in, out)
of a module.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sartor.core import config, records, signing
from sartor.core.errors import BudgetError
from sartor.federate import aggregation
from sartor.federate import updates as arrays
from sartor.federate.aggregation import Combined, Residual
from sartor.federate.privacy.accountant import PrivacyBudget
from sartor.federate.privacy.client_noise import noised
from sartor.federate.recipe import MODES, FederateRecipe, RoundSettings
from sartor.federate.robust_aggregation import AnyRule
from sartor.federate.rounds.round_client import EnrolmentPolicy, Participant, RoundClient
from sartor.federate.rounds.round_coordinator import RoundPlan
from sartor.federate.rounds.round_driver import RoundDriver, lines_of
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.round_manifest import (
    ClientTask,
    ClientWork,
    LocalUpdate,
    Manifest,
    UpdateRules,
    terms_for,
)
from sartor.federate.rounds.transport import InProcess
from sartor.federate.secure.identities import Identity, PinnedKeys
from sartor.federate.tuning import round_schedule
from sartor.federate.tuning.lora_task import NAME, LoraTask, Losses
from sartor.federate.tuning.round_schedule import LoraOptions, LoraSchedule, RoundMetrics
from sartor.federate.updates import Update, mean
from sartor.models.lora_tensors import (
    A,
    Array,
    B,
    LoraPair,
    Tensors,
    add_changes,
    join_ranks,
    modules,
    norm,
    pair,
    rank_of,
    split_ranks,
)
from sartor.tune.shared_base import SharedBase

RUN, COORDINATOR = "simulation", "coordinator"
# seconds of a round by a clock that stands still: every client answers or refuses at once, so no stage waits
_LENGTH_S = 3_600


class TuningTask(ClientTask, Protocol):
    """Client task whose losses a simulation reads.

    losses: round -> losses of the training done in this process.
    """

    losses: dict[int, Losses]


def work_of(recipe: FederateRecipe, resident: SharedBase) -> dict[str, Any]:
    """Return the work of a manifest: digests of base and recipe, and the task's settings."""
    settings = config.dump(RoundSettings.of(recipe))
    return {"task": NAME, "settings": settings, "base": resident.ref.digest, "recipe": resident.digest}


@dataclass(frozen=True)
class SimulationSetup:
    """Inputs of a simulation.

    rules: with `auto` resolved.
    tasks: by client.
    start: the adapter that the first round starts from.
    folder: of journals and keys.
    """

    recipe: FederateRecipe
    rules: UpdateRules
    resident: SharedBase
    tasks: Mapping[str, TuningTask]
    start: Tensors
    folder: Path

    @property
    def work(self) -> dict[str, Any]:
        """Work of a manifest, as `work_of` returns it."""
        return work_of(self.recipe, self.resident)

    def manifest(self, shared: Tensors, number: int) -> Manifest:
        """Return the unsigned manifest of a round in which every update is seen; shared: in the adapter's shapes."""
        terms = terms_for(self.tasks, MODES[self.recipe.mode].sent(shared, number), self.rules, seed="0" * 64)
        work = ClientWork(shared=arrays.digest(arrays.pack_tensors(shared)), **self.work)
        return Manifest(RUN, number, COORDINATOR, work=work, terms=terms, deadline=_LENGTH_S, rules=self.rules)

    def seen_metrics(self, number: int, local_updates: Mapping[str, LocalUpdate]) -> dict[str, Any]:
        """Return fields of RoundMetrics that only the updates tell.

        The losses are means over the clients that trained in this process; the epsilons are there if clients have
        budgets of their own.
        """
        losses = [task.losses[number] for task in self.tasks.values() if number in task.losses]
        first = [loss for loss, _ in losses if loss is not None]
        last = [loss for _, loss in losses if loss is not None]
        metrics: dict[str, Any] = {
            "clipped": round_schedule.clipped_of(local_updates, self.rules),
            "loss_first": float(np.mean(first)) if first else None,
            "loss_last": float(np.mean(last)) if last else None,
        }
        guards = {name: task.guard for name, task in sorted(self.tasks.items()) if isinstance(task, LoraTask)}
        epsilons = {name: guard.account.epsilon() for name, guard in guards.items() if guard}
        return metrics | ({"epsilon": max(epsilons.values()), "epsilons": epsilons} if epsilons else {})


class Rounds(Protocol):
    """Rounds of a simulation: call `step` until as many are done as the recipe says."""

    @property
    def shared(self) -> Tensors:
        """Current shared adapter."""
        ...

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Metrics of each finished round."""
        ...

    def step(self) -> None:
        """Run the next round, or the rest of an interrupted one."""
        ...

    def close(self) -> None:
        """Close the journals."""
        ...


@dataclass
class _ObservedTask:
    """Client task whose updates are recorded: a simulation sees every update, a coordinator none."""

    task: TuningTask
    updates_by_round: dict[int, LocalUpdate] = field(default_factory=dict)

    def update(self, manifest: Manifest, shared: Tensors) -> LocalUpdate:
        """Return the client's update, in the shapes of the round, and record it."""
        self.updates_by_round = {manifest.number: self.task.update(manifest, shared)}
        return self.updates_by_round[manifest.number]

    def of(self, manifest: Manifest, shared: Tensors) -> LocalUpdate:
        """Return the update of a round, in its shapes; computed again, to the bit, if another process saw it."""
        return self.updates_by_round.get(manifest.number) or self.update(manifest, shared)


class _Strict(InProcess):
    """Transport that raises the error of a client that refuses. A BudgetError only declines the round."""

    @property
    def declined(self) -> dict[str, BudgetError]:
        """Clients that declined the round, with their errors."""
        return {name: error for name, error in sorted(self.said_no.items()) if isinstance(error, BudgetError)}

    def exchange(self, requests: Mapping[str, bytes], wait_s: float) -> Iterator[bytes]:
        """Exchange messages as InProcess does, then raise the error of a client that refused."""
        yield from super().exchange(requests, wait_s)
        for name, error in self.said_no.items():
            if name not in self.declined:
                raise error


@dataclass(frozen=True)
class _UpdateObserver:
    """Observer of secure rounds, by the tasks in this process."""

    setup: SimulationSetup
    tasks: Mapping[str, _ObservedTask]
    transport: _Strict

    def metrics(self, manifest: Manifest, shared: Tensors, mean: Tensors) -> dict[str, Any]:
        """Return the metrics of a round that only the updates tell; mean: of the updates."""
        setup, declined = self.setup, self.transport.declined
        local_updates = _collect_updates(
            {name: task.of for name, task in self.tasks.items()}, manifest, shared, declined
        )
        updates = round_schedule.weighted_updates(local_updates, setup.rules)
        return {
            "exactness_error": round_schedule.exactness_error(shared, updates, setup.recipe.seed + manifest.number),
            "quantisation_error": None if setup.rules.noise else round_schedule.rounding_error(mean, updates),
            "verdicts": tuple(_decline_lines(declined)),
            **setup.seen_metrics(manifest.number, local_updates),
        }


class SecureRounds:
    """Rounds with a secure sum between a coordinator and clients, each with its journal.

    budget: of the clients' privacy, spent by the rounds' noise; None keeps no account.
    """

    def __init__(self, setup: SimulationSetup, budget: PrivacyBudget | None) -> None:
        self._setup = setup
        with ExitStack() as stack:
            self._stack = stack
            self._open_parties(budget)
            # nothing was raised: the journals stay open until `close`
            self._stack = stack.pop_all()

    def _open_parties(self, budget: PrivacyBudget | None) -> None:
        setup = self._setup
        recipe, folder, names = setup.recipe, setup.folder, tuple(sorted(setup.tasks))
        roster = _enrol(folder, (*names, COORDINATOR))
        tasks = {name: _ObservedTask(setup.tasks[name]) for name in names}
        self._journal = self._open(COORDINATOR)
        self._transport = _Strict(
            {name: self._client(name, index, task, roster) for index, (name, task) in enumerate(tasks.items())}
        )
        schedule = LoraSchedule(
            LoraOptions(recipe.mode, recipe.seed, budget),
            RoundPlan(cohort=names, rules=setup.rules, length_s=_LENGTH_S, stage_s=0, **setup.work),
            self._journal,
            folder / "privacy.json",
            _UpdateObserver(setup, tasks, self._transport),
        )
        member = Participant(Identity.open(COORDINATOR, folder / "keys" / COORDINATOR), roster)
        self._driver = RoundDriver(member, self._journal, RUN, schedule, self._transport, clock=lambda: 0.0)
        if not self._driver.coordinator.has_tensors:
            self._driver.coordinator.start(setup.start)

    def _open(self, name: str) -> RoundJournal:
        return self._stack.enter_context(RoundJournal(self._setup.folder / f"{name}.sqlite"))

    def _client(self, name: str, index: int, task: ClientTask, roster: PinnedKeys) -> RoundClient:
        identity, seed = Identity.open(name, self._setup.folder / "keys" / name), self._setup.recipe.seed
        return RoundClient(
            Participant(identity, roster, agreement=EnrolmentPolicy("private", self._setup.recipe.colluders_asked)),
            self._open(name),
            {NAME: task},
            noise=noised,
            clock=lambda: 0.0,
            chance=lambda manifest: np.random.default_rng([seed, index, manifest.number]),
        )

    @property
    def shared(self) -> Tensors:
        """Current shared adapter."""
        return self._driver.coordinator.shared

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Metrics of each finished round."""
        return lines_of(self._journal, RUN)

    def step(self) -> None:
        """Run the next round, or the rest of an interrupted one.

        Raises the error of a client, and BudgetError for a round beyond the privacy budget or that too many clients
        decline.
        """
        self._transport.said_no.clear()
        result = self._driver.step().result
        if result.state == "abandoned":
            declined = self._transport.declined
            problem = "; ".join([f"round {result.number} was given up: {result.reason}", *_decline_lines(declined)])
            raise BudgetError(problem, next((error.remedy for error in declined.values()), "more clients"))

    def close(self) -> None:
        """Close the journals."""
        self._stack.close()


class InspectedRounds:
    """Rounds in which every update is seen, and a robust rule combines them."""

    def __init__(self, setup: SimulationSetup, rule: AnyRule) -> None:
        self._setup, self._rule = setup, rule
        self._journal = RoundJournal(setup.folder / f"{COORDINATOR}.sqlite")
        self._lines: list[dict[str, Any]]
        self._shared: Tensors
        with ExitStack() as stack:
            stack.enter_context(self._journal)
            content = self._journal.load(RUN)
            if content is None:
                self._lines, self._shared = [], setup.start
            else:
                lines, _, packed = content.partition(b"\n")
                self._lines, self._shared = json.loads(lines), arrays.unpack_tensors(packed)
            self._prepare()
            stack.pop_all()

    def _prepare(self) -> None:
        """Prepare the tasks for the current shared adapter."""

    @property
    def shared(self) -> Tensors:
        """Current shared adapter."""
        return self._shared

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Metrics of each finished round."""
        return self._lines

    def step(self) -> None:
        """Run the next round. Raises GuardError if the rule stops it, BudgetError if every client declines."""
        setup, shared, number = self._setup, self._shared, len(self._lines) + 1
        declined: dict[str, BudgetError] = {}
        local_updates = self._local_updates(shared, number, declined)
        if not local_updates:
            raise next(iter(declined.values()))
        updates = round_schedule.weighted_updates(local_updates, setup.rules)
        pooled = self._rule.pool(updates)
        next_shared, error = self._next_shared(shared, updates, pooled.tensors, setup.recipe.seed + number)
        line = RoundMetrics(
            number,
            clients=len(updates),
            update_norm=norm(pooled.tensors),
            exactness_error=error,
            quantisation_error=0.0,
            uploaded_bytes=sum(len(arrays.pack_tensors(update.tensors)) for update in updates),
            verdicts=(*_decline_lines(declined), *round_schedule.verdict_lines(pooled)),
            **setup.seen_metrics(number, local_updates),
        )
        self._lines, self._shared = [*self._lines, line.as_json()], next_shared
        self._journal.keep(RUN, records.canonical(self._lines) + b"\n" + arrays.pack_tensors(next_shared))

    def _local_updates(self, shared: Tensors, number: int, declined: dict[str, BudgetError]) -> dict[str, LocalUpdate]:
        """Return each client's update of a round; clients that decline are added to `declined`."""
        setup = self._setup
        tasks = {name: setup.tasks[name].update for name in sorted(setup.tasks)}
        return _collect_updates(tasks, setup.manifest(shared, number), shared, declined)

    def _next_shared(
        self, shared: Tensors, updates: list[Update], pooled: Tensors, seed: int
    ) -> tuple[Tensors, float]:
        """Return (the next shared adapter, its relative distance from the mean of the clients' products).

        seed: of the probe that measures the distance.
        """
        return add_changes(shared, pooled), round_schedule.exactness_error(shared, updates, seed)

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()


def _collect_updates(
    tasks: Mapping[str, Callable[[Manifest, Tensors], LocalUpdate]],
    manifest: Manifest,
    shared: Tensors,
    declined: dict[str, BudgetError],
) -> dict[str, LocalUpdate]:
    """Return each client's update; clients that decline, here or before, are in `declined` instead."""
    local_updates = dict[str, LocalUpdate]()
    for name, update in tasks.items():
        if name in declined:
            continue
        try:
            local_updates[name] = update(manifest, shared)
        except BudgetError as error:
            declined[name] = error
    return local_updates


def _decline_lines(declined: Mapping[str, BudgetError]) -> list[str]:
    return [f"{name} declined: {error.problem}" for name, error in declined.items()]


def _enrol(folder: Path, names: tuple[str, ...]) -> PinnedKeys:
    """Create the missing keys of all participants, and return the roster of them."""
    (folder / "roster").mkdir(parents=True, exist_ok=True)
    for name in names:
        public = folder / "roster" / f"{name}.pub"
        if not public.exists():
            # a kill between the two left a key that nobody has seen
            shutil.rmtree(folder / "keys" / name, ignore_errors=True)
            signing.keygen(folder / "keys" / name, purposes=("fleet",))
            shutil.copyfile(folder / "keys" / name / "sartor.pub", public)
    return PinnedKeys.open(folder / "roster")


# singular values below this fraction of the largest are rounding errors of fp64
_NOTHING = 1e-12


class ResidualRounds(InspectedRounds):
    """Rounds of mode residual.

    `shared` has the R shared ranks first, then the residual's. The base of the tasks has room for all of them.
    """

    def _prepare(self) -> None:
        self._fit(self._shared)

    def _local_updates(self, shared: Tensors, number: int, declined: dict[str, BudgetError]) -> dict[str, LocalUpdate]:
        self._fit(shared)
        full_updates = super()._local_updates(shared, number, declined)
        return {
            name: replace(update, tensors=split_ranks(update.tensors, self._rank)[0])
            for name, update in full_updates.items()
        }

    def _next_shared(
        self, shared: Tensors, updates: list[Update], pooled: Tensors, seed: int
    ) -> tuple[Tensors, float]:
        means, residual = split_ranks(shared, self._rank)
        full_updates = [replace(update, tensors=add_changes(means, update.tensors)) for update in updates]
        combined = Residual().combine(means, full_updates, 1)
        residuals = {
            module: LoraPair(*_sum_products(combined.residual[module], pair(residual, module) if residual else None))
            for module in modules(means)
        }
        next_shared = join_ranks(combined.tensors, compress_ranks(residuals))
        canary = aggregation.draw(means, seed)
        residual_pairs = {module: pair(residual, module) for module in modules(means)} if residual else {}
        responses = [
            replace(update, tensors=canary.responses(update.tensors, residual_pairs)) for update in full_updates
        ]
        self._fit(next_shared)
        return next_shared, aggregation.exactness_error(canary, Combined(next_shared), mean(responses))

    @property
    def _rank(self) -> int:
        """R, the number of ranks that clients train."""
        return self._setup.recipe.method.rank

    def _fit(self, shared: Tensors) -> None:
        """Give the tasks a base with room for all ranks, of which they train the first R."""
        self._setup.resident.refit(rank_of(shared))
        for task in self._setup.tasks.values():
            if isinstance(task, LoraTask):
                task.rank = self._rank


def _sum_products(first: LoraPair, second: LoraPair | None) -> tuple[Array, Array]:
    """Return (A, B) of the sum of two products, in fp64: [B_1, B_2] [A_1; A_2] = B_1 A_1 + B_2 A_2."""
    parts = [first, *([second] if second else [])]
    return (
        np.concatenate([part.a.astype(np.float64) for part in parts]),
        np.concatenate([part.b.astype(np.float64) for part in parts], axis=1),
    )


def compress_ranks(residual: dict[str, LoraPair]) -> dict[str, Array]:
    """Return factors of these products at the fewest ranks that compute every one, at least one.

    residual: module -> A (R', in), B (out, R'). Result: by PEFT's names, A (R, in) and B (out, R), fp32, with one R
    for all modules.
    """
    decomposed = {module: _decompose(factors) for module, factors in residual.items()}
    rank = max(1, *(len(factors.a) for factors in decomposed.values()))
    tensors: dict[str, Array] = {}
    for module, factors in decomposed.items():
        padding = rank - len(factors.a)
        tensors[module + A] = np.pad(factors.a, ((0, padding), (0, 0))).astype(np.float32)
        tensors[module + B] = np.pad(factors.b, ((0, 0), (0, padding))).astype(np.float32)
    return tensors


def _decompose(factors: LoraPair) -> LoraPair:
    """Return the factors of a product at its numerical rank, with the singular values split evenly.

    B = Q_l U, A^T = Q_r L (QR); U L^T = u S v^T (SVD, (R', R')); then B A = (Q_l u sqrt(S)) (Q_r v sqrt(S))^T.
    """
    left_q, upper = np.linalg.qr(factors.b)
    right_q, lower = np.linalg.qr(factors.a.T)
    u, sizes, v = np.linalg.svd(upper @ lower.T)
    rank = int((sizes > _NOTHING * max(float(sizes[0]), np.finfo(np.float64).tiny)).sum())
    root = np.sqrt(sizes[:rank])
    return LoraPair((right_q @ (v[:rank].T * root)).T, left_q @ (u[:, :rank] * root))
