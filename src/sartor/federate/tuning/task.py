"""The task `lora`: a client trains, from the shared adapter and on its own rows, what the round's mode trains.

Loop, losses, optimiser and order of rows are those of `tune`. What is repeated is repeated: a round's work follows from the
shared adapter, the rows, the round's number and the recipe alone, so that a client that was killed does it again to the bits.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from sartor.core import config
from sartor.core.errors import ConfigError, ModelError, RoundError
from sartor.federate.aggregate.modes import Mode
from sartor.federate.aggregate.tensors import Array, Tensors, plus
from sartor.federate.rounds.manifest import Manifest
from sartor.federate.rounds.task import Learnt
from sartor.federate.tuning import canaries
from sartor.federate.tuning.recipe import MODES, Settings
from sartor.federate.tuning.resident import Resident
from sartor.tune import order
from sartor.tune.checkpoint import Saver
from sartor.tune.forecast import Interval, Settled
from sartor.tune.journal import Journal
from sartor.tune.outlook import Outlook
from sartor.tune.probe import Load
from sartor.tune.recipe import Budget, Recipe
from sartor.tune.run import Run, learning_rate
from sartor.tune.signals import Signals
from sartor.tune.tokenised import Rows

NAME = "lora"
# a round keeps no log of its own, and saves nothing on its way
_NOWHERE = Path(os.devnull)


class LocalRun(Run):
    """A run of `tune` within one round: `done` is the round's number less 1, of `rounds`."""

    done, rounds = 0, 1

    def save(self) -> None:
        """Nothing: what a killed client did is done again."""

    def _foresee(self, recipe: Recipe) -> Outlook:
        """Nothing is measured: a micro-batch that depended on free memory would change the last bits."""
        asked, longest = recipe.compute.micro_batch_tokens, max(len(row.ids) for row in self.data.train)
        nothing, most = Interval(0.0, 0.0, 0.0), max(longest, asked if isinstance(asked, int) else longest)
        return Outlook(Settled(most, Load(), True, "the recipe's"), nothing, None, 0, None)

    def _rates(self) -> tuple[float, float]:
        """The course of the rate goes over all rounds; in each alone it would warm up again."""
        rate = learning_rate(self.recipe.optimizer, min(1.0, (self.done + self._fraction()) / self.rounds))
        return rate, rate


@dataclass
class LoraTask:
    """See `rounds.task.Task`. rows: this client's; losses: round -> (loss of the first update, of the last)."""

    resident: Resident
    rows: Rows
    losses: dict[int, tuple[float | None, float | None]] = field(default_factory=dict)

    def update(self, manifest: Manifest, shared: Tensors) -> Learnt:
        """The change of what the round's mode trains, by PEFT's names; of factors too it is the change that is sent.

        Raises RoundError for another base, recipe or settings than this client has, ModelError for a loss that explodes.
        """
        settings = _settings(manifest)
        self._check(manifest)
        mode, resident, number = MODES[settings.mode], self.resident, manifest.number
        resident.put(shared)
        resident.hold(lambda name: mode.trains(name, number))
        with Journal(_NOWHERE, show=False) as journal:
            run = self._run(settings, number, journal)
            try:
                run.train(Signals())
            except ModelError as error:
                problem = f"round {number}: {error.problem.partition(';')[0]}"
                raise ModelError(problem, "lower optimizer.learning_rate, or look at this client's rows") from None
        self.losses[number] = run.losses["first"], run.losses["last"]
        learnt = change(mode, shared, resident.taken(), number)
        return Learnt(learnt, len(self.rows.train), canaries.responses(manifest, shared, learnt, resident.recipe.seed))

    def _check(self, manifest: Manifest) -> None:
        for what, said, here in (
            ("base", manifest.work.base, self.resident.ref.digest),
            ("recipe", manifest.work.recipe, self.resident.digest),
        ):
            if said != here:
                raise RoundError(
                    f"the round is of a {what} with the digest {said[:16] or 'none'}; this client's has {here[:16]}",
                    f"tune with the {what} that the coordinator has",
                    "manifest",
                )

    def _run(self, settings: Settings, number: int, journal: Journal) -> LocalRun:
        local, recipe = settings.local, self.resident.recipe
        budget = Budget(epochs=local.epochs and float(local.epochs), updates=local.updates)
        optimizer = replace(recipe.optimizer, learning_rate=settings.learning_rate)
        recipe = replace(recipe, budget=budget, optimizer=optimizer)
        saver = Saver(_NOWHERE, recipe.checkpoints, {}, None)
        run = LocalRun(recipe, self.resident, self.resident.model, self.rows, journal, saver, None)
        run.done, run.rounds, run.position = number - 1, settings.rounds, self._start(recipe, number)
        return run

    def _start(self, recipe: Recipe, number: int) -> order.Position:
        """Where in this client's rows the round begins: where the one before it ended."""
        budget, lengths = recipe.budget, [len(row.ids) for row in self.rows.train]
        if budget.updates is None:
            return order.Position(round((number - 1) * (budget.epochs or 1)))
        position = order.START
        read = order.updates(lengths, recipe.optimizer.batch_tokens, recipe.seed)
        for chosen in itertools.islice(read, (number - 1) * budget.updates):
            position = position.after(len(chosen), len(lengths))
        return position


def change(mode: Mode, shared: Tensors, trained: Tensors, number: int) -> dict[str, Array]:
    """What a client sends: of the modes that send factors whole, their change, since a round clips what it sums.

    The mean of changes, added, is the mean of factors.
    """
    upload = mode.upload(shared, trained, number)
    is_whole = len(upload) == len(shared)
    return plus(upload, {name: shared[name] for name in upload}, -1.0) if is_whole else dict(upload)


def _settings(manifest: Manifest) -> Settings:
    try:
        return config.load(Settings, dict(manifest.work.settings))
    except ConfigError as error:
        raise RoundError(f"the settings of the task {NAME}: {error.problem}", error.remedy, "task") from None
