"""Home: what the folder holds, what runs, and what needs a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import Response

from sartor.core.artifacts import Artifact
from sartor.core.html import flat
from sartor.studio.jobs.job_files import JobState, JobStatus
from sartor.studio.lineage_graph import draw_lineage
from sartor.studio.page_renderer import render
from sartor.studio.pages.job_pages import draw_losses
from sartor.studio.studio_folder import FoundArtifact
from sartor.studio.visitor import Viewer, studio_of

router = APIRouter()
# page of each kind of artefact
PAGES = {"dataset": "/data/", "report": "/evaluate/"}
RECENT_JOBS = 5
# keys of a manifest that the page of an artefact leaves out: long lists with places of their own
_LEFT_OUT = {"files", "parents", "sources", "schema", "kind", "id", "recipe", "gate", "exemplars"}
MAX_FACTS = 80


@dataclass(frozen=True)
class Need:
    """Something that waits for a person.

    key: of its text; name: what it is about; path: of the page where they act.
    """

    key: str
    name: str
    path: str


def page_of(found: FoundArtifact) -> str:
    """Return the path of an artefact's page."""
    return f"{PAGES.get(found.kind, '/artefact/')}{found.name}"


@router.get("/")
def home(request: Request, visitor: Viewer) -> Response:
    """Show artefacts with their parents, jobs, and what waits for a person."""
    studio = studio_of(request)
    artifacts, is_whole = studio.folder.scan()
    statuses = studio.jobs.files.statuses(50)
    return render(
        request,
        visitor,
        "home",
        artifacts=artifacts,
        is_whole=is_whole,
        graph=draw_lineage(artifacts),
        page_of=page_of,
        running=[(status, studio.jobs.progress(status)) for status in statuses if not status.state.is_over],
        recent=[status for status in statuses if status.state.is_over][:RECENT_JOBS],
        needs=list(_needs(artifacts, statuses)),
        free_bytes=studio.folder.free_bytes(),
    )


def _needs(artifacts: Sequence[FoundArtifact], statuses: Sequence[JobStatus]) -> Iterator[Need]:
    """Yield what waits for a person: damaged artefacts, jobs that failed and were not repeated, held-back results."""
    for found in artifacts:
        if found.problem:
            yield Need("home.damaged", found.name, f"/artefact/{found.name}")
    seen: set[tuple[str, ...]] = set()
    for status in statuses:  # newest first: of repeated commands the last one counts
        if status.job.arguments in seen:
            continue
        seen.add(status.job.arguments)
        path = f"/jobs/{status.job.id}"
        if status.state in (JobState.FAILED, JobState.LOST):
            yield Need(f"home.{status.state.value}", status.job.title, path)
        is_tailored = status.state is JobState.DONE and status.job.verb == "tailor"
        if is_tailored and status.result.get("release", "") is None:
            yield Need("home.held_back", status.job.title, path)


@router.get("/artefact/{name:path}")
def artifact_page(request: Request, visitor: Viewer, name: str) -> Response:
    """Show the facts of an artefact: what it was made of and what was made from it."""
    studio = studio_of(request)
    artifacts, _ = studio.folder.scan()
    artifact = studio.folder.artifact(name, ("dataset", "adapter", "report", "release", "duplicates", "export"))
    parents = {parent["id"] for parent in artifact.manifest.get("parents", [])}
    losses = studio.jobs.losses_of(artifact.path) if artifact.kind == "adapter" else None
    facts = flat({key: value for key, value in artifact.manifest.items() if key not in _LEFT_OUT})
    return render(
        request,
        visitor,
        "artefact",
        title=name,
        name=name,
        artifact=artifact,
        facts=list(facts.items())[:MAX_FACTS],
        gate=gate_of(artifact),
        parents=[found for found in artifacts if found.id in parents],
        children=[found for found in artifacts if found.artifact and artifact.id in _parents(found.artifact)],
        losses=losses,
        curve=draw_losses(losses),
        page_of=page_of,
    )


def _parents(artifact: Artifact) -> set[str]:
    return {parent["id"] for parent in artifact.manifest.get("parents", [])}


def gate_of(artifact: Artifact) -> list[tuple[str, str, str]]:
    """Return (check, outcome, detail) of a Release's gate; empty for other artefacts."""
    gate = artifact.manifest.get("gate", {})
    if not isinstance(gate, dict):
        return []
    return [(str(name), str(check.get("outcome", "")), str(check.get("detail", ""))) for name, check in gate.items()]
