"""`counterfactual`: the same row about somebody of another group, reply included. No model: text/demographics/group_terms.py has the grammar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, Message, Part
from sartor.core.splits import split_group
from sartor.curate.synthesize.contract import Made, Skipped, draw_of, some
from sartor.curate.synthesize.ways.rewrites import ROWS
from sartor.text.demographics.group_terms import KINDS, Kind, groups, mentions, swap

# A text of a conversation ends here: names and pronouns are swapped over all of it, one name one way
_APART = "\n\x1e\n"


@dataclass(frozen=True)
class Counterfactual:
    """Copies of rows that name a group, about another group, with the same outcome: what the model should not tell apart.

    Texts in which the grammar or the sense cannot be kept give none (`text/demographics/group_terms.py` says which those are).
    """

    kinds: tuple[Kind, ...] = option(KINDS, "what is swapped: names, pronouns, age, nationality, disability")
    to: tuple[str, ...] = option((), "groups to swap to; empty takes every other one")
    per_row: int = option(1, "copies of a row for each kind at most, drawn by the seed")
    rows: int = option(0, ROWS)
    kind: Literal["counterfactual"] = "counterfactual"

    def __post_init__(self) -> None:
        known = {group for kind in self.kinds for group in groups(kind)}
        if unknown := [group for group in self.to if group not in known]:
            raise ConfigError(f"{unknown[0]!r} is no group of {', '.join(self.kinds)}", f"one of {', '.join(sorted(known))}")
        if not self.kinds or self.per_row < 1 or self.rows < 0:
            raise ConfigError(f"per_row is {self.per_row}; it must be at least 1, of at least one kind", "per_row: 1")

    def make(self, seeds: Sequence[Example], seed: int, folder: Path) -> Iterator[Made | Drop | Skipped]:
        """See MakingWay."""
        for row in some(seeds, self.rows, seed, self.kind):
            text = _APART.join(_texts(row))
            named = [kind for kind in self.kinds if mentions(text, kind)]
            made = [one for kind in named for one in self._swapped(row, text, kind, seed)]
            if not made:
                yield Skipped("not_swappable" if named else "no_group_named")
            yield from made

    def _swapped(self, row: Example, text: str, kind: Kind, seed: int) -> list[Made]:
        turned = list(self.to or groups(kind))
        draw_of(seed, self.kind, row.id, kind).shuffle(turned)
        made: list[Made] = []
        for to in turned:
            if to in groups(kind) and len(made) < self.per_row and (changed := swap(text, kind, to)):
                number = f"{row.id[:16]}.{kind}.{to}"
                made.append(Made(_with_texts(row, changed.split(_APART)), number, (row,), split_group(row), f"{kind} to {to}"))
        return made


def _texts(row: Example) -> list[str]:
    """Every text part of a row, in order."""
    return [part.text for message in row.messages + row.rejected for part in message.content if part.kind == "text"]


def _with_texts(row: Example, texts: Sequence[str]) -> Example:
    coming = iter(texts)

    def turned(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(
            replace(one, content=tuple(Part("text", next(coming)) if part.kind == "text" else part for part in one.content))
            for one in messages
        )

    return replace(row, messages=turned(row.messages), rejected=turned(row.rejected))
