"""A Report as values: verdicts by the interval, outcome of a row by the primary metric, in its direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sartor.core.artifacts import open_artifact, write_artifact
from sartor.core.errors import ArtifactError
from sartor.evaluate.report_view import RowOutcome, _row_view, is_right, metric_verdicts, read_report
from studio_artefacts import adapter_of, dataset_of, report_of, report_row


def report_at(folder: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    adapter = adapter_of(folder / "adapter", dataset_of(folder / "data", 10))
    return report_of(folder / "report", adapter, rows).path


def test_report_has_verdicts_and_outcomes(tmp_path: Path) -> None:
    view = read_report(report_at(tmp_path))
    assert [(metric.name, metric.verdict, metric.is_gain) for metric in view.metrics] == [
        ("exact_match", "cannot tell", True),
        ("loss", "better", False),
    ]
    assert [row.outcome.value for row in view.rows] == ["won", "won", "lost", "both_right"]


@pytest.mark.parametrize(
    ("primary", "base", "tuned", "outcome"),
    [
        ("f1", 0.2, 0.4, RowOutcome.WON),
        ("f1", 0.4, 0.2, RowOutcome.LOST),
        ("f1", 0.4, 0.4, RowOutcome.BOTH_WRONG),
        ("f1", 1.0, 1.0, RowOutcome.BOTH_RIGHT),
        ("f1", None, 1.0, RowOutcome.UNSCORED),
        ("f1", float("nan"), 1.0, RowOutcome.UNSCORED),
        ("wer", 0.5, 0.1, RowOutcome.WON),
        ("wer", 0.1, 0.5, RowOutcome.LOST),
        ("wer", 0.0, 0.0, RowOutcome.BOTH_RIGHT),
        ("macro_f1", 0.0, 1.0, RowOutcome.WON),
    ],
)
def test_outcome_follows_the_direction_of_the_metric(
    primary: str, base: float | None, tuned: float | None, outcome: RowOutcome
) -> None:
    column = "accuracy" if primary == "macro_f1" else primary
    row = {**report_row("x", None, None), f"base_{column}": base, f"tuned_{column}": tuned}
    assert _row_view(row, primary).outcome is outcome


def test_side_is_right_by_its_own_score() -> None:
    row = report_row("x", 1.0, 0.0)
    assert is_right(row, "exact_match", "base") is True and is_right(row, "exact_match") is False


def test_probe_of_forgetting_is_better_when_lower() -> None:
    probe = {"base": 1.0, "tuned": 2.0, "difference": 1.0, "low": 0.5, "high": 1.5}
    report = {"metrics": {}, "probes": {"small_talk": probe, "german": {"skipped": "no rows"}}}
    assert [(name, verdict) for name, _, verdict in metric_verdicts(report)] == [
        ("small_talk loss (forgetting)", "worse")
    ]


def test_report_that_states_other_things_is_an_error(tmp_path: Path) -> None:
    path = report_at(tmp_path)

    def fill(part: Path) -> dict[str, object]:
        (part / "rows.parquet").write_bytes((path / "rows.parquet").read_bytes())
        return {
            "licence": "MIT",
            "parents": [],
            "metrics": {"exact_match": {"base": "high"}},
            "primary": "exact_match",
        }

    strange = write_artifact(tmp_path / "strange", "report", fill)
    with pytest.raises(ArtifactError):
        read_report(strange.path)
    assert open_artifact(strange.path).kind == "report"
    (path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtifactError):
        read_report(path)
