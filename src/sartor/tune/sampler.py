"""Row order from a seed, cut into updates and resumable."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sartor.tune.recipe import ResolvedRecipe


@dataclass(frozen=True)
class Position:
    """Position in the row order, between two updates.

    epoch: number of finished epochs.
    place: rows of the current epoch that are used.
    """

    epoch: int = 0
    place: int = 0

    def after(self, used: int, rows: int) -> Position:
        """Return the position after `used` more rows of an epoch of `rows` rows."""
        used_rows = self.place + used
        return Position(self.epoch, used_rows) if used_rows < rows else Position(self.epoch + 1)


START = Position()
# Epochs whose updates are counted: each has another shuffle, and so another number of them
COUNTED_EPOCHS = 3


def iterate_updates(
    lengths: Sequence[int], batch_tokens: int, seed: int, start: Position = START
) -> Iterator[list[int]]:
    """Yield the row indices of each update, without end: epochs are new shuffles, cut at `batch_tokens`.

    lengths: tokens of each row.
    start: a position between two updates; the same updates follow as in an uninterrupted iteration.
    An update takes rows until it has at least `batch_tokens` tokens. It never mixes epochs, so the last update of an
    epoch may be smaller.
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
    """Return the approximate number of updates that `iterate_updates` makes of an epoch.

    An update has whole rows, so on average it exceeds `batch_tokens` by half a row.
    """
    epoch_tokens = sum(row_tokens)
    mean_row = epoch_tokens / len(row_tokens)
    return min(epoch_tokens / (batch_tokens + mean_row / 2), len(row_tokens))


def count_updates(row_tokens: Sequence[int], batch_tokens: int, seed: int) -> float:
    """Return the number of updates that `iterate_updates` makes of an epoch, the mean of its first COUNTED_EPOCHS."""
    counted = 0
    for epoch in range(COUNTED_EPOCHS):
        position = Position(epoch)
        for indices in iterate_updates(row_tokens, batch_tokens, seed, position):
            counted += 1
            position = position.after(len(indices), len(row_tokens))
            if position.epoch > epoch:
                break
    return counted / COUNTED_EPOCHS


@functools.lru_cache(maxsize=4)
def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


@dataclass(frozen=True)
class RehearsalPosition:
    """Position in the rehearsal rows.

    owed: rehearsal tokens that are due and not yet read; below 0 if the last whole row was more than was due.
    """

    position: Position = START
    owed: float = 0.0

    def after(
        self, lengths: Sequence[int], own_tokens: int, fraction: float, seed: int
    ) -> tuple[list[int], RehearsalPosition]:
        """Return the rehearsal rows' indices for an update of `own_tokens`, and the position after them.

        lengths: tokens of each rehearsal row.
        fraction: share of rehearsal among all tokens.
        Each epoch of the rehearsal rows is a shuffle of its own.
        """
        if not lengths:
            return [], self
        # rehearsal / (rehearsal + own) = fraction, so rehearsal = own * fraction / (1 - fraction)
        owed, position, indices = self.owed + own_tokens * fraction / (1 - fraction), self.position, list[int]()
        while owed > 0:
            # complement, so that the seed differs from the seed of the own rows
            row = _shuffled(len(lengths), ~(seed * 1_000_003 + position.epoch))[position.place]
            indices.append(row)
            owed -= lengths[row]
            position = position.after(1, len(lengths))
        return indices, RehearsalPosition(position, owed)


@dataclass(frozen=True)
class SchedulePart:
    """Part of a schedule that several runs share: `done` of `parts` parts are finished, this run is the next.

    Each part has the whole budget of the recipe.
    """

    done: int = 0
    parts: int = 1

    def course(self, fraction: float) -> float:
        """Return the progress of the whole schedule, 0..1, at a fraction of this part.

        With the progress of one part alone, the learning rate would warm up again in each.
        """
        return min(1.0, (self.done + fraction) / self.parts)

    def start(self, recipe: ResolvedRecipe, lengths: Sequence[int]) -> Position:
        """Return the position at which the part begins: the end of the part before it.

        lengths: tokens of each row.
        """
        budget = recipe.budget
        if budget.updates is None:
            return Position(round(self.done * (budget.epochs or 1)))
        position = START
        updates = iterate_updates(lengths, recipe.optimizer.batch_tokens, recipe.seed)
        for indices in itertools.islice(updates, self.done * budget.updates):
            position = position.after(len(indices), len(lengths))
        return position
