"""Slices of a Report with their intervals, and the groups of its audit, from the Report's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sartor.core.errors import ArtifactError
from sartor.evaluate.bootstrap import paired_bootstrap
from sartor.evaluate.report_findings import report_findings
from studio_artefacts import adapter_of, dataset_of, report_of, report_row


def report_with(folder: Path, rows: list[dict[str, Any]], **facts: Any) -> Path:
    adapter = adapter_of(folder / "adapter", dataset_of(folder / "data", 10))
    return report_of(folder / "report", adapter, rows, **facts).path


def rows_of(values: list[tuple[str, float, float]]) -> list[dict[str, Any]]:
    """Rows whose reference says {"kind": value}, each a group of its own."""
    rows = []
    for index, (value, base, tuned) in enumerate(values):
        rows.append({**report_row(str(index), base, tuned), "reference": json.dumps({"kind": value})})
    return rows


def test_slice_has_the_interval_of_its_own_rows(tmp_path: Path) -> None:
    values = [("easy", 0.0, 1.0)] * 12 + [("hard", 1.0, 0.0)] * 8 + [("hard", 1.0, 1.0)] * 2
    found = report_findings(report_with(tmp_path, rows_of(values)))
    slices = {item.value: item for item in found.slices if item.field == "kind"}
    assert [item.value for item in found.slices if item.field == "kind"] == ["hard", "easy"]  # the loss comes first
    hard = [pair for pair in values if pair[0] == "hard"]
    expected = paired_bootstrap(
        [base for _, base, _ in hard], [tuned for _, _, tuned in hard], [str(index) for index in range(12, 22)]
    )
    assert (slices["hard"].low, slices["hard"].high) == (expected.low, expected.high)
    assert (slices["hard"].verdict, slices["easy"].verdict) == ("worse", "better")
    assert (slices["hard"].rows, slices["hard"].groups, slices["hard"].difference) == (10, 10, -0.8)


def test_rows_of_one_group_count_as_one(tmp_path: Path) -> None:
    rows = [
        {**row, "group": "one" if index < 12 else row["group"]}
        for index, row in enumerate(rows_of([("easy", 0.0, 1.0)] * 12 + [("hard", 0.0, 1.0)] * 12))
    ]
    slices = {item.value: item for item in report_findings(report_with(tmp_path, rows)).slices}
    assert (slices["easy"].groups, slices["easy"].verdict) == (1, "cannot tell")
    assert (slices["hard"].groups, slices["hard"].verdict) == (12, "better")


def test_fields_with_one_or_many_values_make_no_slices(tmp_path: Path) -> None:
    rows = [
        {**report_row(str(index), 0.0, 1.0), "reference": json.dumps({"same": "x", "other": index, "two": index % 2})}
        for index in range(40)
    ]
    found = report_findings(report_with(tmp_path, rows))
    assert {item.field for item in found.slices} == {"two"}


def test_media_and_labels_make_slices(tmp_path: Path) -> None:
    rows = [
        {
            **report_row(str(index), 0.0, 1.0),
            "reference": ("yes", "no")[index % 2],
            "media": "image" if index < 5 else "",
        }
        for index in range(20)
    ]
    found = report_findings(report_with(tmp_path, rows))
    assert {(item.field, item.value) for item in found.slices} == {
        (".", "yes"),
        (".", "no"),
        ("media", "image"),
        ("media", "text"),
    }


def test_rows_without_a_score_are_left_out(tmp_path: Path) -> None:
    rows = rows_of([("a", 0.0, 1.0)] * 4 + [("b", 0.0, 1.0)] * 4)
    rows[0]["base_exact_match"] = None
    slices = {item.value: item.rows for item in report_findings(report_with(tmp_path, rows)).slices}
    assert slices == {"a": 3, "b": 4}


def test_report_without_audit_has_no_checks(tmp_path: Path) -> None:
    found = report_findings(report_with(tmp_path, rows_of([("a", 0.0, 1.0)] * 4)))
    assert (found.people, dict(found.checks)) == ([], {})


def test_report_whose_rows_lack_a_column_is_refused(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "group"} for row in rows_of([("a", 0.0, 1.0)] * 4)]
    rows += [{**row, "reference": '{"kind": "b"}'} for row in rows]
    with pytest.raises(ArtifactError, match="does not state what a report states"):
        report_findings(report_with(tmp_path, rows))
