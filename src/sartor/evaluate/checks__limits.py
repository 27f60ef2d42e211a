"""Part of evaluate.checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Check:
    """One check of the gate: what it found, in a sentence; of a failed one, what else would help than tuning again.

    "cannot tell" holds a Release back as "fail" does: what was measured could not have shown a failure.
    """

    outcome: Literal["pass", "fail", "cannot tell", "waived"]
    detail: str
    remedy: str = ""

    @property
    def holds_back(self) -> bool:
        """Whether there may be no Release unless somebody waives the check."""
        return self.outcome in ("fail", "cannot tell")
