"""Uvicorn server with connection limits and draining.

with_house: `Server(house, team).run()` until a signal; `sartor serve` opens the house first (startup.py)

uvicorn bounds the size of a request's head, and the quiet between two requests. What it lets pass is here: a head or a
body that trickles, a client that does not read what is sent to it, and one connection too many.
"""

from __future__ import annotations

import asyncio
import contextlib
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

# Beyond limits.connections a client is told so, in an answer; beyond so many more it is not even heard
SPARE_CONNECTIONS = 128
# What one client may leave unread in this process, and in the kernel
UNREAD_BYTES = 64 << 10
KERNEL_BYTES = 256 << 10
_MALFORMED = HttpError(
    400,
    "invalid_request_error",
    "invalid_http",
    "this is not an HTTP request",
    "send HTTP/1.1 with a head below 64 KiB",
    "RequestError",
)


class Connection(H11Protocol):
    """One connection. `most`: of all; made by `protocol_with`."""

    most = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._idle_since: float | None = None
        self._idle_cycle: object = None
        self._unread_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNREAD_BYTES)
        if len(self.connections) > self.most + SPARE_CONNECTIONS:
            transport.abort()

    def send_400_response(self, msg: str) -> None:
        """In the form that all errors have."""
        if self.conn.our_state is not h11.IDLE:  # an answer has begun: nothing can be said any more
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
        """Cut the connection when, for so long, it has been without a whole request, or has not read what it was
        sent.
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
    """The protocol for a server that takes so many connections."""
    return type("BoundedConnection", (Connection,), {"most": max_connections})


async def watch(connections: Iterable[Any], limit_s: float, on_cut: Callable[[int], object]) -> None:
    """Cut off slow clients until cancelled; `on_cut` of how many at once. `connections` is looked at anew each
    time.
    """
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(min(1.0, limit_s / 4))
        if cut := sum(connection.cut_if_slow(loop.time(), limit_s) for connection in list(connections)):
            on_cut(cut)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is said: without it each answer waits 40 ms for an
    # ACK
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
        sock.bind((host, port))
    except (OSError, OverflowError):
        sock.close()
        raise
    return sock


# Between two requests of one connection
KEEP_ALIVE_S = 15
# How often it is looked at whether an agent came into trouble, for the log
TROUBLES_S = 1.0
# After the drain, for the error that a cut reply still says
LAST_WORDS_S = 2.0
# Files besides connections: workers, registry, logs
OTHER_FILES = 256


class HttpServer:
    """Serves a house. log: by default one to stderr; closed with the server. Raises ConfigError, ExtraError."""

    def __init__(self, services: Services, team: Team, *, log: RequestLog | None = None) -> None:
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
        self.app = _app(state, team, self._tools)
        gate = RequestGate(
            services.authenticator, services.rates, team.http, team.limits, self.lifetime, self.connections
        )
        self.asgi = AuthMiddleware(self.app, gate, self.log, metrics, self._tracer)

    def connections(self) -> int:
        """How many are open."""
        return len(self._uvicorn.server_state.connections) if self._uvicorn else 0

    async def serve(self, sock: socket.socket, ready: Callable[[str], object] = lambda url: None) -> None:
        """Answer on a bound socket until SIGTERM or SIGINT (in the main thread), or `stop`; then drain.

        ready: told the address once it answers. A signal that ended it is raised again when all is over.
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
        watch_task = asyncio.ensure_future(self._watch(server))
        tell_task = asyncio.ensure_future(self._tell(server, _address(sock), ready))
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
        """Begin the drain, as SIGTERM does. From the loop's thread."""
        if self._uvicorn:
            self._uvicorn.should_exit = True

    def close(self) -> None:
        """Write what the log and the traces still hold."""
        self._tracer.close()
        self.log.close()

    async def _watch(self, server: uvicorn.Server) -> None:
        def on_cut(count: int) -> None:
            self.log.say("slow clients cut off", count=count)

        await watch(server.server_state.connections, self.team.limits.slow_client_s, on_cut)

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
        """Told once that no connection is taken any more: what runs has `drain_s` left."""
        self.lifetime.is_closing = True
        self.log.say("draining", connections=self.connections(), drain_s=self.team.http.drain_s)
        asyncio.get_running_loop().call_later(self.team.http.drain_s, self.lifetime.end)

    @contextlib.contextmanager
    def _server_lines(self) -> Iterator[None]:
        """What uvicorn and the workers' supervisor warn of goes into the journal, and nowhere else."""
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


class _Draining(uvicorn.Server):
    """uvicorn's server, which says when it begins to end."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], object]) -> None:
        super().__init__(config)
        self._drain = drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn.Server."""
        self._drain()
        await super().shutdown(sockets)


def _app(state: AppState, team: Team, tools: McpServer | None) -> FastAPI:
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
    """Raise ConfigError where others could reach a server without keys: then it is this machine alone that may."""
    if asks_for_key(authenticator):
        return
    if not is_loopback(http.host):
        raise ConfigError(
            f"http.host is {http.host!r}, which others can reach, and no key is set",
            "sartor agents key NAME makes one; or http.host: 127.0.0.1",
        )
    if "*" in http.cors:
        raise ConfigError(
            "http.cors allows every page on the internet, and no key is set", "name the origins, or make keys first"
        )


def asks_for_key(authenticator: Authenticator) -> bool:
    """Whether nobody is let in without a key; also where there were keys and they are gone."""
    try:
        return not authenticator.is_open
    except UnavailableError:
        return True


def bind(team: Team) -> socket.socket:
    """The socket that the team's options name. Raises ConfigError when it cannot be had."""
    try:
        return listen(team.http.host, team.http.port)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{team.http.host}:{team.http.port} cannot be listened on: {reason}", "--http.port 0 takes a free port"
        ) from None


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _raise_file_limit(wanted: int) -> None:
    """Many systems let a process have 1,024 files, and a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
