"""Outermost checks of a studio's requests, and the headers of its answers.

The Host header must name this machine or the studio, so that no page of elsewhere reaches it by DNS rebinding. A
request that changes something must come from a page of the studio itself. A body may not exceed its limit. Each answer
has a Content-Security-Policy that allows the studio's own files alone: no inline script or style, no other host, no
frame.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sartor.serving.http.auth_middleware import is_loopback, is_same_host
from sartor.serving.http.http_errors import ForeignError
from sartor.serving.http.request_body import too_large

SAFE_METHODS = ("GET", "HEAD")
# bytes of a form; an upload has a limit of its own
MAX_FORM_BYTES = 4 << 20
UPLOAD_PATH = "/new/upload"
# of the picture or recording of a question: the limit of a server for the media of one request
MAX_MEDIA_BYTES = 10_000_000
_TALK_PATH = re.compile(r"/talk/[0-9a-z-]{1,60}")
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "content-security-policy": _CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(self)",
}


# no user's name before the host: EVIL@127.0.0.1
_HOST = re.compile(r"[\w.:\[\]-]{1,260}")


class RequestGuard:
    """ASGI middleware with the checks.

    hosts: names beside loopback by which the studio may be asked.
    max_upload_bytes: limit of an upload's body.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str], max_upload_bytes: int) -> None:
        self._app = app
        self._hosts = {host.lower() for host in hosts}
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request and pass it on. An error is put into the scope, for the application to answer."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        scope.setdefault("state", {})["refused"] = self._refusal(scope, headers)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        limit = self._max_upload_bytes if path == UPLOAD_PATH else MAX_FORM_BYTES
        if _TALK_PATH.fullmatch(path):
            limit += MAX_MEDIA_BYTES
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > limit:
            scope["state"]["refused"] = too_large(int(length[:20]), limit)
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise too_large(None, limit)
            return message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    answer.setdefault(name, value)
                answer.setdefault("cache-control", "no-store")
            await send(message)

        await self._app(scope, bounded, with_headers)

    def _refusal(self, scope: Scope, headers: Headers) -> ForeignError | None:
        host = headers.get("host", "")
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower() if _HOST.fullmatch(host) else ""
        except ValueError:
            name = ""
        if not (is_loopback(name) or name in self._hosts):
            return ForeignError(f"the host {name[:80]!a} is not this studio's", "sartor studio --hosts NAME allows it")
        if scope["method"] in SAFE_METHODS:
            return None
        origin, site = headers.get("origin", ""), headers.get("sec-fetch-site", "")
        if (origin and not is_same_host(origin, host)) or site not in ("", "same-origin", "none"):
            return ForeignError("a page of elsewhere may not change anything here", "use the studio's own pages")
        return None
