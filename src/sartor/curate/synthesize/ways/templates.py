"""`templates`: sentences with slots, filled from lists. No model."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, Message, digest
from sartor.curate.synthesize.contract import Made, Skipped, draw_of

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Templates:
    """Every combination of the slots' values in every prompt, or `count` of them drawn by the seed. Rows of one prompt are of
    one group: split apart they would be learnt by heart. Only `{name}` of a slot is filled; other braces stay, as of JSON.
    """

    prompts: tuple[str, ...] = option(REQUIRED, "questions with {slots}")
    reply: str = option(REQUIRED, "the reply with {slots}")
    slots: Any = option(REQUIRED, "a mapping: slot -> list of values")
    system: str = option("", "system prompt of the rows")
    count: int = option(0, "rows to make; 0 makes every combination")
    kind: Literal["templates"] = "templates"

    def __post_init__(self) -> None:
        listed = isinstance(self.slots, dict) and all(isinstance(some, list) and some for some in self.slots.values())
        if not listed or not self.prompts or self.count < 0:
            raise ConfigError(
                "slots must be a mapping of lists, none empty, and prompts a list", "slots: {room: [hall, attic]}"
            )
        for text in self.prompts:
            if lacking := set(_SLOT.findall(self.reply)) & set(self.slots) - set(_SLOT.findall(text)):
                problem = f"the reply says {{{sorted(lacking)[0]}}}, which the prompt {text!r} does not"
                raise ConfigError(problem, "a reply can only tell what was asked")

    def make(self, seeds: Sequence[Example], seed: int, folder: Path) -> Iterator[Made | Drop | Skipped]:
        """See MakingWay."""
        every = [(text, self._names(text)) for text in self.prompts]
        sizes = [math.prod(len(self.slots[name]) for name in names) for _, names in every]
        total = sum(sizes)
        wanted = range(total)
        chosen = sorted(draw_of(seed, self.kind).sample(wanted, self.count)) if 0 < self.count < total else wanted
        starts = [0, *itertools.accumulate(sizes)]
        place = 0
        for number in chosen:
            while number >= starts[place + 1]:
                place += 1
            text, names = every[place]
            yield self._row(text, self._values(names, number - starts[place]), f"{place + 1}.{number - starts[place] + 1}")

    def _names(self, text: str) -> list[str]:
        return [name for name in dict.fromkeys(_SLOT.findall(text)) if name in self.slots]

    def _values(self, names: Sequence[str], number: int) -> dict[str, str]:
        values = {}
        for name in reversed(names):
            number, place = divmod(number, len(self.slots[name]))
            values[name] = str(self.slots[name][place])
        return values

    def _row(self, text: str, values: dict[str, str], number: str) -> Made:
        def filled(template: str) -> str:
            return _SLOT.sub(lambda match: values.get(match[1], match[0]), template)

        messages = [Message.of("system", self.system)] if self.system else []
        messages += [Message.of("user", filled(text)), Message.of("assistant", filled(self.reply))]
        return Made(Example(tuple(messages), ()), number, group=f"template:{digest(text)[:16]}", changes=text)
