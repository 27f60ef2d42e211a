"""Rendering of pages and errors, and the static files."""

from __future__ import annotations

import functools
import hashlib
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from sartor.core.errors import SartorError
from sartor.core.html import render_template
from sartor.studio.accounts import Role
from sartor.studio.jobs.job_files import shown_command
from sartor.studio.translations import has_text, option_texts, preferred_language, translator
from sartor.studio.visitor import Visitor, studio_of

LANGUAGE_COOKIE = "sartor-language"
STATIC = Path(__file__).parent / "static"
# (path, string, role) of the navigation
NAVIGATION = (
    ("/", "nav.home", Role.VIEWER),
    ("/data", "nav.data", Role.VIEWER),
    ("/review", "nav.review", Role.REVIEWER),
    ("/tune", "nav.tune", Role.VIEWER),
    ("/evaluate", "nav.evaluate", Role.VIEWER),
    ("/jobs", "nav.jobs", Role.VIEWER),
    ("/new", "nav.new", Role.OWNER),
    ("/talk", "nav.talk", Role.REVIEWER),
    ("/team", "nav.team", Role.VIEWER),
    ("/devices", "nav.devices", Role.VIEWER),
    ("/settings", "nav.settings", Role.OWNER),
)
# pages that belong to one of the navigation
_PARENTS = {
    **dict.fromkeys(("/row", "/sources", "/duplicates", "/recipe"), "/data"),
    "/agreement": "/review",
    "/slices": "/evaluate",
}
# sheets of the card and the report first, so that the studio looks like them
_SHEETS = ("core/page.css", "curate/card/colours.css", "curate/card/card.css", "studio/static/studio.css")


def language_of(request: Request) -> str:
    """Return the language of a visitor."""
    return preferred_language(request.cookies.get(LANGUAGE_COOKIE, ""), request.headers.get("accept-language", ""))


def render(
    request: Request, visitor: Visitor, template: str, *, status_code: int = 200, title: str = "", **context: Any
) -> Response:
    """Return a page. template: its name below studio/templates, without `.html.j2`."""
    studio, language = studio_of(request), language_of(request)
    root = request.scope.get("root_path", "")
    path = request.url.path.removeprefix(root) or "/"

    def url(target: str, **query: Any) -> str:
        shown = {key: value for key, value in query.items() if value not in ("", None)}
        return f"{root}{quote(target)}{f'?{urlencode(shown)}' if shown else ''}"

    text = render_template(
        f"studio/templates/{template}.html.j2",
        t=translator(language),
        has_text=has_text,
        describe=lambda text: option_texts(language).get(text, text),
        url=url,
        language=language,
        user=visitor.user,
        csrf=visitor.csrf,
        may_review=visitor.may(Role.REVIEWER),
        is_owner=visitor.may(Role.OWNER),
        navigation=[(target, key, _is_current(target, path)) for target, key, role in NAVIGATION if visitor.may(role)],
        digests={name: digest for name, (_, _, digest) in static_files().items()},
        here=f"{path}{f'?{request.url.query}' if request.url.query else ''}",
        folder=studio.folder.root.name,
        title=title,
        age=lambda moment: _age(moment, translator(language)),
        duration=lambda seconds: duration(seconds, translator(language)),
        command=shown_command,
        **context,
    )
    response = HTMLResponse(text, status_code)
    if visitor.is_new:
        response.set_cookie(
            studio.form_cookie,
            visitor.secret,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
            path=root or "/",
        )
    return response


def redirect(request: Request, target: str, **query: str) -> RedirectResponse:
    """Return a redirect to a page of the studio after a form was taken."""
    root = request.scope.get("root_path", "")
    return RedirectResponse(f"{root}{quote(target)}{f'?{urlencode(query)}' if query else ''}", 303)


def render_error(request: Request, visitor: Visitor, error: SartorError, status_code: int) -> Response:
    """Return a page that says what is wrong and what to do."""
    return render(request, visitor, "error", status_code=status_code, problem=error.problem, remedy=error.remedy)


def _is_current(target: str, path: str) -> bool:
    path = _PARENTS.get(f"/{path.split('/')[1]}", path)
    return path == "/" if target == "/" else path == target or path.startswith(f"{target}/")


def _age(moment: float, t: Any) -> str:
    """Return how long ago a Unix time was."""
    return str(t("time.ago", duration=duration(max(0.0, time.time() - moment), t)))


def duration(seconds: float, t: Any) -> str:
    """Return a duration in its largest unit."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return str(t(f"time.{unit}", count=round(seconds / size)))
    return str(t("time.seconds", count=round(seconds)))


@functools.cache
def static_files() -> dict[str, tuple[bytes, str, str]]:
    """Return {name: (content, media type, digest)} of the files that pages load."""
    contents = {
        "htmx.min.js": ((STATIC / "htmx.min.js").read_bytes(), "text/javascript"),
        "studio.js": ((STATIC / "studio.js").read_bytes(), "text/javascript"),
        "studio.css": ("\n".join(map(render_template, _SHEETS)).encode(), "text/css"),
        "icon.svg": ((STATIC / "icon.svg").read_bytes(), "image/svg+xml"),
    }
    return {
        name: (content, kind, hashlib.sha256(content).hexdigest()[:16]) for name, (content, kind) in contents.items()
    }
