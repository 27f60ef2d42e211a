"""Jobs: the list, one job live by server-sent events, stop and start again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from sartor.core.errors import KeyRefusedError
from sartor.studio.accounts import Role
from sartor.studio.jobs.job_control import GRACE_S, JobProgress
from sartor.studio.jobs.job_files import JobStatus
from sartor.studio.jobs.training_logs import Losses
from sartor.studio.page_renderer import redirect, render
from sartor.studio.tuning_runs import foreign_runs
from sartor.studio.visitor import Owner, PostedForm, Reviewer, Studio, Viewer, studio_of

router = APIRouter()
# seconds between two looks at a job, and after which a stream ends (browsers then open another one)
LOOK_S, STREAM_S = 1.0, 600.0
CURVE_WIDTH, CURVE_HEIGHT = 700, 180


@dataclass(frozen=True)
class LossCurve:
    """Losses as SVG: points of a polyline, and dots of the held-out rows.

    low, high: losses at the lower and upper end.
    """

    points: str
    dots: list[tuple[float, float]]
    low: float
    high: float
    last_update: int


def draw_losses(losses: Losses | None) -> LossCurve | None:
    """Return the curve of losses; None without two of them."""
    if losses is None or len(losses.updates) < 2:
        return None
    values = [loss for _, loss in (*losses.updates, *losses.held_out)]
    low, high = min(values), max(values)
    first, last = losses.updates[0][0], losses.updates[-1][0]

    def place(update: int, loss: float) -> tuple[float, float]:
        x = (update - first) / max(last - first, 1) * CURVE_WIDTH
        y = CURVE_HEIGHT - (loss - low) / max(high - low, 1e-9) * CURVE_HEIGHT
        return round(min(max(x, 0.0), CURVE_WIDTH), 1), round(y, 1)

    points = " ".join(f"{x},{y}" for x, y in (place(*point) for point in losses.updates))
    return LossCurve(points, [place(*point) for point in losses.held_out], low, high, last)


@router.get("/jobs")
def jobs(request: Request, visitor: Viewer) -> Response:
    """List the jobs, the newest first."""
    studio = studio_of(request)
    statuses = studio.jobs.files.statuses()
    shown = [(status, studio.jobs.progress(status)) for status in statuses]
    return render(request, visitor, "jobs", statuses=shown, foreign=foreign_runs(studio))


@router.get("/jobs/{job_id}")
def job(request: Request, visitor: Viewer, job_id: str) -> Response:
    """Show a job."""
    status = studio_of(request).jobs.files.status(job_id)
    return render(request, visitor, "job", title=status.job.title, **_context(studio_of(request), status))


def _context(studio: Studio, status: JobStatus) -> dict[str, Any]:
    losses = studio.jobs.losses(status.job)
    progress: JobProgress | None = studio.jobs.progress(status)
    return {
        "status": status,
        "progress": progress,
        "losses": losses,
        "curve": draw_losses(losses),
        "log": studio.jobs.log_lines(status.job.id),
        "links": _links(studio, status),
        "tuning": studio.folder.name_of(Path(status.job.adapter)) if status.job.adapter else "",
        "grace_s": GRACE_S,
    }


def _links(studio: Studio, status: JobStatus) -> list[tuple[str, str]]:
    """Return (path of a page, name) of the artefacts that a job's result names."""
    pages = {"dataset": "/data/", "report": "/evaluate/", "adapter": "/artefact/", "release": "/artefact/"}
    links = []
    for key, page in pages.items():
        value = status.result.get(key)
        name = studio.folder.name_of(studio.folder.root / value) if isinstance(value, str) and value else ""
        if name:
            links.append((f"{page}{name}", name))
    return links


@router.get("/jobs/{job_id}/events")
async def events(request: Request, visitor: Viewer, job_id: str) -> Response:
    """Stream the changing part of a job's page: an event of HTML whenever it differs, and `end` at the job's end."""
    studio = studio_of(request)
    await asyncio.to_thread(studio.jobs.files.status, job_id)  # an unknown job is an error page

    def look() -> tuple[str, bool]:
        status = studio.jobs.files.status(job_id)
        page = render(request, visitor, "job_live", **_context(studio, status))
        return bytes(page.body).decode(), status.state.is_over

    return stream_part(request, look)


def stream_part(request: Request, look: Callable[[], tuple[str, bool]]) -> Response:
    """Return a stream of a page's changing part. look: returns its HTML, and whether it is over."""
    headers = {"x-accel-buffering": "no"}
    return StreamingResponse(_stream(request, look), media_type="text/event-stream", headers=headers)


async def _stream(request: Request, look: Callable[[], tuple[str, bool]]) -> AsyncIterator[str]:
    shown, end = "", time.monotonic() + STREAM_S
    while time.monotonic() < end and not await request.is_disconnected():
        html, is_over = await asyncio.to_thread(look)
        if html != shown:
            shown = html
            yield "".join(f"data: {line}\n" for line in html.split("\n")) + "\n"
        if is_over:
            yield "event: end\ndata: over\n\n"
            return
        await asyncio.sleep(LOOK_S)


@router.post("/jobs/{job_id}/stop")
def stop(request: Request, visitor: Reviewer, job_id: str, form: PostedForm) -> Response:
    """Ask a job to stop: an owner any, others what they started, such as the server of a conversation."""
    assert visitor.user is not None
    jobs = studio_of(request).jobs
    if not visitor.may(Role.OWNER) and jobs.files.job(job_id).by != visitor.user.name:
        raise KeyRefusedError("this job is somebody else's", "ask them, or an owner")
    jobs.stop(job_id, by=visitor.user.name)
    return redirect(request, f"/jobs/{job_id}")


@router.post("/jobs/{job_id}/again")
def again(request: Request, visitor: Owner, job_id: str, form: PostedForm) -> Response:
    """Start the command of an ended job again."""
    assert visitor.user is not None
    started = studio_of(request).jobs.again(job_id, by=visitor.user.name)
    return redirect(request, f"/jobs/{started.id}")
