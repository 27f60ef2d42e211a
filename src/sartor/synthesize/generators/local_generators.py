"""`slot_substitution`: the same row with another value, where question and reply say the same one. No model.

Source: Louvan & Magnini 2020, "Simple is Better! Lightweight Data Augmentation for Low Resource Slot Filling and Intent
Classification" (arXiv:2009.03695).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example
from sartor.core.splits import split_group
from sartor.curate.synthesize.contract import Made, Skipped, draw_of, some, why_no_question, with_text
from sartor.curate.synthesize.ways.rewrites import ROWS

# A draw may give what is there already; a row with few values gives fewer copies than were asked for
TRIES = 4
_NUMBER = re.compile(r"(?<![\w.,-])\d+(?![\w]|[.,]\d)")


@dataclass(frozen=True)
class SlotSubstitution:
    """Copies of rows in which a value gives way to another of its list, in the last question and in the reply alike.

    A value counts where it stands once in each, as a word of its own: one that the question says twice, or the reply does not
    say, stays. A value of two lists stays too, since nobody could tell what may stand in its place.
    """

    slots: Any = option(REQUIRED, "a mapping: slot -> list of values that may stand for one another")
    numbers: bool = option(False, "whole numbers too, by others of as many digits")
    per_row: int = option(4, "copies of a row at most")
    rows: int = option(0, ROWS)
    kind: Literal["slot_substitution"] = "slot_substitution"

    def __post_init__(self) -> None:
        listed = isinstance(self.slots, dict) and all(isinstance(some, list) and len(some) > 1 for some in self.slots.values())
        if not listed or not (self.slots or self.numbers):
            raise ConfigError("slots must be a mapping of lists with two values or more", "slots: {room: [hall, attic]}")
        if self.per_row < 1 or self.rows < 0:
            raise ConfigError(f"per_row is {self.per_row} and rows {self.rows}; neither can be less", "per_row: 1, rows: 0")

    def make(self, seeds: Sequence[Example], seed: int, folder: Path) -> Iterator[Made | Drop | Skipped]:
        """See MakingWay."""
        homes = self._homes()
        for row in some(seeds, self.rows, seed, self.kind):
            if reason := why_no_question(row):
                yield Skipped(reason)
                continue
            asked, said = row.messages[-2].text, row.reply
            values = [value for value in [*homes, *self._numbers(asked)] if _once(value, asked) and _once(value, said)]
            made = self._copies(row, _apart(values), homes, seed)
            if not made:
                yield Skipped("no_value_in_both")
            yield from made

    def _homes(self) -> dict[str, list[str]]:
        """value -> what may stand in its place; without those of two lists."""
        lists = [[str(value) for value in values] for values in self.slots.values()]
        every = [value for values in lists for value in dict.fromkeys(values)]
        return {value: values for values in lists for value in values if every.count(value) == 1}

    def _numbers(self, text: str) -> list[str]:
        return list(dict.fromkeys(_NUMBER.findall(text))) if self.numbers else []

    def _copies(self, row: Example, values: Sequence[str], homes: dict[str, list[str]], seed: int) -> list[Made]:
        draw = draw_of(seed, self.kind, row.id)
        made: list[Made] = []
        seen: set[tuple[tuple[str, str], ...]] = {()}
        for _ in range(TRIES * self.per_row):
            if len(made) == self.per_row or not values:
                break
            instead = {value: _other(value, homes.get(value), draw) for value in values}
            changes = tuple((old, new) for old, new in instead.items() if old != new)
            # two values that become one could not be told apart again
            if changes in seen or len(set(instead.values())) < len(instead):
                continue
            seen.add(changes)
            words = "; ".join(f"{old} to {new}" for old, new in changes)
            made.append(Made(_changed(row, instead), f"{row.id[:16]}.{len(made) + 1}", (row,), split_group(row), words))
        return made


def _pattern(value: str) -> re.Pattern[str]:
    """The value as a word of its own; a number is none of a longer one, nor the positive of a negative."""
    return re.compile(rf"(?<![\w-]){re.escape(value)}(?![\w]|[.,]\d)")


def _once(value: str, text: str) -> bool:
    return len(_pattern(value).findall(text)) == 1


def _apart(values: Sequence[str]) -> list[str]:
    """Without those that are a part of another: of "living room" and "room" the longer one is meant."""
    return [value for value in values if not any(value != other and _pattern(value).search(other) for other in values)]


def _other(value: str, home: Sequence[str] | None, draw: random.Random) -> str:
    if home is not None:
        return draw.choice(home)
    lowest = 10 ** (len(value) - 1) if len(value) > 1 else 1
    return str(draw.randrange(lowest, 10 ** len(value)))


def _changed(row: Example, instead: dict[str, str]) -> Example:
    """All at once: a value that was put in is not replaced again."""
    places = re.compile("|".join(_pattern(value).pattern for value in instead))

    def turned(text: str) -> str:
        return places.sub(lambda match: instead[match[0]], text)

    asked, said = (with_text(message, turned(message.text)) for message in row.messages[-2:])
    return replace(row, messages=(*row.messages[:-2], asked, said), rejected=())
