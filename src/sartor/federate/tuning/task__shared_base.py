"""Part of federate.tuning.task."""

from __future__ import annotations

import os
from pathlib import Path

from sartor.core.processes import Signals
from sartor.federate.tuning.resident import Resident
from sartor.tune.checkpoint import Saver
from sartor.tune.forecast import Interval, Settled
from sartor.tune.journal import Journal
from sartor.tune.outlook import Outlook
from sartor.tune.part import Part
from sartor.tune.probe import Load
from sartor.tune.recipe import Recipe
from sartor.tune.run import Run, learning_rate
from sartor.tune.tokenised import Rows

# a round keeps no log of its own, and saves nothing on its way
_NOWHERE = Path(os.devnull)
_WHOLE = Part()


class LocalRun(Run):
    """A run of `tune` within one round: part is the round, of all."""

    part = Part()

    def save(self) -> None:
        """Nothing: what a killed client did is done again."""

    def _foresee(self, recipe: Recipe) -> Outlook:
        """Nothing is measured: a micro-batch that depended on free memory would change the last bits."""
        asked, longest = recipe.compute.micro_batch_tokens, max(len(row.ids) for row in self.data.train)
        nothing, most = Interval(0.0, 0.0, 0.0), max(longest, asked if isinstance(asked, int) else longest)
        return Outlook(Settled(most, Load(), True, "the recipe's"), nothing, None, 0, None)

    def _rates(self) -> tuple[float, float]:
        rate = learning_rate(self.recipe.optimizer, self.part.course(self._fraction()))
        return rate, rate


def train(resident: Resident, rows: Rows, recipe: Recipe, part: Part = _WHOLE) -> LocalRun:
    """Train what of the resident may learn, from where it stands, for the recipe's budget. Raises ModelError."""
    with Journal(_NOWHERE, show=False) as journal:
        saver = Saver(_NOWHERE, recipe.checkpoints, {}, None)
        run = LocalRun(recipe, resident, resident.model, rows, journal, saver, None)
        run.part, run.position = part, part.start(recipe, [len(row.ids) for row in rows.train])
        run.train(Signals())
    return run
