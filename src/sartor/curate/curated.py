"""What `curate` hands back: the Dataset, and how many rows went where."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sartor.core.artifacts import Artifact

FILES_LISTED = 20


@dataclass(frozen=True)
class Curated:
    """What `curate` made: the Dataset and how many rows went where. `found` are parts that an interrupted run had left."""

    dataset: Artifact
    found: int
    wall_s: float

    @property
    def counts(self) -> dict[str, Any]:
        """The manifest's counts."""
        return dict(self.dataset.manifest["counts"])

    @property
    def read(self) -> int:
        """Rows read."""
        return int(self.counts["read"])

    @property
    def made(self) -> int:
        """Copies that steps made of rows, those that were dropped among them: `read` and `made` are `kept` and `dropped`."""
        return int(self.counts.get("made", 0))  # a Dataset of an older Sartor has no such count

    @property
    def kept(self) -> int:
        """Rows kept."""
        return int(self.counts["kept"])

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped, by reason."""
        return dict(self.counts["dropped"])

    @property
    def rows_per_s(self) -> float:
        """Rows read per second of wall time."""
        return self.read / self.wall_s if self.wall_s else math.inf

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        manifest = self.dataset.manifest
        return {
            "dataset": str(self.dataset.path),
            "read": self.read,
            "made": self.made,
            "kept": self.kept,
            "dropped": self.dropped,
            "licences": sorted({source["licence"] for source in manifest["sources"]}),
            "forms": _forms(manifest["sources"]),
            "splits": manifest["counts"]["splits"],
            "steps": manifest["steps"],
            "digest": manifest["digest"],
            "parts_found": self.found,
            "wall_s": round(self.wall_s, 3),
            "rows_per_s": round(self.rows_per_s, 1),
        }

    def table(self) -> list[tuple[str, Any]]:
        """What a person reads: the steps' facts in a line each, the rest in the manifest and on the card."""
        said = self.as_json()
        steps = [
            (kind, {name: value for name, value in facts.items() if _is_short(value)}) for kind, facts in said["steps"].items()
        ]
        shown = ("dataset", "read", *(["made"] if self.made else []), "kept", "dropped", "splits", "licences", "forms")
        last = [("card", str(self.dataset.path / "card.html")), ("rows_per_s", said["rows_per_s"])]
        return [*((name, said[name]) for name in shown), *steps, *last]


def _forms(sources: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The form found in each file; of many files, how many of which form a source has."""
    if len(sources) <= FILES_LISTED:
        return {_place(source): source["form"] for source in sources}
    found: dict[str, Counter[str]] = {}
    for source in sources:
        found.setdefault(source["source"], Counter())[source["form"]] += 1
    return {name: ", ".join(f"{form} ({count} files)" for form, count in forms.most_common()) for name, forms in found.items()}


def _is_short(value: Any) -> bool:
    return not isinstance(value, (dict, list)) or (len(value) <= 6 and all(not isinstance(one, (dict, list)) for one in value))


def _place(source: Mapping[str, Any]) -> str:
    """A file as its source names it: two sources may hold files of one name."""
    return str(source["source"] if source["source"].endswith(source["path"]) else f"{source['source']}/{source['path']}")
