"""What a Release's Report measured: whether the agent is better than the base at all, and on which of the rows it is not.

A request is no better served by a specialist than by the base where the Report shows no gain. The whole is judged by its
interval, as the gate does. Its rows are few, so slices of them are judged by their mean: the base gets a slice of SLICE_LEAST
rows or more where the agent was on average no better.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sartor.agents.routing.features import Features, neighbours_of
from sartor.core import parquet_io
from sartor.core.artifacts import MANIFESTS
from sartor.core.errors import ArtifactError
from sartor.evaluate.metrics import LOWER_IS_BETTER
from sartor.release.gate import gain as checked

# Rows of a Report that are looked at, rows that make a slice on average, and the fewest of one that is judged
MEASURED = 200
SLICE_ROWS = 30
SLICE_LEAST = 10
# Of a metric of the whole set, what stands in the rows
BY_ROW = {"macro_f1": "accuracy"}


@dataclass(frozen=True)
class Measured:
    """A row of a Report: its prompt, its class ("" without), and by how much the tuned reply was better than the base's."""

    prompt: str
    label: str
    gain: float


@dataclass(frozen=True)
class Gain:
    """is_shown: whether the primary metric's interval lies on the better side of 0. detail: the figures in a sentence."""

    is_shown: bool
    detail: str
    rows: tuple[Measured, ...] = ()


@dataclass(frozen=True)
class Slices:
    """A Report's rows in slices. features: of M rows; of: (M,) the slice of each; gain, size: (S,)."""

    features: Features
    of: Any
    gain: Any
    size: Any

    def nearest(self, asked: Features) -> Any:
        """(N,): the slice that each text belongs to."""
        return neighbours_of(asked.likeness(self.features), self.of, len(self.gain)).argmax(axis=1)

    def lacks_gain(self, one: int) -> bool:
        """Whether the agent was no better than the base there."""
        return bool(self.size[one] >= SLICE_LEAST and self.gain[one] <= 0)

    def as_arrays(self) -> dict[str, Any]:
        """See `part.as_arrays`."""
        return {"slice_of": self.of, "slice_gain": self.gain, "slice_size": self.size, **self.features.as_arrays("slices")}

    @classmethod
    def from_arrays(cls, found: Mapping[str, Any]) -> Slices:
        """See `part.from_arrays`."""
        return cls(Features.from_arrays("slices", found), found["slice_of"], found["slice_gain"], found["slice_size"])


def read(release: Path) -> Gain | None:
    """What the Report inside a Release shows; None without a manifest. Raises ArtifactError where it is of another form."""
    if not (release / MANIFESTS["release"]).is_file():
        return None
    try:
        manifest = json.loads((release / MANIFESTS["release"]).read_text(encoding="utf-8"))
        name = manifest["primary"]
        check = checked(name, manifest["metrics"][name])
        column, sign = BY_ROW.get(name, name), -1 if name in LOWER_IS_BETTER else 1
        told = parquet_io.read_file(release / "report" / "rows.parquet")
        found = [
            Measured(row["prompt"], str(row.get("label") or ""), sign * (row[f"tuned_{column}"] - row[f"base_{column}"]))
            for row in told
            if row["prompt"].strip() and row.get(f"base_{column}") is not None and not row.get("media")
        ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the Report of {release.name} cannot be read: {error}", "release it again") from None
    return Gain(check.outcome == "pass", check.detail, tuple(found))


def sliced(found: Gain, features: Features) -> Slices | None:
    """The rows by their class where they have classes, else by likeness (average linkage); None for fewer than two slices."""
    rows = found.rows[: features.count]
    labels = [row.label for row in rows]
    if any(labels):
        place = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        of = np.array([place[label] for label in labels])
    elif len(rows) >= 2 * SLICE_ROWS:
        from sklearn.cluster import AgglomerativeClustering

        apart = 1 - features.likeness(features).astype(np.float64)
        how = AgglomerativeClustering(len(rows) // SLICE_ROWS, metric="precomputed", linkage="average")
        of = how.fit_predict((apart + apart.T) / 2)
    else:
        return None
    size = np.bincount(of)
    return Slices(features, of, np.bincount(of, [row.gain for row in rows]) / size, size) if len(size) > 1 else None
