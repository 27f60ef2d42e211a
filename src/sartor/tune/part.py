"""A run that is a part of a longer course, as a round of many is: it goes on in its rates and in its rows. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sartor.tune import order
from sartor.tune.recipe import Recipe


@dataclass(frozen=True)
class Part:
    """`done` parts of `parts` stand; this run is the next. All have the recipe's budget, each."""

    done: int = 0
    parts: int = 1

    def course(self, fraction: float) -> float:
        """How far the whole course is, 0..1, at a fraction of this part: in each part alone a rate would warm up again."""
        return min(1.0, (self.done + fraction) / self.parts)

    def start(self, recipe: Recipe, lengths: Sequence[int]) -> order.Position:
        """Where in the rows it begins: where the part before it ended. lengths: tokens a row."""
        budget = recipe.budget
        if budget.updates is None:
            return order.Position(round(self.done * (budget.epochs or 1)))
        position = order.START
        read = order.updates(lengths, recipe.optimizer.batch_tokens, recipe.seed)
        for chosen in itertools.islice(read, self.done * budget.updates):
            position = position.after(len(chosen), len(lengths))
        return position
