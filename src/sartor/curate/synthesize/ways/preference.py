"""`preference`: the row's own reply, and a worse one in `rejected`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Example, Message
from sartor.core.splits import split_group
from sartor.curate.synthesize.contract import Ask, Made, Skipped, Unusable, quoted, said, texts, words
from sartor.curate.synthesize.ways.rewrites import PER_ROW, ROWS, asks, check_count

FLAWS = (
    "states one fact wrongly",
    "leaves out what matters most",
    "answers another question than the one that was asked",
    "is vague where the good reply is exact",
    "is unfriendly",
)


@dataclass(frozen=True)
class Preference:
    """Preference pairs for dpo: the row's reply is the good one, the teacher writes one with a flaw."""

    flaws: tuple[str, ...] = option(FLAWS, "what a flawed reply does, one for each pair in turn")
    per_row: int = option(1, PER_ROW)
    rows: int = option(0, ROWS)
    kind: Literal["preference"] = "preference"

    def __post_init__(self) -> None:
        check_count(self.per_row, self.rows)
        if not self.flaws:
            raise ConfigError("flaws is empty", f"flaws: [{FLAWS[0]}]")

    def _flaw(self, row: Example, number: int) -> str:
        return self.flaws[(int(row.id[:8], 16) + number) % len(self.flaws)]

    def asks(self, seeds: Sequence[Example], seed: int) -> Iterator[Ask | Skipped]:
        """See AskingWay."""

        def text(row: Example, number: int, draw: Any) -> str:
            return (
                f"A conversation whose last reply is good:\n{quoted(said(row))}\nWrite a last reply of about the same length "
                f'that {self._flaw(row, number)}. It teaches to tell good from bad.\nAnswer with {{"reply": "..."}}.'
            )

        yield from asks(self.kind, (self.per_row, self.rows), seeds, seed, text, texts("reply"))

    def made(self, ask: Ask, value: Mapping[str, Any]) -> Made | Unusable:
        """See AskingWay."""
        (parent,) = ask.parents
        flawed = value["reply"].strip()
        if not flawed:
            return Unusable("empty_answer", "the flawed reply is empty")
        if words(flawed) == words(parent.reply):
            return Unusable("same_as_seed", "the flawed reply is the good one")
        flaw = self._flaw(parent, int(ask.number.rpartition(".")[2]))
        return Made(
            replace(parent, rejected=(Message.of("assistant", flawed),)), ask.number, ask.parents, split_group(parent), flaw
        )
