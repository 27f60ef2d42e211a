"""`exact_duplicates`: rows of equal content become one Example that keeps every origin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from sartor.core.records import Example
from sartor.curate.steps.contract import Gathered, Removal, Verdicts


@dataclass(frozen=True)
class ExactDuplicates:
    """Rows of equal content become one Example that keeps every origin; each further row is a Drop that names it."""

    kind: Literal["exact_duplicates"] = "exact_duplicates"

    def sketch(self, examples: Sequence[Example], folder: Path) -> Any:
        """See SetStep. The id says it all: no further column."""
        return pa.table({"_": pa.nulls(len(examples), pa.null())})

    def decide(self, gathered: Gathered) -> Verdicts:
        """See SetStep."""
        first: dict[str, int] = {}
        removals = []
        locators = gathered.table["locator"]
        for row, name in enumerate(gathered.table["id"].to_pylist()):
            kept = first.setdefault(name, row)
            if kept != row:
                detail = f"the same content as {locators[kept].as_py()}"
                removals.append(Removal(row, "exact_duplicate", detail, kept, 1.0, "equal content", merge=True))
        return Verdicts(removals)
