"""What `synthesize` hands back: the Dataset, and what became of everything that was tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sartor.core import parquet_io
from sartor.core.artifacts import Artifact
from sartor.core.records import Example
from sartor.curate.synthesize.answers import Spent


@dataclass(frozen=True)
class Synthesized:
    """What was made. spent: of this run, None where no teacher was asked; a finished Dataset that was found cost nothing."""

    dataset: Artifact
    spent: Spent | None
    wall_s: float
    found: bool = field(default=False)

    def examples(self) -> Iterator[Example]:
        """The rows, in order: for whoever validates them."""
        return parquet_io.read_examples(self.dataset)

    @property
    def made(self) -> int:
        """Rows of the Dataset."""
        return int(self.dataset.manifest["counts"]["kept"])

    @property
    def dropped(self) -> dict[str, int]:
        """Drops by reason: answers that could not be used, rows that were there already, sources that could not be read."""
        return dict(self.dataset.manifest["counts"]["dropped"])

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        spent = self.spent or Spent(0, 0, 0, 0, 0, 0.0)
        said = self.dataset.manifest["synthetic"]
        return {
            "dataset": str(self.dataset.path),
            "made": self.made,
            "dropped": self.dropped,
            "seeds": said["seeds"],
            "ways": said["ways"],
            "teacher": said["teacher"],
            "calls": spent.calls,
            "cached": spent.cached,
            "tokens": {"input": spent.tokens_in, "output": spent.tokens_out, "estimated_calls": spent.estimated},
            "cost": round(spent.cost, 6),
            "licence": self.dataset.licence,
            "digest": self.dataset.manifest["digest"],
            "wall_s": round(self.wall_s, 3),
        }

    def table(self) -> list[tuple[str, Any]]:
        """What a person reads."""
        said = self.as_json()
        ways = [(kind, counts) for kind, counts in said.pop("ways").items()]
        shown = ("dataset", "made", "dropped", "teacher", "calls", "cached", "tokens", "cost", "licence")
        return [*((name, said[name]) for name in shown), *ways, ("card", str(self.dataset.path / "card.html"))]
