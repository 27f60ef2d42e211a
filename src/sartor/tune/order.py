"""The order of rows: a shuffle per epoch that depends on the seed and the epoch alone, cut into updates."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """A place between two updates: rows of this epoch that are used, and epochs before it."""

    epoch: int = 0
    place: int = 0

    def after(self, used: int, rows: int) -> Position:
        """The position when `used` more rows of an epoch of `rows` are used."""
        place = self.place + used
        return Position(self.epoch, place) if place < rows else Position(self.epoch + 1)


START = Position()


def updates(lengths: Sequence[int], batch_tokens: int, seed: int, start: Position = START) -> Iterator[list[int]]:
    """Endless updates: lists of row indices, each epoch a fresh shuffle, rows added until `batch_tokens` is reached.

    lengths: tokens per row. start: a position between two updates; what follows is what followed there. An update never
    mixes epochs, so the last of an epoch may be small.
    """
    position = start
    while True:
        order = list(range(len(lengths)))
        random.Random(seed * 1_000_003 + position.epoch).shuffle(order)
        chosen: list[int] = []
        tokens = 0
        for row in order[position.place :]:
            chosen.append(row)
            tokens += lengths[row]
            if tokens >= batch_tokens:
                yield chosen
                chosen, tokens = [], 0
        if chosen:
            yield chosen
        position = Position(position.epoch + 1)
