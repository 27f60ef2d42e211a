"""The task `lora`: a client trains, from the shared adapter and on its own rows, what the round's mode trains.

Loop, losses, optimiser and order of rows are those of `tune`. What is repeated is repeated: a round's work follows from the
shared adapter, the rows, the round's number and the recipe alone, so that a client that was killed does it again to the bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sartor.core import config
from sartor.core.errors import ConfigError, ModelError, RoundError
from sartor.federate.aggregate.modes import Mode
from sartor.federate.rounds.manifest import Manifest
from sartor.federate.rounds.task import Learnt
from sartor.federate.tuning import canaries
from sartor.federate.tuning.guard import RowGuard
from sartor.federate.tuning.recipe import MODES, Settings
from sartor.models.lora_tensors import Array, Tensors, plus
from sartor.tune.recipe import Budget, Recipe
from sartor.tune.sampler import Part
from sartor.tune.shared_base import _NOWHERE, _WHOLE, LocalRun, Resident, train  # noqa: F401
from sartor.tune.tokenized_dataset import Rows

NAME = "lora"
# of the first update of a round, and of the last; None where none was made here
Losses = tuple[float | None, float | None]


@dataclass
class LoraTask:
    """See `rounds.task.Task`. rows: this client's; losses: round -> (loss of the first update, of the last).

    rank: of the shared ranks this client trains the first so many, and holds the others still; None: it trains all.
    guard: makes its updates private of its rows.
    """

    resident: Resident
    rows: Rows
    rank: int | None = None
    guard: RowGuard | None = None
    losses: dict[int, Losses] = field(default_factory=dict)

    def update(self, manifest: Manifest, shared: Tensors) -> Learnt:
        """The change of what the round's mode trains, by PEFT's names; of factors too it is the change that is sent.

        Raises RoundError for another base, recipe or settings than this client has, ModelError for a loss that explodes.
        """
        settings = settings_of(manifest, self.resident.ref.digest, self.resident.digest)
        mode, resident, number = MODES[settings.mode], self.resident, manifest.number
        resident.put(shared)
        resident.hold(lambda name: mode.trains(name, number), slice(self.rank))
        if self.guard:
            self.guard.train(resident, self.rows, settings, manifest)
        else:
            self._train(settings, number)
        learnt = change(mode, shared, resident.taken(), number)
        return Learnt(learnt, len(self.rows.train), canaries.responses(manifest, shared, learnt, resident.recipe.seed))

    def _train(self, settings: Settings, number: int) -> None:
        recipe, part = local_recipe(self.resident.recipe, settings), Part(number - 1, settings.rounds)
        try:
            run = train(self.resident, self.rows, recipe, part)
        except ModelError as error:
            problem = f"round {number}: {error.brief}"
            raise ModelError(problem, "lower optimizer.learning_rate, or look at this client's rows") from None
        self.losses[number] = run.losses["first"], run.losses["last"]


def local_recipe(recipe: Recipe, settings: Settings) -> Recipe:
    """A client's recipe with what a round decides."""
    local, optimizer = settings.local, replace(recipe.optimizer, learning_rate=settings.learning_rate)
    budget = Budget(epochs=local.epochs and float(local.epochs), updates=local.updates)
    return replace(recipe, budget=budget, optimizer=optimizer)


def change(mode: Mode, shared: Tensors, trained: Tensors, number: int) -> dict[str, Array]:
    """What a client sends: of the modes that send factors whole, their change, since a round clips what it sums.

    The mean of changes, added, is the mean of factors.
    """
    upload = mode.upload(shared, trained, number)
    is_whole = len(upload) == len(shared)
    return plus(upload, {name: shared[name] for name in upload}, -1.0) if is_whole else dict(upload)


def settings_of(manifest: Manifest, base: str, recipe: str) -> Settings:
    """What a round says of the task. base, recipe: digests of this client's. Raises RoundError for others, or for settings
    that it lacks.
    """
    for what, said, here in (("base", manifest.work.base, base), ("recipe", manifest.work.recipe, recipe)):
        if said != here:
            raise RoundError(
                f"the round is of a {what} with the digest {said[:16] or 'none'}; this client's has {here[:16]}",
                f"tune with the {what} that the coordinator has",
                "manifest",
            )
    try:
        return config.load(Settings, dict(manifest.work.settings))
    except ConfigError as error:
        raise RoundError(f"the settings of the task {NAME}: {error.problem}", error.remedy, "task") from None
