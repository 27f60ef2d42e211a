"""Findings of a Report beside its metrics: slices of its rows, and its audit's groups and checks.

A slice holds the rows whose reference has one value in one field, or that have one kind of media. Its gain has the
interval of the metrics (bootstrap.py), over the groups of its rows. The intervals are not corrected for the number of
slices: with many of them, one in twenty excludes 0 by chance. It loads no torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.core.artifacts import open_artifact
from sartor.core.errors import ArtifactError
from sartor.core.parquet_io import read_file
from sartor.evaluate.bootstrap import paired_bootstrap
from sartor.evaluate.limits import Check, audit_checks
from sartor.evaluate.metrics import LOWER_IS_BETTER
from sartor.evaluate.reply_labels import WHOLE, known_fields, label_of
from sartor.evaluate.report_view import score_column

MEDIA_FIELD = "media"
TEXT_ONLY = "text"
# values of a field that makes slices, and slices of a Report; rows of a slice
MAX_VALUES, MAX_SLICES, MIN_ROWS = 12, 60, 2


@dataclass(frozen=True)
class SliceView:
    """Rows of a Report with one value of a field, by the primary metric.

    field: key of the references' JSON, `.` for the whole reference, or `media`.
    groups: number of groups of rows. verdict: better, worse or "cannot tell".
    """

    field: str
    value: str
    rows: int
    groups: int
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class GroupView:
    """A group of people in the audit: the rate of an outcome, and its gap from the other groups.

    section: "own" or the name of the templates.
    rate, others: 0 to 1. gap, added: estimate, low and high; added is what tuning added to the gap.
    p: corrected within the section.
    """

    section: str
    kind: str
    group: str
    outcome: str
    prompts: int
    rate: float
    others: float
    gap: tuple[float, float, float]
    added: tuple[float, float, float]
    p: float


@dataclass(frozen=True)
class ReportFindings:
    """Findings of a Report. checks: of its audit, at the gate's default limits; empty without an audit."""

    slices: Sequence[SliceView]
    people: Sequence[GroupView]
    checks: Mapping[str, Check]
    are_all_slices: bool = True


def report_findings(path: Path | str) -> ReportFindings:
    """Return the slices of a Report's rows, and what its audit found.

    Raises ArtifactError for another artefact, a damaged one, and one whose manifest lacks what a Report states.
    """
    report = open_artifact(path, "report")
    return _findings(report.path, report.id)


@functools.lru_cache(maxsize=16)
def _findings(path: Path, identity: str) -> ReportFindings:
    """Return the findings of the Report with an id; the intervals of many slices take seconds."""
    manifest = open_artifact(path, "report").manifest
    try:
        audit = manifest.get("audit") or {}
        slices = list(_slices(list(read_file(path / "rows.parquet")), manifest["primary"]))
        return ReportFindings(
            slices=slices[:MAX_SLICES],
            people=list(_people(audit.get("bias") or {})),
            checks=audit_checks(audit, None, None),
            are_all_slices=len(slices) <= MAX_SLICES,
        )
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ArtifactError(
            f"{path} does not state what a report states ({type(error).__name__}: {error})",
            "make it again: sartor evaluate ADAPTER --replace",
        ) from None


def _slices(rows: Sequence[Mapping[str, Any]], primary: str) -> Iterator[SliceView]:
    """Yield the slices, field by field, the largest loss of each field first."""
    column = score_column(primary)
    scored = [row for row in rows if _is_scored(row, column)]
    # a row of a Report is as long as a reply; labels of a very long one are no slices
    fields = known_fields(str(row["reference"])[:10_000] for row in scored)[: 2 * MAX_VALUES] or [WHOLE]
    labels = {field: [label_of(str(row["reference"]), field) for row in scored] for field in fields}
    labels[MEDIA_FIELD] = [str(row.get("media") or TEXT_ONLY) for row in scored]
    for field, values in labels.items():
        known_values = sorted({value for value in values if value is not None})
        if not 2 <= len(known_values) <= min(MAX_VALUES, max(2, len(scored) // 2)):
            continue
        found = []
        for value in known_values:
            chosen = [row for row, own in zip(scored, values, strict=True) if own == value]
            if len(chosen) >= MIN_ROWS:
                found.append(_slice(field, value, chosen, primary))
        is_lower_better = primary in LOWER_IS_BETTER
        yield from sorted(found, key=lambda item: -item.difference if is_lower_better else item.difference)


def _is_scored(row: Mapping[str, Any], column: str) -> bool:
    scores = (row.get(f"base_{column}"), row.get(f"tuned_{column}"))
    return all(score is not None and math.isfinite(score) for score in scores)


def _slice(field: str, value: str, rows: Sequence[Mapping[str, Any]], primary: str) -> SliceView:
    column = score_column(primary)
    groups = [str(row["group"]) for row in rows]
    base, tuned = ([float(row[f"{side}_{column}"]) for row in rows] for side in ("base", "tuned"))
    comparison = paired_bootstrap(base, tuned, groups)
    return SliceView(
        field=field,
        value=value,
        rows=len(rows),
        groups=len(set(groups)),
        base=comparison.base,
        tuned=comparison.tuned,
        difference=comparison.difference,
        low=comparison.low,
        high=comparison.high,
        verdict=comparison.verdict(higher_is_better=primary not in LOWER_IS_BETTER),
    )


def _people(bias_audit: Mapping[str, Any]) -> Iterator[GroupView]:
    """Yield the groups of each section of an audit, the largest gap of a section first."""
    sections = {"own": bias_audit.get("own") or {}, **(bias_audit.get("templates") or {})}
    for name, section in sections.items():
        for finding in sorted(section.get("findings") or [], key=lambda item: -abs(item["gap"][0])):
            gap, added = (tuple(map(float, finding[key])) for key in ("gap", "added"))
            yield GroupView(
                section=str(name),
                kind=str(finding["kind"]),
                group=str(finding["group"]),
                outcome=str(finding["outcome"]),
                prompts=int(finding["blocks"]),
                rate=float(finding["rate"]),
                others=float(finding["others"]),
                gap=(gap[0], gap[1], gap[2]),
                added=(added[0], added[1], added[2]),
                p=float(finding["p"]),
            )
