"""`counterfactuals`: further training rows that say the same of somebody of another group, the outcome kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sartor.core.config import option
from sartor.core.errors import ConfigError
from sartor.core.records import Drop, Example
from sartor.curate.bias.pairs import ATTRIBUTES, counterfactuals
from sartor.curate.steps.contract import Copy, CopyFunction


@dataclass(frozen=True)
class Counterfactuals:
    """Add each training row that names somebody of a group again about somebody of another one, the reply's outcome kept.

    English, by the lexicon of `text/demographics/group_terms.py`. A row in which grammar or sense cannot be kept, or that speaks of people of
    several groups, gets no copy.
    """

    group: tuple[str, ...] = option(("sex",), f"by what: {', '.join(ATTRIBUTES)}")
    rehearsal: bool = option(False, "copy rows of rehearsal sources too")
    kind: Literal["counterfactuals"] = "counterfactuals"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.group if name not in ATTRIBUTES]:
            raise ConfigError(f"group is {unknown[0]!r}", f"group: [{', '.join(ATTRIBUTES)}]")

    def open(self, folder: Path) -> CopyFunction:
        """See CopyStep."""

        def copies(example: Example) -> Iterator[Copy | Drop]:
            for copy, changes in counterfactuals(example, self.group):
                yield Copy(copy, changes)

        return copies
