"""A Report as values for a page: verdicts of metrics, and rows that the tuned model won or lost.

It loads no torch, so that a server of pages may call it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ArtifactError
from sartor.core.parquet_io import read_file
from sartor.evaluate.metrics import LOWER_IS_BETTER

# Score that decides whether a row is right, for a metric of the whole set
_OF_ROW = {"macro_f1": "accuracy"}


class RowOutcome(StrEnum):
    """What tuning changed of a row, by the score of the primary metric."""

    WON = "won"
    LOST = "lost"
    BOTH_RIGHT = "both_right"
    BOTH_WRONG = "both_wrong"
    UNSCORED = "unscored"


@dataclass(frozen=True)
class MetricView:
    """A metric or a forgetting probe of base and tuned, with the interval of the difference.

    verdict: better, worse or "cannot tell". is_gain: whether it is a score in 0..1 of which more is better.
    """

    name: str
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    verdict: str
    is_gain: bool


@dataclass(frozen=True)
class RowView:
    """A row of a Report. base_score, tuned_score: by the primary metric; None where there is none."""

    id: str
    prompt: str
    reference: str
    base_reply: str
    tuned_reply: str
    base_score: float | None
    tuned_score: float | None
    outcome: RowOutcome
    media: str


@dataclass(frozen=True)
class ReportView:
    """A Report with verdicts and rows."""

    report: Artifact
    primary: str
    metrics: Sequence[MetricView]
    rows: Sequence[RowView]


def read_report(path: Path | str) -> ReportView:
    """Return a Report with the verdicts of its metrics and the outcome of each row.

    Raises ArtifactError for another artefact, a damaged one, and one whose manifest lacks what a Report states.
    """
    report = open_artifact(path, "report")
    manifest = report.manifest
    try:
        primary = manifest["primary"]
        metrics = []
        for name, metric, verdict in metric_verdicts(manifest):
            values = {key: float(metric[key]) for key in ("base", "tuned", "difference", "low", "high")}
            is_gain = name in manifest["metrics"] and name not in LOWER_IS_BETTER
            metrics.append(MetricView(name, **values, verdict=verdict, is_gain=is_gain))
        rows = [_row_view(row, primary) for row in read_file(report.path / "rows.parquet")]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # the manifest's id fits whoever wrote it; what stands in it may be anything
        raise ArtifactError(
            f"{report.path} does not state what a report states ({type(error).__name__}: {error})",
            "make it again: sartor evaluate ADAPTER --replace",
        ) from None
    return ReportView(report, primary, metrics, rows)


def metric_verdicts(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, float], str]]:
    """Yield the metrics and forgetting probes of a Report's manifest with their verdicts."""
    probe_rows = {
        f"{name} loss (forgetting)": probe
        for name, probe in report.get("probes", {}).items()
        if "skipped" not in probe
    }
    for name, metric in {**report["metrics"], **probe_rows}.items():
        is_lower = "loss" in name or name in LOWER_IS_BETTER
        better = metric["difference"] < 0 if is_lower else metric["difference"] > 0
        verdict = "better" if better else "worse"
        if metric["low"] <= 0 <= metric["high"]:
            verdict = "cannot tell"
        yield name, metric, verdict


def score_column(primary: str) -> str:
    """Return the score that decides whether a row is right by the primary metric."""
    return _OF_ROW.get(primary, primary)


def is_right(row: Mapping[str, Any], primary: str, side: str = "tuned") -> bool | None:
    """Return whether a reply to a row is right by the primary metric; None without a score.

    side: "tuned" or "base".
    """
    score = row[f"{side}_{score_column(primary)}"]
    if score is None:
        return None
    return bool(score <= 0 if primary in LOWER_IS_BETTER else score >= 1)


def _row_view(row: Mapping[str, Any], primary: str) -> RowView:
    column = score_column(primary)
    base, tuned = row.get(f"base_{column}"), row.get(f"tuned_{column}")
    outcome = RowOutcome.UNSCORED
    if base is not None and tuned is not None and math.isfinite(base) and math.isfinite(tuned):
        gain = base - tuned if primary in LOWER_IS_BETTER else tuned - base
        outcome = RowOutcome.BOTH_RIGHT if is_right(row, primary) else RowOutcome.BOTH_WRONG
        if gain:
            outcome = RowOutcome.WON if gain > 0 else RowOutcome.LOST
    return RowView(
        id=str(row["id"]),
        prompt=str(row["prompt"]),
        reference=str(row["reference"]),
        base_reply=str(row["base_reply"]),
        tuned_reply=str(row["tuned_reply"]),
        base_score=base,
        tuned_score=tuned,
        outcome=outcome,
        media=str(row.get("media") or ""),
    )
