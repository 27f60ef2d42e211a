"""What `validate` hands back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.curate.validate.verdicts import Finding


@dataclass(frozen=True)
class Flaw:
    """Why a synthetic row is not accepted: a stable word, and a sentence with the evidence. place: among the synthetic rows."""

    place: int
    id: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Validated:
    """Verdicts over the whole set, and flaws of rows. `written` is the Dataset of accepted rows, `review` the queue's file."""

    synthetic: Path
    reality: Path
    rows: Mapping[str, Any]
    tests: Sequence[Finding]
    flaws: Sequence[Flaw]
    facts: Mapping[str, Any]
    written: Path | None = None
    review: Path | None = None
    wall_s: float = 0.0

    @property
    def failed(self) -> list[Finding]:
        """The tests that failed."""
        return [test for test in self.tests if test.verdict == "fail"]

    @property
    def passed(self) -> bool:
        """Whether the set is like reality within the limits: no test failed."""
        return not self.failed

    @property
    def accepted(self) -> int:
        """Rows that may be tuned on: all without a flaw, and none of a set that failed."""
        return int(self.rows["synthetic"]) - len({flaw.place for flaw in self.flaws}) if self.passed else 0

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        return {
            "synthetic": str(self.synthetic),
            "reality": str(self.reality),
            "passed": self.passed,
            "failed": [test.name for test in self.failed],
            "accepted": self.accepted,
            "rejected": int(self.rows["synthetic"]) - self.accepted,
            "flaws": dict(Counter(flaw.reason for flaw in self.flaws).most_common()),
            "rows": dict(self.rows),
            "tests": {test.name: test.as_json() for test in self.tests},
            **self.facts,
            "dataset": str(self.written) if self.written else "",
            "review": str(self.review) if self.review else "",
            "wall_s": round(self.wall_s, 2),
        }

    def table(self) -> list[tuple[str, Any]]:
        """What a person reads."""
        said = self.as_json()
        lines = [(test.name, _line(test)) for test in self.tests]
        shown = ("passed", "failed", "accepted", "rejected", "flaws", "rows", "dataset", "review")
        return [*lines, *((name, said[name]) for name in shown if said[name] not in ("", []))]


def _line(test: Finding) -> str:
    if test.p is None:
        return f"{test.verdict}: {test.detail}"
    p = f"p {test.p_corrected:.3f} corrected" if test.p_corrected is not None else f"p {test.p:.3f}"
    return f"{test.verdict}: {test.detail} (effect {test.effect:.3f}, limit {test.limit:g}, {p})"
