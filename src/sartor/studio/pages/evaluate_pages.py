"""Evaluate: Reports with intervals, rows won and lost, slices and bias; the gate, releasing."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

import sartor
from sartor.core.artifacts import Artifact
from sartor.core.config import is_valid_name
from sartor.core.errors import ConfigError
from sartor.core.home import home
from sartor.studio.dataset_rows import EXAMPLES, RowTable, row_media
from sartor.studio.page_renderer import redirect, render
from sartor.studio.pages.home_page import gate_of
from sartor.studio.studio_folder import FoundArtifact
from sartor.studio.visitor import Owner, PostedForm, Studio, Viewer, studio_of, text_field

router = APIRouter()
PAGE_ROWS = 20
OUTCOMES = ("lost", "won", "both_wrong", "both_right", "unscored")
# checks that every gate has; those of a Report are known once a job has asked the gate
BASIC_CHECKS = ("gain", "forgetting", "licence")
MAX_WAIVERS = 20
_CHECK = re.compile(r"[A-Za-z0-9][\w.:-]{0,200}")
# end of the names of forgetting's probes among the metrics
FORGETTING = "(forgetting)"
# key that `sartor tailor` makes once on a machine, below SARTOR_HOME
DEFAULT_KEY = Path("keys/default")


@router.get("/evaluate")
def reports(request: Request, visitor: Viewer) -> Response:
    """List the Reports, and the Adapters that have none."""
    artifacts, _ = studio_of(request).folder.scan()
    found = [item for item in artifacts if item.kind == "report"]
    measured = {parent["id"] for item in found if item.artifact for parent in item.artifact.manifest["parents"]}
    unmeasured = [item for item in artifacts if item.kind == "adapter" and item.artifact and item.id not in measured]
    primaries = {item.name: _primary(item) for item in found}
    return render(request, visitor, "reports", found=found, unmeasured=unmeasured, primaries=primaries)


def _primary(found: FoundArtifact) -> dict[str, Any]:
    """Return the name and both values of a Report's primary metric; empty if its manifest does not state them."""
    try:
        assert found.artifact is not None
        manifest = found.artifact.manifest
        metric = manifest["metrics"][manifest["primary"]]
        return {"name": str(manifest["primary"]), "base": float(metric["base"]), "tuned": float(metric["tuned"])}
    except (AssertionError, KeyError, TypeError, ValueError):
        return {}


@router.post("/evaluate")
def evaluate(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Start the evaluation of an Adapter as a job."""
    studio = studio_of(request)
    name = text_field(form, "adapter")
    adapter = studio.folder.artifact(name, ("adapter", "release"))
    out = adapter.path.with_name(f"{adapter.path.name}-report")
    arguments = ["evaluate", str(adapter.path), "--out", str(out), "--replace"]
    job = studio.jobs.start(
        arguments, title=name, by=visitor.user.name if visitor.user else "", cwd=studio.folder.root, out=str(out)
    )
    return redirect(request, f"/jobs/{job.id}")


@router.get("/evaluate/{name:path}")
def report(request: Request, visitor: Viewer, name: str, rows: str = "lost", start: int = 0) -> Response:
    """Show a Report."""
    studio = studio_of(request)
    path = studio.folder.resolve(name)
    view = sartor.read_report(path)
    counts = Counter(row.outcome.value for row in view.rows)
    outcome = rows if rows in OUTCOMES else OUTCOMES[0]
    if rows == "lost" and not counts["lost"]:  # the page opens with rows that there are
        outcome = next((item for item in OUTCOMES if counts[item]), OUTCOMES[0])
    chosen = [row for row in view.rows if row.outcome.value == outcome]
    start = max(0, start)
    artifacts, _ = studio.folder.scan()
    manifest = view.report.manifest
    base = manifest.get("base")
    tuned = [found for found in artifacts if found.id in {parent["id"] for parent in manifest["parents"]}]
    released = _released(view.report, tuned, artifacts)
    shown = chosen[start : start + PAGE_ROWS]
    gate = gate_of(released.artifact) if released and released.artifact else _gate_of_jobs(studio, view.report)
    dataset, media = _media(studio, tuned, [row.id for row in shown if row.media])
    return render(
        request,
        visitor,
        "report",
        title=name,
        name=name,
        manifest=manifest,
        rows_measured=len(view.rows),
        base_name=base.get("name", "") if isinstance(base, dict) else "",
        primary=next(metric for metric in view.metrics if metric.name == view.primary),
        metrics=view.metrics,
        gains={metric.name: metric for metric in view.metrics if metric.is_gain},
        counts=counts,
        outcomes=OUTCOMES,
        outcome=outcome,
        rows=shown,
        dataset=dataset,
        media=media,
        start=start,
        next_start=start + PAGE_ROWS if start + PAGE_ROWS < len(chosen) else None,
        total=len(chosen),
        tuned=tuned,
        released=released,
        gate=gate,
        held_back=[check for check, outcome, _ in gate if outcome not in ("pass", "waived")] or BASIC_CHECKS,
    )


def _media(
    studio: Studio, tuned: list[FoundArtifact], ids: list[str]
) -> tuple[str, dict[str, tuple[int, list[dict[str, Any]]]]]:
    """Return the Dataset of the tuned model and {id: (position, pictures and recordings)} of rows that are in it."""
    if not ids:
        return "", {}
    artifacts, _ = studio.folder.scan()
    parents = {parent["id"] for found in tuned if found.artifact for parent in found.artifact.manifest["parents"]}
    for found in artifacts:
        if found.kind == "dataset" and found.artifact and found.id in parents:
            examples = RowTable(found.artifact, EXAMPLES)
            positions = examples.find(ids)
            rows = examples.take(list(positions.values()), ["messages", "rejected"])
            pairs = zip(positions.items(), rows, strict=True)
            return found.name, {identity: (position, row_media(row)) for (identity, position), row in pairs}
    return "", {}


@router.get("/slices/{name:path}")
def slices(request: Request, visitor: Viewer, name: str) -> Response:
    """Show a Report's slices, its forgetting, and what its audit found about groups of people."""
    path = studio_of(request).folder.resolve(name)
    view, findings = sartor.read_report(path), sartor.report_findings(path)
    fields: dict[str, list[Any]] = {}
    for item in findings.slices:
        fields.setdefault(item.field, []).append(item)
    sections: dict[str, list[Any]] = {}
    for group in findings.people:
        sections.setdefault(group.section, []).append(group)
    probes = view.report.manifest.get("probes") or {}
    return render(
        request,
        visitor,
        "report_slices",
        title=name,
        name=name,
        primary=view.primary,
        fields=fields,
        are_all_slices=findings.are_all_slices,
        sections=sections,
        checks=findings.checks,
        forgetting=[metric for metric in view.metrics if metric.name.endswith(FORGETTING)],
        skipped={probe: found["skipped"] for probe, found in probes.items() if "skipped" in found},
    )


def _released(report: Artifact, tuned: list[FoundArtifact], artifacts: list[FoundArtifact]) -> FoundArtifact | None:
    """Return the Release that was made with a Report, or of its Adapter."""
    wanted = {report.id, *(found.id for found in tuned if found.kind == "adapter")}
    for found in artifacts:
        if found.kind == "release" and found.artifact:
            parents = {parent["id"] for parent in found.artifact.manifest.get("parents", [])}
            if parents & wanted:
                return found
    return None


def _gate_of_jobs(studio: Studio, report: Artifact) -> list[tuple[str, str, str]]:
    """Return the gate's outcomes that a job printed for a Report; empty if there are none."""
    for status in studio.jobs.files.statuses():
        gate = status.result.get("gate")
        # a job that `sartor release` refused names its Report in its command alone
        is_about = str(report.path) in (status.result.get("report"), *status.job.arguments)
        if is_about and isinstance(gate, dict):
            return [(str(check), str(outcome), "") for check, outcome in gate.items()]
    return []


@router.post("/release")
def release(request: Request, visitor: Owner, form: PostedForm) -> Response:
    """Start the gate and the signing of an Adapter with its Report as a job."""
    studio = studio_of(request)
    report = studio.folder.artifact(text_field(form, "report"), ("report",))
    adapter = studio.folder.artifact(text_field(form, "adapter"), ("adapter",))
    name, version = text_field(form, "name"), text_field(form, "version")
    for label, value in (("name", name), ("version", version)):
        if not is_valid_name(value):
            raise ConfigError(f"{value[:40]!a} is no {label}", "lower-case letters, digits, - and .: faq, 1.0")
    key = home() / DEFAULT_KEY
    if not (key / "sartor.key").is_file():
        raise ConfigError(f"there is no key to sign with at {key}", f"sartor keygen {shlex.quote(str(key))} --trust")
    out = adapter.path.with_name(f"{name}-{version}")
    if out.exists():
        raise ConfigError(f"{studio.folder.name_of(out)} exists", "choose another version")
    arguments = ["release", str(adapter.path), "--name", name, "--version", version, "--key", str(key)]
    arguments += ["--report", str(report.path), "--out", str(out), *_waivers(form, visitor)]
    job = studio.jobs.start(
        arguments,
        title=f"{name}@{version}",
        by=visitor.user.name if visitor.user else "",
        cwd=studio.folder.root,
        out=str(out),
        is_heavy=False,
    )
    return redirect(request, f"/jobs/{job.id}")


def _waivers(form: PostedForm, visitor: Owner) -> list[str]:
    """Return the arguments by which checks are waived, in the name of the user who does it."""
    checks = [check for check in form.getlist("waive") if isinstance(check, str) and check]
    if not checks:
        return []
    reason = text_field(form, "reason", max_chars=1000)
    if not reason:
        raise ConfigError("a waiver has no reason", "say why the Release is right nevertheless")
    if len(checks) > MAX_WAIVERS or any(not _CHECK.fullmatch(check) for check in checks):
        raise ConfigError("these are no names of checks", "choose among those of the page")
    assert visitor.user is not None
    waived = [f"--waive={check}" for check in dict.fromkeys(checks)]
    return [*waived, f"--by={visitor.user.name}", f"--reason={reason}"]
