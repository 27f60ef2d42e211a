"""Seeded row order cut into updates, resumable."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sartor.tune.recipe import ResolvedRecipe


@dataclass(frozen=True)
class Position:
    """A place between two updates: rows of this epoch that are used, and epochs before it."""

    epoch: int = 0
    place: int = 0

    def after(self, used: int, rows: int) -> Position:
        """The position when `used` more rows of an epoch of `rows` are used."""
        used_rows = self.place + used
        return Position(self.epoch, used_rows) if used_rows < rows else Position(self.epoch + 1)


START = Position()


def iterate_updates(
    lengths: Sequence[int], batch_tokens: int, seed: int, start: Position = START
) -> Iterator[list[int]]:
    """Endless updates: lists of row indices, each epoch a fresh shuffle, rows added until `batch_tokens` is reached.

    lengths: tokens per row. start: a position between two updates; what follows is what followed there. An update
    never mixes epochs, so the last of an epoch may be small.
    """
    position = start
    while True:
        order = _shuffled(len(lengths), seed * 1_000_003 + position.epoch)
        indices: list[int] = []
        tokens = 0
        for row in order[position.place :]:
            indices.append(row)
            tokens += lengths[row]
            if tokens >= batch_tokens:
                yield indices
                indices, tokens = [], 0
        if indices:
            yield indices
        position = Position(position.epoch + 1)


def updates_per_epoch(row_tokens: Sequence[int], batch_tokens: int) -> float:
    """About how many updates `iterate_updates` makes of an epoch: one has whole rows, so that it is half a row
    over.
    """
    epoch_tokens = sum(row_tokens)
    mean_row = epoch_tokens / len(row_tokens)
    return min(epoch_tokens / (batch_tokens + mean_row / 2), len(row_tokens))


@functools.lru_cache(maxsize=4)
def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


@dataclass(frozen=True)
class RehearsalPosition:
    """A place in rows that are read beside an update's own. owed: tokens of them that should have been read and were
    not; below 0 where a whole row was more than was owed.
    """

    position: Position = START
    owed: float = 0.0

    def after(
        self, lengths: Sequence[int], own_tokens: int, fraction: float, seed: int
    ) -> tuple[list[int], RehearsalPosition]:
        """(row indices that go with an update of `own_tokens`, the place behind them).

        lengths: tokens per row, of which `fraction` of all tokens are to be. Each of their epochs is a shuffle of its
        own.
        """
        if not lengths:
            return [], self
        owed, position, indices = self.owed + own_tokens * fraction / (1 - fraction), self.position, list[int]()
        while owed > 0:
            # another seed than that of the update's own rows
            row = _shuffled(len(lengths), ~(seed * 1_000_003 + position.epoch))[position.place]
            indices.append(row)
            owed -= lengths[row]
            position = position.after(1, len(lengths))
        return indices, RehearsalPosition(position, owed)


@dataclass(frozen=True)
class SchedulePart:
    """`done` parts of `parts` stand; this run is the next. All have the recipe's budget, each."""

    done: int = 0
    parts: int = 1

    def course(self, fraction: float) -> float:
        """How far the whole course is, 0..1, at a fraction of this part: in each part alone a rate would warm up
        again.
        """
        return min(1.0, (self.done + fraction) / self.parts)

    def start(self, recipe: ResolvedRecipe, lengths: Sequence[int]) -> Position:
        """Where in the rows it begins: where the part before it ended. lengths: tokens a row."""
        budget = recipe.budget
        if budget.updates is None:
            return Position(round(self.done * (budget.epochs or 1)))
        position = START
        updates = iterate_updates(lengths, recipe.optimizer.batch_tokens, recipe.seed)
        for indices in itertools.islice(updates, self.done * budget.updates):
            position = position.after(len(indices), len(lengths))
        return position
