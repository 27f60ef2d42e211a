"""`scenarios`: conversations of several turns from a grid of who asks, what for, and what is odd about it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError
from sartor.core.records import Example, Message, digest
from sartor.curate.synthesize.contract import Ask, Made, Skipped, Unusable, draw_of, quoted, said, texts, why_no_question
from sartor.curate.synthesize.ways.rewrites import SYSTEM

MOST_TURNS = 20


@dataclass(frozen=True)
class Scenarios:
    """Every persona with every intent and every edge case. Rows of the sources, where there are any, show the style."""

    personas: tuple[str, ...] = option(REQUIRED, "who asks")
    intents: tuple[str, ...] = option(REQUIRED, "what they want")
    edge_cases: tuple[str, ...] = option(("nothing out of the ordinary",), "what is odd about it")
    per_cell: int = option(1, "conversations of each cell of the grid")
    turns: int = option(2, f"questions with their replies in a conversation, 1 to {MOST_TURNS}")
    system: str = option("", "system prompt of the rows")
    kind: Literal["scenarios"] = "scenarios"

    def __post_init__(self) -> None:
        if not (self.personas and self.intents and self.edge_cases):
            raise ConfigError("a side of the grid is empty", "personas: [...], intents: [...], edge_cases: [...]")
        if self.per_cell < 1 or not 1 <= self.turns <= MOST_TURNS:
            problem = f"per_cell is {self.per_cell}, turns {self.turns}; at least 1, and 1 to {MOST_TURNS}"
            raise ConfigError(problem, "turns: 2")

    def asks(self, seeds: Sequence[Example], seed: int) -> Iterator[Ask | Skipped]:
        """See AskingWay."""
        shown = [row for row in seeds if not why_no_question(row)]
        for cell in itertools.product(self.personas, self.intents, self.edge_cases):
            for number in range(1, self.per_cell + 1):
                place = f"{digest(cell)[:12]}.{number}"
                models = draw_of(seed, self.kind, place).sample(shown, min(1, len(shown)))
                style = "".join(f"A conversation in the wanted style:\n{quoted(said(row))}\n" for row in models)
                text = (
                    f"{style}Write a conversation between {cell[0]} and an assistant. What is wanted: {cell[1]}. What is "
                    f"special: {cell[2]}. {self.turns} questions, each with its reply. Conversation {number}."
                    '\nAnswer with {"turns": [{"user": "...", "assistant": "..."}]}.'
                )
                note = {"cell": "; ".join(cell), "group": f"scenario:{digest(cell)[:16]}"}
                yield Ask(place, (("system", SYSTEM), ("user", text)), self._schema(), tuple(models), note)

    def _schema(self) -> dict[str, Any]:
        turns = {"type": "array", "items": texts("user", "assistant"), "minItems": self.turns, "maxItems": self.turns}
        return {"type": "object", "properties": {"turns": turns}, "required": ["turns"], "additionalProperties": False}

    def made(self, ask: Ask, value: Mapping[str, Any]) -> Made | Unusable:
        """See AskingWay."""
        messages = [Message.of("system", self.system)] if self.system else []
        for turn in value["turns"]:
            asked, reply = turn["user"].strip(), turn["assistant"].strip()
            if not asked or not reply:
                return Unusable("empty_answer", "a turn is empty")
            messages += [Message.of("user", asked), Message.of("assistant", reply)]
        return Made(Example(tuple(messages), ()), ask.number, ask.parents, ask.note["group"], ask.note["cell"])
