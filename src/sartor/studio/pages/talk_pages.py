"""Talk: a conversation with an Adapter or a Release, its base beside it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from sartor.core.errors import ConfigError, UnavailableError
from sartor.studio.jobs.job_files import JobState, JobStatus
from sartor.studio.page_renderer import redirect, render
from sartor.studio.served_talk import BASE, Talk, address_of
from sartor.studio.visitor import PostedForm, Reviewer, Studio, studio_of, text_field

router = APIRouter()
VERB = "serve"
MAX_TEMPERATURE = 2.0


@router.get("/talk")
def targets(request: Request, visitor: Reviewer) -> Response:
    """List what can be talked to, and the servers that run."""
    studio = studio_of(request)
    artifacts, _ = studio.folder.scan()
    return render(
        request,
        visitor,
        "talk_targets",
        found=[item for item in artifacts if item.kind in ("release", "adapter") and item.artifact],
        served={status.job.out: status for status in _servers(studio)},
        root=studio.folder.root,
    )


def _servers(studio: Studio) -> list[JobStatus]:
    statuses = studio.jobs.files.statuses()
    return [status for status in statuses if status.job.verb == VERB and not status.state.is_over]


@router.post("/talk")
def open_server(request: Request, visitor: Reviewer, form: PostedForm) -> Response:
    """Serve an artefact, unless it is served, and go to its conversation."""
    assert visitor.user is not None
    studio = studio_of(request)
    name = text_field(form, "artefact")
    artifact = studio.folder.artifact(name, ("adapter", "release"))
    for status in _servers(studio):
        if status.job.out == str(artifact.path):
            return redirect(request, f"/talk/{status.job.id}")
    job = studio.jobs.start(
        [VERB, str(artifact.path), "--port", "0"],
        title=name,
        by=visitor.user.name,
        cwd=studio.folder.root,
        out=str(artifact.path),
        is_heavy=False,
    )
    return redirect(request, f"/talk/{job.id}")


@router.get("/talk/{job_id}")
def talk(request: Request, visitor: Reviewer, job_id: str) -> Response:
    """Show a conversation."""
    assert visitor.user is not None
    studio = studio_of(request)
    status = _server(studio, job_id)
    return render(
        request,
        visitor,
        "talk",
        title=status.job.title,
        status=status,
        is_ready=status.state is JobState.RUNNING and "address" in studio.jobs.files.result(job_id),
        turns=Talk(studio.talks, job_id, visitor.user.name).turns(),
        log=studio.jobs.log_lines(job_id)[-5:],
    )


def _server(studio: Studio, job_id: str) -> JobStatus:
    status = studio.jobs.files.status(job_id)
    if status.job.verb != VERB:
        raise ConfigError("this job is no server", "choose one on the page Talk")
    return status


@router.post("/talk/{job_id}")
def ask(request: Request, visitor: Reviewer, job_id: str, form: PostedForm) -> Response:
    """Ask the served artefact, and its base if wished, and show the conversation."""
    assert visitor.user is not None
    studio = studio_of(request)
    status = _server(studio, job_id)
    if status.state is not JobState.RUNNING:
        raise UnavailableError("the server has ended", "open it again on the page Talk")
    result = studio.jobs.files.result(job_id)
    address, agents = address_of(result), result.get("agents") or [BASE]
    sides = [str(agents[0]), *([BASE] if text_field(form, "compare") else [])]
    conversation = Talk(studio.talks, job_id, visitor.user.name)
    temperature = text_field(form, "temperature", max_chars=10)
    conversation.ask(
        address,
        list(dict.fromkeys(sides)),
        text_field(form, "prompt", max_chars=100_000),
        temperature=_temperature(temperature) if temperature else None,
    )
    return redirect(request, f"/talk/{job_id}")


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_TEMPERATURE:
        raise ConfigError(f"{text!a} is no temperature", f"a number from 0 to {MAX_TEMPERATURE:g}")
    return value


@router.post("/talk/{job_id}/clear")
def clear(request: Request, visitor: Reviewer, job_id: str, form: PostedForm) -> Response:
    """Delete the user's conversation."""
    assert visitor.user is not None
    studio = studio_of(request)
    Talk(studio.talks, _server(studio, job_id).job.id, visitor.user.name).clear()
    return redirect(request, f"/talk/{job_id}")
