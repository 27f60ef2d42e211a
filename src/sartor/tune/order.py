"""The order of rows: a shuffle per epoch that depends on the seed and the epoch alone, cut into updates."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence


def updates(lengths: Sequence[int], batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless updates: lists of row indices, each epoch a fresh shuffle, rows added until `batch_tokens` is reached.

    lengths: tokens per row. An update never mixes epochs, so the last of an epoch may be small.
    """
    epoch = 0
    while True:
        order = list(range(len(lengths)))
        random.Random(seed * 1_000_003 + epoch).shuffle(order)
        chosen: list[int] = []
        tokens = 0
        for row in order:
            chosen.append(row)
            tokens += lengths[row]
            if tokens >= batch_tokens:
                yield chosen
                chosen, tokens = [], 0
        if chosen:
            yield chosen
        epoch += 1
