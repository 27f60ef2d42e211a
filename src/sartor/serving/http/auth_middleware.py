"""Authentication, rate limits and request log middleware.

The middleware wraps the FastAPI application, so that no exception of a route escapes. An unexpected exception is
logged by type and line, and the client gets an error with the request's id.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sartor.core.errors import KeyRefusedError, SartorError, UnavailableError
from sartor.serving.api_keys import Principal
from sartor.serving.http.http_errors import ASK_AGAIN_S, BUG, ForeignError, HttpError, UnknownKeyError, to_http_error
from sartor.serving.http.request_log import RequestLog, RequestRecord
from sartor.serving.http.services import ANYBODY, NOBODY, Authenticator, RateLimits
from sartor.serving.http.shutdown import ClientDisconnectedError, ServerLifetime
from sartor.serving.http.telemetry import Metrics, Tracer
from sartor.serving.team_config import Http, RequestLimits

PUBLIC = ("/health", "/openapi.json", "/.well-known/agent-card.json")
LOOPBACK_NAMES = ("localhost", "ip6-localhost")
# Status for the log only, as in nginx: the client disconnected before its answer
CLIENT_GONE = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Requests that count against the request rate: those that compute, or read or write the disk
_COUNTED = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/feedback", "/v1/audio/speech")
_COUNTED_READS = "/v1/receipts/"
# Headers by which proxies tell whom they speak for
_PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")
# Threads for key look-ups in the database. The loop's default threads may all be waiting for a slow disk.
_threads = ThreadPoolExecutor(4, "sartor-doors")


@dataclass(frozen=True)
class RequestGate:
    """Checks of a request before it is routed: connection limit, shutdown, key, origin and rate.

    connections: returns the number of open connections.
    """

    authenticator: Authenticator
    rates: RateLimits
    http: Http
    limits: RequestLimits
    lifetime: ServerLifetime
    connections: Callable[[], int]

    async def check(self, scope: Scope, headers: Headers) -> Principal:
        """Return the principal of a request; counts it against its key's rate.

        Raises UnknownKeyError, KeyRefusedError, ForeignError, BusyError (rate used up), UnavailableError (too many
        connections, a stopping server or unreadable keys).
        """
        if self.connections() > self.limits.connections:
            raise UnavailableError(
                f"{self.connections()} connections are open; the limit is {self.limits.connections}",
                "send it again after the seconds of Retry-After, or raise limits.connections in the team's file",
            )
        if self.lifetime.is_closing:
            raise UnavailableError(
                "the server is stopping and takes no more requests", f"ask another one, or this one in {ASK_AGAIN_S} s"
            )
        principal = await asyncio.get_running_loop().run_in_executor(_threads, self._enter, scope, headers)
        is_read = scope["method"] in ("GET", "HEAD") and scope["path"].startswith(_COUNTED_READS)
        if is_read or (scope["method"] == "POST" and scope["path"] in _COUNTED):
            self.rates.begin(principal.key)
        return principal

    def _enter(self, scope: Scope, headers: Headers) -> Principal:
        path = scope["path"]
        try:
            is_open = self.authenticator.is_open
        except UnavailableError as error:
            if path not in PUBLIC and scope["method"] != "OPTIONS":
                raise
            scope["state"]["shut"] = error  # /health reports it
            return NOBODY
        if is_open:
            self._check_foreign(scope, headers)
            principal = ANYBODY
        elif (path in PUBLIC and "authorization" not in headers) or scope["method"] == "OPTIONS":
            return NOBODY
        else:
            principal = self._principal(headers)
        is_admin_only = path.startswith("/v1/agents")
        if is_admin_only or (path == "/metrics" and not is_open and principal.agents is not None):
            self._check_admin(principal)
        return principal

    def _principal(self, headers: Headers) -> Principal:
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise UnknownKeyError(
                "no API key was sent", "send the header Authorization: Bearer KEY; `sartor agents key` makes keys"
            )
        try:
            return self.authenticator.admit(secret.strip())
        except KeyRefusedError as error:
            raise UnknownKeyError(error.problem, error.remedy) from None

    def _check_admin(self, principal: Principal) -> None:
        if not self.authenticator.has_admin:
            raise KeyRefusedError("the admin's routes are off: no admin key is set", "sartor agents key --admin")
        if not principal.is_admin:
            raise KeyRefusedError(
                "this is for the admin's key",
                "Authorization: Bearer KEY, with a key that sartor agents key --admin made",
            )

    def _check_foreign(self, scope: Scope, headers: Headers) -> None:
        """Raise ForeignError for a request of a foreign web page to a server without keys.

        Anybody who reaches such a server may use it, and a page in the user's browser reaches loopback by DNS
        rebinding
        or by a form. The Host header must therefore name this machine, and the Origin must be this server or be
        allowed. Behind a proxy every client comes from loopback, and the Host header may be the proxy's own: what
        shows a proxy is refused. HTTP/1.0 is what nginx's `proxy_pass` speaks if nothing else is set.
        """
        if scope.get("http_version") == "1.0" or _is_passed_on(headers):
            raise ForeignError(
                "this server has no keys, and a proxy passed this request on, so that anybody could have sent it",
                "sartor agents key NAME, then send the key; or ask the server itself, by HTTP/1.1",
            )
        named = headers.get("host", "")
        try:
            host = "" if "@" in named else urlsplit(f"//{named}").hostname or ""
        except ValueError:
            host = ""
        if not (is_loopback(host) or host == self.http.host):
            raise ForeignError(f"the host {host[:80]!a} is not this server's", f"ask http://{self.http.host}:PORT")
        origin = headers.get("origin", "")
        if origin and origin not in self.http.cors and not is_same_host(origin, headers.get("host", "")):
            raise ForeignError(
                f"a page of {origin[:80]!a} may not ask this server", "name the origin in http.cors of TEAM.yaml"
            )


def _is_passed_on(headers: Headers) -> bool:
    """Return whether the headers show a proxy. There are more of the form X-Forwarded-* than those that are named."""
    return any(name in _PROXY_HEADERS or name.startswith("x-forwarded-") for name in headers)


def is_same_host(origin: str, host: str) -> bool:
    """Return whether an Origin header names the host and port of a Host header."""
    try:
        return urlsplit(origin).netloc == urlsplit(f"//{host}").netloc
    except ValueError:  # for example an opening bracket alone
        return False


def is_loopback(host: str) -> bool:
    """Return whether a host name or address means this machine, so that no other machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in LOOPBACK_NAMES


class AuthMiddleware:
    """Outermost ASGI application: request id, checks, error answers, metrics, log and trace of each request."""

    def __init__(self, app: ASGIApp, gate: RequestGate, log: RequestLog, metrics: Metrics, tracer: Tracer) -> None:
        self._app = app
        self._gate = gate
        self._log = log
        self._metrics = metrics
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request. No exception of the application escapes."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(12)
        record = RequestRecord(request_id, scope["method"])
        scope.setdefault("state", {})["entry"] = record
        responder = _Responder(send, record)
        with self._tracer.span(record, headers):
            try:
                record.principal = await self._gate.check(scope, headers)
                await self._app(scope, receive, responder.send)
            except ClientDisconnectedError:
                record.error = "Gone"
            except SartorError as error:
                await responder.send_error(to_http_error(error))
            except Exception as error:
                self._log.bug(record, error)
                await responder.send_error(BUG)
            finally:
                self._finish(record, scope)

    def _finish(self, record: RequestRecord, scope: Scope) -> None:
        route = scope.get("route")
        record.route = route.path if route is not None else "other"
        record.status = record.status or CLIENT_GONE
        if record.usage.total:
            self._gate.rates.count(record.principal.key, record.usage.total)
        self._metrics.count(record)
        self._log.request(record)


class _Responder:
    """Sender that notes the response status and adds the header `x-request-id`."""

    def __init__(self, send: Send, record: RequestRecord) -> None:
        self._send = send
        self._record = record

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._record.id
        await self._send(message)

    async def send_error(self, fault: HttpError) -> None:
        """Send an error response, unless a response has already begun."""
        self._record.error = fault.kind
        if not self._record.status:
            body = json.dumps(fault.as_json()).encode()
            fields: dict[str, Any] = {
                "content-type": "application/json",
                "content-length": len(body),
                **fault.headers,
            }
            headers = [(name.encode(), str(value).encode()) for name, value in fields.items()]
            await self.send({"type": "http.response.start", "status": fault.status, "headers": headers})
            await self._send({"type": "http.response.body", "body": body})
