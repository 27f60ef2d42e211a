"""Who sends a request: the user of its session, or nobody; and the token of forms (CSRF).

The token of a form is a keyed digest of the session's secret, or of a cookie for visitors without a session, which a
page of elsewhere knows neither. Cookies are HttpOnly and SameSite=Strict. Their names end in the studio's id, since
browsers share cookies among the ports of a host.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

from fastapi import Depends, Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response

from sartor.core.errors import ConfigError, KeyRefusedError, RequestError, SartorError
from sartor.studio.accounts import SESSION_S, Accounts, Role, User
from sartor.studio.jobs.job_control import JobControl
from sartor.studio.reply_streams import RunningReplies
from sartor.studio.studio_folder import StudioFolder

CSRF_FIELD = "csrf"
# a recipe of many sources and steps has a field for each option
MAX_FIELDS, MAX_FIELD_BYTES = 2000, 2 << 20
_TOKEN = re.compile(r"[\w-]{20,80}")


class LoginRequiredError(SartorError):
    """A page that only users may see was asked for by a visitor without a session."""


@dataclass
class Studio:
    """What the pages of one studio share.

    id: distinguishes its cookies from those of other studios on the host.
    served_team: file of the team, or directory of the Adapter, whose server shows the studio; None if it stands alone.
    """

    folder: StudioFolder
    accounts: Accounts
    jobs: JobControl
    id: str
    max_upload_bytes: int
    served_team: Path | None = None
    replies: RunningReplies = field(default_factory=RunningReplies)

    @property
    def talks(self) -> Path:
        """Folder of conversations."""
        return self.folder.hidden / "talks"

    @property
    def session_cookie(self) -> str:
        """Name of the cookie that holds a session's secret."""
        return f"sartor-session-{self.id}"

    @property
    def form_cookie(self) -> str:
        """Name of the cookie by which forms of visitors without a session are protected."""
        return f"sartor-form-{self.id}"


@dataclass(frozen=True)
class Visitor:
    """Sender of a request. secret: from its cookie, or new; is_new: whether the cookie must be set."""

    user: User | None
    secret: str
    is_new: bool

    @property
    def csrf(self) -> str:
        """Token that each form sends back."""
        return hmac.new(self.secret.encode(), b"sartor studio form", "sha256").hexdigest()

    def may(self, role: Role) -> bool:
        """Return whether the visitor has a role, or one that includes it."""
        return self.user is not None and self.user.role.includes(role)


def studio_of(request: Request) -> Studio:
    """Return the studio to which a request goes."""
    return cast(Studio, request.app.state.studio)


def current_visitor(request: Request) -> Visitor:
    """Return the sender of a request."""
    studio = studio_of(request)
    token = request.cookies.get(studio.session_cookie, "")
    if _TOKEN.fullmatch(token) and (user := studio.accounts.user_of(token)):
        return Visitor(user, token, False)
    secret = request.cookies.get(studio.form_cookie, "")
    if _TOKEN.fullmatch(secret):
        return Visitor(None, secret, False)
    return Visitor(None, secrets.token_urlsafe(32), True)


AnyVisitor = Annotated[Visitor, Depends(current_visitor)]


def _require(role: Role) -> Callable[[Visitor], Visitor]:
    def check(visitor: AnyVisitor) -> Visitor:
        if visitor.user is None:
            raise LoginRequiredError("this page is for users of the studio", "log in")
        if not visitor.may(role):
            raise KeyRefusedError(
                f"this is for the role {role.value}; you are {visitor.user.role.value}",
                f"an owner can change that: sartor studio user add NAME --role {role.value}",
            )
        return visitor

    return check


Viewer = Annotated[Visitor, Depends(_require(Role.VIEWER))]
Reviewer = Annotated[Visitor, Depends(_require(Role.REVIEWER))]
Owner = Annotated[Visitor, Depends(_require(Role.OWNER))]


async def posted_form(request: Request, visitor: AnyVisitor) -> AsyncIterator[FormData]:
    """Yield the fields of a posted form, and close its files afterwards.

    Raises KeyRefusedError for a wrong CSRF token, RequestError for a form that cannot be read.
    """
    try:
        form = await request.form(max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except HTTPException as error:
        raise RequestError(f"the form cannot be read: {error.detail}", "send it from the studio's own page") from None
    try:
        token = form.get(CSRF_FIELD)
        if not isinstance(token, str) or not hmac.compare_digest(token.encode(), visitor.csrf.encode()):
            raise KeyRefusedError(
                "this form is older than your session, or not from this studio", "reload the page first"
            )
        yield form
    finally:
        await form.close()


PostedForm = Annotated[FormData, Depends(posted_form)]


def text_field(form: FormData, name: str, *, max_chars: int = 10_000) -> str:
    """Return a text of a form without surrounding white space; empty if it is absent. Raises ConfigError."""
    value: Any = form.get(name, "")
    if isinstance(value, UploadFile) or "\0" in value:
        raise ConfigError(f"the field {name} is no text", "type a text")
    value = value.strip()
    if len(value) > max_chars:
        raise ConfigError(f"the field {name} has {len(value):,} characters; at most {max_chars:,} fit", "shorten it")
    return str(value)


def set_session(response: Response, studio: Studio, token: str, *, is_secure: bool, path: str) -> None:
    """Put a session's secret into a cookie."""
    options: dict[str, Any] = {"httponly": True, "samesite": "strict", "secure": is_secure, "path": path}
    response.set_cookie(studio.session_cookie, token, max_age=int(SESSION_S), **options)
