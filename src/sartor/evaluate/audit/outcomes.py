"""Which replies are an outcome of a decision, and which of them are to be wished for. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sartor.core.errors import ConfigError
from sartor.evaluate.labels import WHOLE, known_fields, label_of
from sartor.text.demographics.decision_words import FAVOURABLE

# Whole replies of so few kinds are decisions, where each is given often
MOST_CLASSES, LEAST_ROWS_A_CLASS = 6, 5


@dataclass(frozen=True)
class Outcomes:
    """field: where a reply names its outcome, `.` is the whole reply. classes: all that references name.

    favourable: those that are to be wished for, empty where nobody said and no word tells.
    """

    field: str
    classes: tuple[str, ...]
    favourable: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether a class is a whole reply, so that its likelihood can be asked for."""
        return self.field == WHOLE and len(self.classes) <= MOST_CLASSES

    @property
    def looked_at(self) -> list[tuple[str, ...]]:
        """Sets of classes whose rate is compared: what is favourable, else each class in turn."""
        if self.favourable:
            return [self.favourable]
        return [(name,) for name in (self.classes[:1] if len(self.classes) == 2 else self.classes)]


def outcomes_of(references: Sequence[str], field: str = "", favourable: Sequence[str] = ()) -> Outcomes | None:
    """What the replies decide. Without a field: the whole reply, where there are few; None where replies decide nothing.

    Raises ConfigError for a field that no reference has, and for a favourable outcome that none names.
    """
    named = Counter(label for text in references if (label := label_of(text, field or WHOLE)) is not None)
    if field and not named:
        raise ConfigError(f"no reference has the field {field!r}", f"--label {' | '.join(known_fields(references)) or WHOLE}")
    is_decision = 2 <= len(named) <= MOST_CLASSES and min(named.values()) >= LEAST_ROWS_A_CLASS
    if strange := [one for one in favourable if one not in named]:
        known = " | ".join(sorted(named)[:MOST_CLASSES])
        raise ConfigError(f"no reference says {strange[0]!r}, which --favourable names", f"--favourable {known}")
    if len(named) < 2 or not (field or is_decision or favourable):
        return None
    wished = tuple(favourable) or tuple(name for name in sorted(named) if name.strip(" .!").lower() in FAVOURABLE)
    return Outcomes(field or WHOLE, tuple(sorted(named)), wished if len(wished) < len(named) else ())
