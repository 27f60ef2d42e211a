"""Static files, login, one-time links, logout and the choice of the language."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from sartor.core.errors import ConfigError, KeyRefusedError, SartorError
from sartor.serving.http.http_errors import NotFoundError
from sartor.studio.page_renderer import LANGUAGE_COOKIE, redirect, render, static_files
from sartor.studio.passwords import MIN_PASSWORD_CHARS
from sartor.studio.translations import LANGUAGES
from sartor.studio.visitor import AnyVisitor, PostedForm, Visitor, set_session, studio_of, text_field

router = APIRouter()


@router.get("/static/{name}")
def static_file(name: str) -> Response:
    """Return a file that pages load. Its address has its digest, so browsers may keep it."""
    if name not in static_files():
        raise NotFoundError(f"there is no file {name[:80]!a}", "go to Home")
    content, kind, _ = static_files()[name]
    return Response(content, media_type=kind, headers={"cache-control": "public, max-age=31536000, immutable"})


@router.get("/login")
def login_page(request: Request, visitor: AnyVisitor, next: str = "/") -> Response:
    """Show the form of name and password."""
    if visitor.user:
        return redirect(request, "/")
    return render(request, visitor, "login", next=next, problem="")


@router.post("/login")
def log_in(request: Request, visitor: AnyVisitor, form: PostedForm) -> Response:
    """Begin a session and go to the page that was asked for."""
    studio, target = studio_of(request), text_field(form, "next")
    try:
        token = studio.accounts.log_in(text_field(form, "name"), _password(form))
    except KeyRefusedError as error:
        return render(
            request, visitor, "login", status_code=403, next=target, problem=f"{error.problem}: {error.remedy}"
        )
    response = _redirect_within(request, target)
    set_session(response, studio, token, is_secure=request.url.scheme == "https", path=_cookie_path(request))
    return response


@router.get("/welcome/{token}")
def welcome_page(request: Request, visitor: AnyVisitor, token: str) -> Response:
    """Show the form of a one-time link, which sets a password."""
    return _welcome(request, visitor, token, "", 200)


@router.post("/welcome/{token}")
def accept(request: Request, visitor: AnyVisitor, token: str, form: PostedForm) -> Response:
    """Set the password of a one-time link and begin a session."""
    accounts, password = studio_of(request).accounts, _password(form)
    try:
        if password != form.get("repeated"):
            raise ConfigError("the two passwords differ", "type the same one twice")
        user = accounts.accept(token, text_field(form, "name"), password)
    except KeyRefusedError:
        raise
    except SartorError as error:
        return _welcome(request, visitor, token, f"{error.problem}: {error.remedy}", 400)
    response = redirect(request, "/")
    session = accounts.log_in(user.name, password)
    set_session(
        response, studio_of(request), session, is_secure=request.url.scheme == "https", path=_cookie_path(request)
    )
    return response


def _welcome(request: Request, visitor: Visitor, token: str, problem: str, status_code: int) -> Response:
    invitation = studio_of(request).accounts.invitation(token)
    if invitation is None:
        raise KeyRefusedError(
            "this link was used, or is older than a day", "sartor studio user add NAME --role ROLE makes a new one"
        )
    return render(
        request,
        visitor,
        "welcome",
        status_code=status_code,
        invitation=invitation,
        token=token,
        problem=problem,
        min_chars=MIN_PASSWORD_CHARS,
    )


@router.post("/logout")
def log_out(request: Request, visitor: AnyVisitor, form: PostedForm) -> Response:
    """End the session."""
    studio = studio_of(request)
    if visitor.user:
        studio.accounts.log_out(visitor.secret)
    response = redirect(request, "/login")
    response.delete_cookie(studio.session_cookie, path=_cookie_path(request))
    return response


@router.post("/language")
def choose_language(request: Request, form: PostedForm) -> Response:
    """Keep the chosen language and show the same page again."""
    response = _redirect_within(request, text_field(form, "next"))
    language = text_field(form, "language")
    if language in LANGUAGES:
        response.set_cookie(
            LANGUAGE_COOKIE,
            language,
            max_age=365 * 24 * 3600,
            httponly=True,
            samesite="strict",
            path=_cookie_path(request),
        )
    return response


def _redirect_within(request: Request, target: str) -> Response:
    """Return a redirect to a path of the studio; to Home for anything else, such as another host."""
    is_path = target.startswith("/") and not target.startswith(("//", "/\\")) and target.isprintable()
    path, _, query = (target if is_path else "/").partition("?")
    response = redirect(request, path)
    if query:
        response.headers["location"] += f"?{query}"
    return response


def _password(form: PostedForm) -> str:
    value = form.get("password")
    return value if isinstance(value, str) else ""


def _cookie_path(request: Request) -> str:
    return request.scope.get("root_path", "") or "/"
