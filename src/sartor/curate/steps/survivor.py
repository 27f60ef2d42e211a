"""Which of several duplicate rows stays: by a declared rule the row of the highest number, of equals the first read."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from sartor.core.licences import compliance
from sartor.core.records import Example
from sartor.curate.steps.quality import quality

Keep = Literal["longest", "first", "newest", "best_licence", "best_quality"]
Field = Literal["both", "prompt", "reply", "all"]
KEEP_HELP = "which row stays: the longest, first (read), newest (by its date), best_licence (that permits most), best_quality"
FIELD_HELP = "what is compared: prompt (the user's turns), reply (the last), both (all of user and assistant), all (system too)"


UNDATED = -1e14  # seconds: older than any date
BEHIND = 1e15  # above every number of a rule, and exact beside whole ones


def ranks(examples: Sequence[Example], rule: Keep, field: Field) -> Any:
    """(N,) float64. Whatever the rule, what people wrote goes before what was synthesised."""
    return np.array([_RULES[rule](example, field) - BEHIND * example.is_synthetic for example in examples], np.float64)


def text_of(example: Example, field: Field) -> str:
    """The text that is compared."""
    if field == "reply":
        return example.reply
    roles = {"prompt": ("user",), "both": ("user", "assistant"), "all": ("system", "user", "assistant", "tool")}[field]
    return "\n".join(message.text for message in example.messages if message.role in roles)


def has_media(example: Example) -> bool:
    """Whether the row shows or plays something: then its text alone does not tell what it says."""
    return any(part.media for message in example.messages + example.rejected for part in message.content)


def is_apart(example: Example) -> bool:
    """Whether its text does not tell what it repeats: it shows something, or people rated its reply. Of two like replies to one
    question, one rated good and one bad, neither repeats the other.
    """
    return has_media(example) or bool(example.rating)


def _length(example: Example, field: Field) -> float:
    return float(len(text_of(example, field)))


def _date(example: Example, field: Field) -> float:
    """Seconds since 1970 of the newest origin; a row without a date is older than any with one."""
    found = [UNDATED]
    for origin in example.origins:
        if origin.date:
            date = datetime.datetime.fromisoformat(origin.date)
            found.append((date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp())
    return float(max(found))


def _licence(example: Example, field: Field) -> float:
    return max(compliance.rank(origin.licence) for origin in example.origins)


_RULES: dict[str, Callable[[Example, Field], float]] = {
    "longest": _length,
    "first": lambda example, field: 0.0,
    "newest": _date,
    "best_licence": _licence,
    "best_quality": lambda example, field: quality(example),
}
