"""Rows as tokens, as a run holds them. Apart from `rows.py`, which makes them: a device reads no Parquet."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

from sartor.models import batches


@dataclass
class Rows:
    """A Dataset as tokens: what is trained on, what is held out, and what was left out with the reason.

    lengths: tokens of every row that the template took, also of those that are too long.
    """

    train: list[batches.Encoded] = field(default_factory=list)
    held_out: list[batches.Encoded] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of the training rows."""
        return sum(len(row.ids) for row in self.train)

    @property
    def supervised_tokens(self) -> int:
        """Tokens of the training rows that get a loss."""
        return sum(row.supervised_tokens for row in self.train)

    def digest(self) -> str:
        """sha256 over every token, mask and weight, in order: equal exactly when two runs compute the same."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for row in part:
                digest.update(array("q", [len(row.ids), *row.ids]).tobytes())
                digest.update(bytes(row.learnt) + array("d", [row.weight]).tobytes())
            digest.update(b"|")
        return digest.hexdigest()
