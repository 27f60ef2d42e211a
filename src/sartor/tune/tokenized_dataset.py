"""Tokenized rows as a run holds them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sartor.models import packing
from sartor.models.packing import TokenizedExample

Term = Literal["pair", "good", "bad"]


@dataclass(frozen=True)
class PreferenceExample(TokenizedExample):
    """A row as a preference is learnt from it; a plain `Encoded` is learnt by sft. Only its last reply is `learnt`.

    term: `pair`, with the rejected reply to the same prompt as its `other`; or `good` or `bad`, as it was rated, with
    another row's reply to this prompt, which is never learnt: by it the divergence is estimated. number: its line in a
    run's table of reference log-probabilities.
    """

    term: Term = "pair"
    other: TokenizedExample | None = None
    number: int = 0

    @property
    def tokens(self) -> int:
        """Of both."""
        return len(self.ids) + (len(self.other.ids) if self.other else 0)


def all_sequences(rows: Iterable[TokenizedExample]) -> list[TokenizedExample]:
    """Every sequence that is computed: a lesson's other right behind it."""
    return list(_sequences(rows))


def _sequences(rows: Iterable[TokenizedExample]) -> Iterator[TokenizedExample]:
    for row in rows:
        yield row
        if isinstance(row, PreferenceExample) and row.other:
            yield row.other


def lessons(rows: Iterable[TokenizedExample]) -> list[PreferenceExample]:
    """Those of the rows from which a preference is learnt."""
    return [row for row in rows if isinstance(row, PreferenceExample)]


@dataclass
class TokenizedDataset:
    """A Dataset as tokens: what is trained on, what is held out, and what was left out with the reason.

    lengths: tokens of every sequence that the template took, also of those that are too long. held_out_groups:
    (held-out rows,) the group of each. rehearsal: rows of another Dataset that are read beside the training rows; no
    epoch counts them, and `lengths` does not.
    """

    train: list[TokenizedExample] = field(default_factory=list)
    held_out: list[TokenizedExample] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    rehearsal: list[TokenizedExample] = field(default_factory=list)
    held_out_groups: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of the training rows."""
        return sum(row.tokens for row in self.train)

    @property
    def supervised_tokens(self) -> int:
        """Tokens of the training rows that get a loss."""
        return sum(row.supervised_tokens for row in all_sequences(self.train))

    @property
    def sequences(self) -> list[TokenizedExample]:
        """Every sequence that a run may compute."""
        return all_sequences([*self.train, *self.rehearsal, *self.held_out])

    def leave_out(self, reason: str, *ids: str) -> None:
        """Note rows that are not trained on, and why."""
        self.left_out.setdefault(reason, []).extend(ids)

    def digest(self) -> str:
        """sha256 over every token, mask and weight, in order: equal exactly when two runs compute the same."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out, *([self.rehearsal] if self.rehearsal else [])):
            for row in all_sequences(part):
                digest.update(array("q", [len(row.ids), *row.ids]).tobytes())
                digest.update(bytes(row.learnt) + array("d", [row.weight]).tobytes())
                digest.update(row.term.encode() if isinstance(row, PreferenceExample) else b"")
            digest.update(b"|")
        return digest.hexdigest()


def micro_batches(rows: Sequence[PreferenceExample], capacity: int, *, share: bool) -> list[list[PreferenceExample]]:
    """Cut the lessons of an update into packs of at most `capacity` tokens, pairs whole; with `share` like prompts
    meet.
    """
    ordered = sorted(rows, key=lambda row: row.ids) if share else list(rows)
    lengths = [row.tokens for row in ordered]
    return [
        [ordered[index] for index in group] for group in packing.group_by_capacity(lengths, max([capacity, *lengths]))
    ]
