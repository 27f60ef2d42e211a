"""Steps: Example -> Example | Drop. A recipe names them by `kind`; each is a small frozen class of its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example


@dataclass(frozen=True)
class ExactDuplicates:
    """Rows of equal content become one Example that keeps every origin; each further row is a Drop that names it."""

    kind: Literal["exact_duplicates"] = "exact_duplicates"


@dataclass(frozen=True)
class Length:
    """Drop rows whose last reply has too few or too many words."""

    min_words: int = option(1, "fewest words of the last reply")
    max_words: int = option(100_000, "most words of the last reply")
    kind: Literal["length"] = "length"

    def __post_init__(self) -> None:
        if self.min_words > self.max_words:
            raise ConfigError(f"min_words {self.min_words} is above max_words {self.max_words}", "swap them")


Step = ExactDuplicates | Length


def dropped(example: Example, reason: str, detail: str, *, step: str, kept: str = "") -> Drop:
    """The Drop of an Example: id, place and detail, and the start of its text as evidence."""
    origin = example.origins[0]
    text = "\n".join(f"{message.role}: {message.text}" for message in example.messages)[:2000]
    return Drop(reason, origin.source, origin.locator, detail, step, example.id, kept, text)


def length(step: Length, example: Example) -> Example | Drop:
    """Apply `Length`."""
    words = len(example.reply.split())
    if words < step.min_words:
        return dropped(example, "too_short", f"{words} words in the reply; at least {step.min_words}", step=step.kind)
    if words > step.max_words:
        return dropped(example, "too_long", f"{words} words in the reply; at most {step.max_words}", step=step.kind)
    return example
