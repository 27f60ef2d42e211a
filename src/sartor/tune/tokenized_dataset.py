"""Tokenized rows of a run."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sartor.core.records import Example
from sartor.models import packing
from sartor.models.packing import TokenizedExample

Term = Literal["pair", "good", "bad"]


@dataclass(frozen=True)
class PreferenceExample(TokenizedExample):
    """Row from which a preference is learnt; a plain TokenizedExample is learnt by sft.

    Only the tokens of its last reply are `learnt`.
    term: `pair`, with the rejected reply to the same prompt as `other`; or `good` or `bad`, as it was rated. Then
    `other` holds another row's reply to this prompt, which is never learnt and serves to estimate the divergence.
    number: row in the run's table of reference log-probabilities.
    """

    term: Term = "pair"
    other: TokenizedExample | None = None
    number: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the row and its other reply."""
        return len(self.ids) + (len(self.other.ids) if self.other else 0)


@dataclass(frozen=True)
class DistilExample(TokenizedExample):
    """Row whose replies a teacher scores or a verifier rewards; a plain TokenizedExample is learnt by sft.

    example: the conversation, which a teacher with another tokenizer or template encodes for itself, and whose last
        reply a verifier gets as its reference.
    """

    example: Example | None = None


def all_sequences(rows: Iterable[TokenizedExample]) -> list[TokenizedExample]:
    """Return every sequence that is computed: the other reply of a preference example follows it."""
    sequences = []
    for row in rows:
        sequences.append(row)
        if isinstance(row, PreferenceExample) and row.other:
            sequences.append(row.other)
    return sequences


def lessons(rows: Iterable[TokenizedExample]) -> list[PreferenceExample]:
    """Return the rows that are preference examples."""
    return [row for row in rows if isinstance(row, PreferenceExample)]


@dataclass
class TokenizedDataset:
    """Dataset as tokens: training rows, held-out rows, and the ids of rows left out by reason.

    lengths: tokens of every sequence that the template accepted, including those that are too long.
    held_out_groups: (held-out rows,) the group of each.
    reasoning: rows that the rules for reasoning concern, by what they do (`models/reasoning_rules.py`).
    rehearsal: rows of another Dataset, read with the training rows. Neither epochs nor `lengths` count them.
    rehearsal_factor: by which their weights were multiplied.
    """

    train: list[TokenizedExample] = field(default_factory=list)
    held_out: list[TokenizedExample] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    rehearsal: list[TokenizedExample] = field(default_factory=list)
    rehearsal_factor: float = 1.0
    held_out_groups: list[str] = field(default_factory=list)
    reasoning: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of the training rows."""
        return sum(row.tokens for row in self.train)

    @property
    def supervised_tokens(self) -> int:
        """Tokens of the training rows that have a loss."""
        return sum(row.supervised_tokens for row in all_sequences(self.train))

    @property
    def sequences(self) -> list[TokenizedExample]:
        """Every sequence that a run may compute."""
        return all_sequences([*self.train, *self.rehearsal, *self.held_out])

    @property
    def left_out_counts(self) -> dict[str, int]:
        """Number of rows that are left out, by reason."""
        return {reason: len(ids) for reason, ids in self.left_out.items()}

    def leave_out(self, reason: str, *ids: str) -> None:
        """Record rows that are left out, and the reason."""
        self.left_out.setdefault(reason, []).extend(ids)

    def digest(self) -> str:
        """Return the sha256 over every token, mask, weight and term, in order, and over weights of turns if any.

        It is equal if two runs compute the same rows.
        """
        digest = hashlib.sha256()
        for part in (self.train, self.held_out, *([self.rehearsal] if self.rehearsal else [])):
            for row in all_sequences(part):
                digest.update(array("q", [len(row.ids), *row.ids]).tobytes())
                digest.update(bytes(row.learnt) + array("d", [row.weight]).tobytes())
                digest.update(row.term.encode() if isinstance(row, PreferenceExample) else b"")
                if row.factors is not None:
                    digest.update(array("d", row.factors).tobytes())
            digest.update(b"|")
        return digest.hexdigest()


def micro_batches(rows: Sequence[PreferenceExample], capacity: int, *, share: bool) -> list[list[PreferenceExample]]:
    """Cut the preference examples of an update into micro-batches of at most `capacity` tokens.

    Pairs stay whole. If one example has more tokens, the capacity grows to its length.
    share: sort by tokens, so that equal prompts meet.
    """
    ordered = sorted(rows, key=lambda row: row.ids) if share else list(rows)
    lengths = [row.tokens for row in ordered]
    groups = packing.group_by_capacity(lengths, max([capacity, *lengths]))
    return [[ordered[index] for index in group] for group in groups]
