"""Uvicorn server with connection limits and draining.

`HttpServer(services, team).serve(sock)` runs until a signal. `sartor serve` builds the services first (startup.py).

uvicorn bounds the size of a request's head and the idle time between two requests. This module handles the rest: heads
and bodies that trickle in, clients that do not read their response, and too many connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import resource
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sartor.core.errors import ConfigError, UnavailableError
from sartor.serving.feedback_intake import FeedbackIntake
from sartor.serving.feedback_store import Memory
from sartor.serving.http import app as openapi
from sartor.serving.http.app import build_app
from sartor.serving.http.app_state import AppState
from sartor.serving.http.auth_middleware import AuthMiddleware, RequestGate, is_loopback
from sartor.serving.http.http_errors import HttpError
from sartor.serving.http.mcp_server import McpServer
from sartor.serving.http.media_checks import MediaChecker
from sartor.serving.http.request_body import BodyReader
from sartor.serving.http.request_log import LOGGERS, RequestLog, ServerLines
from sartor.serving.http.routes import admin, completions, embeddings, feedback, models, speech, system
from sartor.serving.http.services import Authenticator, Services
from sartor.serving.http.shutdown import ServerLifetime
from sartor.serving.http.telemetry import Metrics, Tracer
from sartor.serving.team_config import Http, Team

# Connections beyond limits.connections get an error response. Beyond this number more, they are closed unanswered.
SPARE_CONNECTIONS = 128
# Response bytes that one client may leave unread: buffered in this process, and in the kernel
UNREAD_BYTES = 64 << 10
KERNEL_BYTES = 256 << 10
_MALFORMED = HttpError(
    400,
    type="invalid_request_error",
    code="invalid_http",
    problem="this is not an HTTP request",
    remedy="send HTTP/1.1 with a head below 64 KiB",
    kind="RequestError",
)


class Connection(H11Protocol):
    """HTTP/1.1 connection that can be cut when it is slow.

    most: limit for the connections of the server; `protocol_with` sets it.
    """

    most = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._idle_since: float | None = None
        self._idle_cycle: object = None
        self._unread_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Bound the write buffer, and close the connection if there are too many."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNREAD_BYTES)
        if len(self.connections) > self.most + SPARE_CONNECTIONS:
            transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with an error in OpenAI's form, and close the connection."""
        if self.conn.our_state is not h11.IDLE:  # a response has begun, so no other can be sent
            self.transport.close()
            return
        body = json.dumps(_MALFORMED.as_json()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"connection", b"close"),
            (b"content-length", b"%d" % len(body)),
        ]
        for event in (
            h11.Response(status_code=400, reason=b"Bad Request", headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def cut_if_slow(self, now: float, limit_s: float) -> bool:
        """Abort the connection if it is slow; return whether it was aborted.

        It is slow if for more than `limit_s` it has had no complete request, or has not read its response.
        now: time of the event loop's clock, s.
        """
        idle = self.cycle is None or self.cycle.response_complete
        if not idle:
            self._idle_since = None
        elif self._idle_since is None or self._idle_cycle is not self.cycle:
            self._idle_since, self._idle_cycle = now, self.cycle
        stuck = self.flow.write_paused or self.transport.is_closing()
        if not stuck:
            self._unread_since = None
        elif self._unread_since is None:
            self._unread_since = now
        if any(since is not None and now - since > limit_s for since in (self._idle_since, self._unread_since)):
            self.transport.abort()
            return True
        return False


def protocol_with(max_connections: int) -> type[Connection]:
    """Return the connection class of a server with this connection limit."""
    return type("BoundedConnection", (Connection,), {"most": max_connections})


async def watch(connections: Iterable[Any], limit_s: float, on_cut: Callable[[int], object]) -> None:
    """Abort slow clients until cancelled.

    connections: the live collection, read again each time. on_cut: called with the number of aborted connections.
    """
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(min(1.0, limit_s / 4))
        if cut := sum(connection.cut_if_slow(loop.time(), limit_s) for connection in list(connections)):
            on_cut(cut)


def listen(host: str, port: int) -> socket.socket:
    """Return a bound TCP socket.

    Raises OSError or OverflowError if the address or port cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's algorithm only if the protocol is given as IPPROTO_TCP. Otherwise each answer waits
    # 40 ms for an ACK.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
        sock.bind((host, port))
    except (OSError, OverflowError):
        sock.close()
        raise
    return sock


def bind_error(host: str, port: int, error: OSError | OverflowError) -> ConfigError:
    """Return the error for an address that `listen` could not bind."""
    reason, code = (error.strerror, error.errno) if isinstance(error, OSError) else (error, None)
    is_of_port = code in (None, errno.EADDRINUSE, errno.EACCES)
    remedy = "--port 0 takes a free port" if is_of_port else "--host 127.0.0.1, or another address of this machine"
    return ConfigError(f"{host}:{port} cannot be listened on: {reason}", remedy)


# Idle seconds between two requests of one connection
KEEP_ALIVE_S = 15
# Interval of the check for new troubles, which are logged
TROUBLES_S = 1.0
# Seconds after the drain in which interrupted replies can send their error
LAST_WORDS_S = 2.0
# File descriptors besides connections: workers, registry, logs
OTHER_FILES = 256


class HttpServer:
    """HTTP server of a team. Raises ConfigError and ExtraError.

    log: by default one to stderr; it is closed with the server.
    mounts: applications by the path below which they answer, such as "/studio"; each guards itself.
    """

    def __init__(
        self,
        services: Services,
        team: Team,
        *,
        log: RequestLog | None = None,
        mounts: Mapping[str, ASGIApp] | None = None,
    ) -> None:
        self.team = team
        self.lifetime = ServerLifetime()
        self._services = services
        self.log = log or RequestLog(sys.stderr)
        check_bind(services.authenticator, team.http)
        self._tracer = Tracer(team.http.otel)
        self._uvicorn: uvicorn.Server | None = None
        metrics = Metrics(services, self.connections, lambda: self.log.lost)
        state = AppState(
            services=services,
            limits=team.limits,
            lifetime=self.lifetime,
            metrics=metrics,
            memory=Memory(team.limits.remembered_bytes),
            feedback_intake=FeedbackIntake(team.feedback, Path(team.state)),
            body_reader=BodyReader(),
            media_checker=MediaChecker(team.limits, team.media),
            media=team.media,
        )
        services.people.listeners.append(state.memory.forget_person)
        self._tools = McpServer(state, team, self.log.bug) if team.mcp.serve else None
        self.app = assemble_app(state, team, self._tools)
        gate = RequestGate(
            authenticator=services.authenticator,
            rates=services.rates,
            http=team.http,
            limits=team.limits,
            lifetime=self.lifetime,
            connections=self.connections,
        )
        own = AuthMiddleware(self.app, gate, log=self.log, metrics=metrics, tracer=self._tracer)
        self.asgi: ASGIApp = _with_mounts(own, mounts) if mounts else own

    def connections(self) -> int:
        """Return the number of open connections."""
        return len(self._uvicorn.server_state.connections) if self._uvicorn else 0

    async def serve(self, sock: socket.socket, ready: Callable[[str], object] = lambda url: None) -> None:
        """Serve on a bound socket until SIGTERM or SIGINT (main thread only) or `stop`; then drain.

        ready: called with the address once the server answers.
        A signal that ended the server is raised again after the shutdown.
        """
        _raise_file_limit(self.team.limits.connections + SPARE_CONNECTIONS + OTHER_FILES)
        config = uvicorn.Config(
            self.asgi,
            http=protocol_with(self.team.limits.connections),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(self.team.http.drain_s + LAST_WORDS_S) + 1,
        )
        server = self._uvicorn = _Draining(config, self._drain)

        def on_cut(count: int) -> None:
            self.log.say("slow clients cut off", count=count)

        connections = server.server_state.connections
        watch_task = asyncio.ensure_future(watch(connections, self.team.limits.slow_client_s, on_cut))
        host, port = sock.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        tell_task = asyncio.ensure_future(self._tell(server, address, ready))
        with self._server_lines():
            try:
                async with self._tools.running() if self._tools else contextlib.nullcontext():
                    await server.serve(sockets=[sock])
            finally:
                for task in (watch_task, tell_task):
                    task.cancel()
                await asyncio.gather(watch_task, tell_task, return_exceptions=True)
                self.close()

    def stop(self) -> None:
        """Begin the drain, as SIGTERM does. Call it in the event loop's thread."""
        if self._uvicorn:
            self._uvicorn.should_exit = True

    def close(self) -> None:
        """Close the log and the traces; whatever they still hold is written first."""
        self._tracer.close()
        self.log.close()

    async def _tell(self, server: uvicorn.Server, address: str, ready: Callable[[str], object]) -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        self.log.say("ready", address=address)
        ready(address)
        reported: Mapping[str, str] = {}
        while True:
            troubles = dict(self._services.troubles())
            for name, problem in troubles.items():
                if reported.get(name) != problem:
                    self.log.say("trouble", agent=name, why=problem)
            for name in reported.keys() - troubles.keys():
                self.log.say("trouble over", agent=name)
            reported = troubles
            await asyncio.sleep(TROUBLES_S)

    def _drain(self) -> None:
        """Begin the drain: running replies have `drain_s` left. Called once, when no new connection is accepted."""
        self.lifetime.is_closing = True
        self.log.say("draining", connections=self.connections(), drain_s=self.team.http.drain_s)
        asyncio.get_running_loop().call_later(self.team.http.drain_s, self.lifetime.end)

    @contextlib.contextmanager
    def _server_lines(self) -> Iterator[None]:
        """Redirect the warnings of uvicorn and the workers' supervisor to the request log.

        They go nowhere else while the context is open.
        """
        handler, loggers = ServerLines(self.log), [logging.getLogger(name) for name in LOGGERS]
        propagations = [logger.propagate for logger in loggers]
        for logger in loggers:
            logger.addHandler(handler)
            logger.propagate = False
        try:
            yield
        finally:
            for logger, propagate in zip(loggers, propagations, strict=True):
                logger.removeHandler(handler)
                logger.propagate = propagate


def _with_mounts(own: ASGIApp, mounts: Mapping[str, ASGIApp]) -> ASGIApp:
    """Return the application that hands requests below the paths of `mounts` to them, and the others to `own`.

    API keys, rates and the request log do not hold below a mount.
    """

    async def dispatch(scope: Scope, receive: Receive, send: Send) -> None:
        for prefix, app in mounts.items():
            path = scope.get("path", "")
            if path == prefix or path.startswith(f"{prefix}/"):
                await app({**scope, "root_path": f"{scope.get('root_path', '')}{prefix}"}, receive, send)
                return
        await own(scope, receive, send)

    return dispatch


class _Draining(uvicorn.Server):
    """Uvicorn server that calls `drain` when its shutdown begins."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], object]) -> None:
        super().__init__(config)
        self._drain = drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Call `drain`, then shut down."""
        self._drain()
        await super().shutdown(sockets)


def assemble_app(state: AppState, team: Team, tools: McpServer | None) -> FastAPI:
    """Return the application with the routes that the team switches on. tools: None without MCP."""
    app = build_app(state, team.http.cors)
    for routes in (models, completions, embeddings, speech, feedback, system, admin):
        app.include_router(routes.router)
    if tools is not None:
        app.include_router(system.mcp_router(tools))
    if team.a2a.card:
        app.include_router(system.agent_card_router(team))
    openapi.describe(app)
    return app


def check_bind(authenticator: Authenticator, http: Http) -> None:
    """Raise ConfigError if a server without keys could be reached by others.

    Such a server must bind to loopback, and `http.cors` must not contain `*`.
    """
    if asks_for_key(authenticator):
        return
    if not is_loopback(http.host):
        raise ConfigError(
            f"http.host is {http.host!r}, which others can reach, and no key is set",
            "sartor agents key NAME --team TEAM.yaml makes one; or http.host: 127.0.0.1",
        )
    if "*" in http.cors:
        raise ConfigError(
            "http.cors allows every page on the internet, and no key is set", "name the origins, or make keys first"
        )


def asks_for_key(authenticator: Authenticator) -> bool:
    """Return whether every request needs a key; also True if there were keys and they are lost."""
    try:
        return not authenticator.is_open
    except UnavailableError:
        return True


def bind(team: Team) -> socket.socket:
    """Return a socket bound to the team's host and port.

    Raises ConfigError if they cannot be bound.
    """
    try:
        return listen(team.http.host, team.http.port)
    except (OSError, OverflowError) as error:
        raise bind_error(team.http.host, team.http.port, error) from None


def _raise_file_limit(wanted: int) -> None:
    """Raise the soft limit of open files, up to the hard limit.

    The default is often 1,024, and each connection takes one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
