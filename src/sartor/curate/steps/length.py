"""`length`: replies of too few or too many words go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example, dropped
from sartor.curate.steps.contract import RowFunction


@dataclass(frozen=True)
class Length:
    """Drop rows whose last reply has too few or too many words."""

    min_words: int = option(1, "fewest words of the last reply")
    max_words: int = option(100_000, "most words of the last reply")
    kind: Literal["length"] = "length"

    def __post_init__(self) -> None:
        if self.min_words > self.max_words:
            raise ConfigError(f"min_words {self.min_words} is above max_words {self.max_words}", "swap them")

    def open(self, folder: Path) -> RowFunction:
        """See RowStep."""

        def apply(example: Example) -> Example | Drop:
            words = len(example.reply.split())
            if words < self.min_words:
                detail = f"{words} words in the reply; at least {self.min_words}"
                return dropped(example, "too_short", detail, step=self.kind)
            if words > self.max_words:
                return dropped(example, "too_long", f"{words} words in the reply; at most {self.max_words}", step=self.kind)
            return example

        return apply
