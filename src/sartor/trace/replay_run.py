"""Training run that repeats a finished one, with weights of single rows and a record of its updates."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sartor.core.processes import DeferredSignals
from sartor.models.losses.loss_backend import LossBackend
from sartor.models.packing import TokenizedExample
from sartor.tune.checkpoint import RandomState, Saver
from sartor.tune.preference_training import PreferenceLosses, PreferenceRun
from sartor.tune.recipe import ResolvedRecipe
from sartor.tune.run_forecast import RunForecast, unmeasured
from sartor.tune.tokenized_dataset import TokenizedDataset, all_sequences
from sartor.tune.training_log import TrainingLog
from sartor.tune.training_loop import Resolved, TrainingBase, TrainingRun

# a replay writes no log and no checkpoints
_NOWHERE = Path(os.devnull)


@dataclass
class RowWeights:
    """Weights of the N traced rows, beside the weights that the rows themselves have.

    indices: index 0..N-1 of each sequence of tokens, by the `id` of its object.
    values: (N + 1,) fp32; the last one, always 1, is that of every other sequence.
    """

    indices: Mapping[int, int]
    values: torch.Tensor

    def of(self, rows: Sequence[TokenizedExample]) -> torch.Tensor:
        """Return the weight of each of the rows, (rows,)."""
        return self.values[self.places(rows)]

    @property
    def reweighted(self) -> frozenset[int]:
        """Indices of the rows that have another weight than 1."""
        return frozenset(torch.nonzero(self.values != 1).flatten().tolist())

    def places(self, rows: Sequence[TokenizedExample]) -> list[int]:
        """Return the index in `values` of each of the rows."""
        other = len(self.values) - 1
        return [self.indices.get(id(row), other) for row in rows]


@dataclass
class WeightedBackend:
    """Loss backend that multiplies the weights of tokens by those of `row_weights`.

    The divisor of an update's loss is computed from the rows and not from these weights. So a row of weight 0 is left
    out, and divisor, order, packing and random numbers stay as they are.
    """

    inner: LossBackend
    row_weights: RowWeights

    def __post_init__(self) -> None:
        self.name, self.reason = self.inner.name, self.inner.reason
        self.packing_difference = self.inner.packing_difference

    def losses(self, rows: Sequence[TokenizedExample]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses (S,) in nats and weights (S,), as `LossBackend.losses` specifies."""
        losses, weights = self.inner.losses(rows)
        lengths = torch.tensor([row.supervised_tokens for row in rows], device=weights.device)
        return losses, weights * self.row_weights.of(rows).repeat_interleave(lengths)

    def plain(self) -> LossBackend | None:
        """Return the inner backend's plain form, without the further weights."""
        return self.inner.plain()

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """Parameters that are trained through this backend."""
        return self.inner.trained


@dataclass(frozen=True)
class Course:
    """Course of the recorded run that the recipe does not fix.

    last_update: number of updates after which to stop; None stops by the recipe's budget.
    updates: of the whole recorded run. A budget in minutes is repeated as this many updates.
    rates: learning rates of factors and of projectors by the number of earlier updates, where the log has them.
    """

    last_update: int | None
    updates: int
    rates: Mapping[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class UpdateRecord:
    """State before an update, with its rows and its gradient.

    parameters, gradients, moments, second_moments: one tensor (...) for each trained parameter; a gradient is that
        before clipping, None for a parameter that the update skipped.
    steps: optimiser steps of each parameter so far.
    rates: learning rate of each parameter.
    random_state: of the generators before the update.
    """

    rows: tuple[TokenizedExample, ...]
    parameters: list[torch.Tensor]
    gradients: list[torch.Tensor | None]
    moments: list[torch.Tensor]
    second_moments: list[torch.Tensor]
    steps: list[int]
    rates: list[float]
    random_state: RandomState


@dataclass(frozen=True)
class RunState:
    """Copy of everything that decides the next updates: tensors (...) by name, and plain values."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass
class SharedBeginning:
    """States of a run in which all rows have the weight 1, from which runs with other weights go on.

    Until an update reads a row of another weight, both runs are the same.

    stride: updates from one kept state to the next.
    states, reads: states, and indices of the rows that an update reads, by the number of updates before.
    """

    stride: int
    states: dict[int, RunState] = field(default_factory=dict)
    reads: dict[int, frozenset[int]] = field(default_factory=dict)

    def latest(self, reweighted: Set[int]) -> RunState | None:
        """Return the last state before any of these rows is read; None if none is kept."""
        first = min((update for update, read in self.reads.items() if read & reweighted), default=len(self.reads))
        shared = [update for update in self.states if update <= first]
        return self.states[max(shared)] if shared else None


class ReplayRun(TrainingRun):
    """TrainingRun that repeats a recorded one, without evaluations and checkpoints.

    course: what the recorded run adds to the recipe.
    row_weights: weights of the traced rows, which the divisor does not see.
    tape: receives the record of each update; None records nothing.
    beginning: receives states of the run until it reads a row of another weight than 1; None receives none.
    """

    course: Course
    row_weights: RowWeights
    tape: list[UpdateRecord] | None = None
    beginning: SharedBeginning | None = None

    @classmethod
    def begin(
        cls,
        recipe: ResolvedRecipe,
        base: TrainingBase,
        model: Any,
        data: TokenizedDataset,
        *,
        micro_batch_tokens: int,
        course: Course,
        row_weights: RowWeights,
    ) -> ReplayRun:
        """Return the run before its first update."""
        with TrainingLog(_NOWHERE, show=False) as journal:
            saver = Saver(_NOWHERE, recipe.checkpoints, {}, None)
            resolved = Resolved(micro_batch_tokens)
            run = cls(recipe, base, model, data=data, journal=journal, saver=saver, resolved=resolved)
            run.course, run.row_weights = course, row_weights
            run.path = WeightedBackend(run.path, row_weights)
            run._prepare()
            run.evaluation_points = []  # evaluations choose weights, and change none
        return run

    def _prepare(self) -> None:
        """Compute what the objective needs before the first update."""

    def go_on(self) -> None:
        """Update until the course's last update, or until the budget is spent."""
        with TrainingLog(_NOWHERE, show=False) as journal:
            self.journal = journal
            self.train(DeferredSignals())

    def save(self) -> None:
        """Do nothing: a replay that is killed is repeated."""

    def _update_or_save(self, rows: Sequence[TokenizedExample]) -> None:
        if self.beginning is not None:
            self._keep_state(self.beginning, rows)
        super()._update_or_save(rows)

    def _keep_state(self, beginning: SharedBeginning, rows: Sequence[TokenizedExample]) -> None:
        """Keep the state before an update if every row that was read until then has the weight 1."""
        update, read = self.counters.updates, self.row_weights.places(all_sequences(rows))
        beginning.reads.setdefault(update, frozenset(read))
        if update % beginning.stride == 0 and update not in beginning.states:
            reweighted = self.row_weights.reweighted
            if not any(beginning.reads[earlier] & reweighted for earlier in range(update)):
                beginning.states[update] = self.snapshot()

    def snapshot(self) -> RunState:
        """Return a copy of the current state."""
        tensors, facts = self.state()
        return RunState({name: tensor.detach().clone() for name, tensor in tensors.items()}, facts)

    def go_back(self, state: RunState) -> None:
        """Make the state of a snapshot the current one."""
        # copies, because the optimiser changes its tensors in place
        self._load_state({name: tensor.clone() for name, tensor in state.tensors.items()}, state.facts, _NOWHERE)

    def _foresee(self, recipe: ResolvedRecipe) -> RunForecast:
        micro_batch_tokens = recipe.compute.micro_batch_tokens
        assert isinstance(micro_batch_tokens, int)
        return unmeasured(micro_batch_tokens, "that of the recorded run")

    def _fraction(self) -> float:
        course = self.course
        if course.last_update is not None and self.counters.updates >= course.last_update:
            return 1.0
        if self.recipe.budget.minutes is not None:  # another clock would give other rates
            return self.counters.updates / course.updates
        return super()._fraction()

    def _rates(self) -> tuple[float, float]:
        return self.course.rates.get(self.counters.updates) or super()._rates()

    def _backward(self, rows: Sequence[TokenizedExample], weight: float = 1.0) -> float:
        random_state = RandomState.capture(self.base.device) if self.tape is not None else None
        loss = super()._backward(rows, weight)
        if self.tape is not None and random_state is not None:
            self.tape.append(self._record(rows, random_state))
        return loss

    def _record(self, rows: Sequence[TokenizedExample], random_state: RandomState) -> UpdateRecord:
        rates: dict[int, float] = {}
        for group in self.optimizer.param_groups:
            rates |= {id(parameter): group["lr"] for parameter in group["params"]}
        # in the alignment phase the factors' gradients are computed and not used
        skipped = {id(parameter) for parameter in self.factors} if not self._rates()[0] else set()
        states = [self.optimizer.state.get(parameter) or {} for parameter in self.parameters]
        return UpdateRecord(
            rows=tuple(rows),
            parameters=[parameter.detach().clone() for parameter in self.parameters],
            gradients=[
                None if parameter.grad is None or id(parameter) in skipped else parameter.grad.clone()
                for parameter in self.parameters
            ],
            moments=self._copied(states, "exp_avg"),
            second_moments=self._copied(states, "exp_avg_sq"),
            steps=[int(state["step"]) if state else 0 for state in states],
            rates=[rates[id(parameter)] for parameter in self.parameters],
            random_state=random_state,
        )

    def _copied(self, states: Sequence[Mapping[str, torch.Tensor]], key: str) -> list[torch.Tensor]:
        """Return copies of an optimiser tensor of each parameter; zeros before the first step."""
        return [
            state[key].clone() if state else torch.zeros_like(parameter)
            for parameter, state in zip(self.parameters, states, strict=True)
        ]


class PreferenceReplayRun(ReplayRun, PreferenceRun):
    """ReplayRun for preferences: a row is a preference example, or a plain row beside them."""

    def _prepare(self) -> None:
        self.prepare_reference()

    def _judge(self, rows: Sequence[Any], divergence: torch.Tensor) -> PreferenceLosses:
        losses = super()._judge(rows, divergence)
        return losses._replace(weights=losses.weights * self.row_weights.of(rows))
