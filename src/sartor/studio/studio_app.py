"""The studio's ASGI application."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sartor.core.errors import MissingError, RequestError, SartorError
from sartor.core.filesystem import DISK_FULL
from sartor.serving.http.http_errors import NotFoundError, to_http_error
from sartor.studio.accounts import Accounts
from sartor.studio.jobs.job_control import JobControl
from sartor.studio.page_renderer import redirect, render_error
from sartor.studio.pages import (
    data_pages,
    device_pages,
    evaluate_pages,
    home_page,
    job_pages,
    login_pages,
    new_pages,
    recipe_pages,
    review_pages,
    settings_pages,
    talk_pages,
    team_pages,
    tune_pages,
    why_pages,
)
from sartor.studio.request_guard import RequestGuard
from sartor.studio.studio_folder import StudioFolder
from sartor.studio.visitor import LoginRequiredError, Studio, Visitor, current_visitor

MAX_UPLOAD_BYTES = 512 << 20
_log = logging.getLogger(__name__)


class StudioApp:
    """ASGI application of a studio on a folder.

    hosts: host names, beside those of loopback, by which browsers may ask it.
    max_upload_bytes: largest file that is taken.
    team: file of the team, or directory of the Adapter, that the server below which it is mounted serves.
    Raises ConfigError for a folder that does not exist, and what opening its accounts raises.
    """

    def __init__(
        self,
        root: Path,
        *,
        hosts: Collection[str] = (),
        max_upload_bytes: int = MAX_UPLOAD_BYTES,
        team: Path | None = None,
    ) -> None:
        folder = StudioFolder(root)
        accounts = Accounts(folder.accounts_file)
        self.studio = Studio(
            folder=folder,
            accounts=accounts,
            jobs=JobControl(folder.hidden / "jobs"),
            id=accounts.setting("studio_id", lambda: secrets.token_hex(4)),
            max_upload_bytes=max_upload_bytes,
            served_team=team.resolve() if team else None,
        )
        self._asgi: ASGIApp = RequestGuard(_application(self.studio), hosts=hosts, max_upload_bytes=max_upload_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        await self._asgi(scope, receive, send)

    def owner_path(self) -> str:
        """Return the path of a new one-time link for the first owner; empty if there is an owner."""
        token = self.studio.accounts.invite_owner()
        return f"/welcome/{token}" if token else ""

    def close(self) -> None:
        """Close the accounts. Jobs go on."""
        self.studio.accounts.close()


def _application(studio: Studio) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.studio = studio
    groups = (
        login_pages,
        home_page,
        data_pages,
        recipe_pages,
        review_pages,
        evaluate_pages,
        job_pages,
        tune_pages,
        new_pages,
        talk_pages,
        why_pages,
        team_pages,
        device_pages,
        settings_pages,
    )
    for group in groups:
        app.include_router(group.router)
    app.add_exception_handler(SartorError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(OSError, _on_os_error)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(_Refusals)
    return app


class _Refusals:
    """Middleware within the error handlers: raises what the guard has found, so that a page answers it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = scope.get("state", {}).get("refused")
        if refused is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        response = render_error(request, _nobody(), refused, to_http_error(refused).status)
        await response(scope, receive, send)


def _nobody() -> Visitor:
    return Visitor(None, secrets.token_urlsafe(32), False)


def _visitor(request: Request) -> Visitor:
    """Return the sender of a request whose answer is an error; nobody if the accounts cannot be read."""
    try:
        return current_visitor(request)
    except SartorError:
        return _nobody()


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SartorError)
    if isinstance(error, LoginRequiredError):
        if request.headers.get("hx-request"):  # htmx follows redirects within the page
            return Response(status_code=401, headers={"hx-refresh": "true"})
        query = f"?{request.url.query}" if request.url.query else ""
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        return redirect(request, "/login", next=f"{path}{query}" if request.method == "GET" else "/")
    return render_error(request, _visitor(request), error, to_http_error(error).status)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    missing = NotFoundError(f"there is no page {ascii(request.url.path)[1:-1][:200]}", "go to Home")
    return render_error(request, _visitor(request), missing, error.status_code)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    fields = ", ".join(str(problem["loc"][-1]) for problem in error.errors())[:200]
    wrong = RequestError(f"the address of this page has a wrong value of {fields}", "go back, and follow a link")
    return render_error(request, _visitor(request), wrong, 400)


async def _on_os_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    if error.errno not in DISK_FULL:
        return await _on_bug(request, error)
    full = MissingError("the disk is full: nothing was written", "df -h shows the full disk; remove something there")
    return render_error(request, _visitor(request), full, 507)


async def _on_bug(request: Request, error: Exception) -> Response:
    number = secrets.token_hex(4)
    _log.error("studio: %s in %s %s", number, request.method, request.url.path, exc_info=error)
    bug = SartorError("the studio made a mistake; nothing was lost", f"report the number {number} and the log")
    return render_error(request, _visitor(request), bug, 500)
