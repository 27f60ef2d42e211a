"""The server: a socket, the application on it, and an end that lets running replies end.

with_house: `Server(house, team).run()` until a signal; `sartor serve` opens the house first (opening.py)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from sartor.agents.feedback import Memory
from sartor.agents.hearing import Hearing
from sartor.agents.serve import openapi, protocol
from sartor.agents.serve.app import build_app
from sartor.agents.serve.as_tools import AsTools
from sartor.agents.serve.bodies import Reading
from sartor.agents.serve.desk import Desk
from sartor.agents.serve.guard import Gate, Guard, is_loopback
from sartor.agents.serve.journal import LOGGERS, Journal, ServerLines
from sartor.agents.serve.media import Looking
from sartor.agents.serve.meters import Meters
from sartor.agents.serve.routes import admin, card, feedback, health, mcp, models, replies, speech, vectors
from sartor.agents.serve.running import Shift
from sartor.agents.serve.seams import Doors, House
from sartor.agents.serve.tracing import Tracer
from sartor.agents.team import Http, Team
from sartor.core.errors import ConfigError, UnavailableError

# Between two requests of one connection
KEEP_ALIVE_S = 15
# How often it is looked at whether an agent came into trouble, for the log
TROUBLES_S = 1.0
# After the drain, for the error that a cut reply still says
LAST_WORDS_S = 2.0
# Files besides connections: workers, registry, logs
OTHER_FILES = 256


class Server:
    """Serves a house. journal: by default one to stderr; closed with the server. Raises ConfigError, ExtraError."""

    def __init__(self, house: House, team: Team, *, journal: Journal | None = None) -> None:
        self.team = team
        self.shift = Shift()
        self._house = house
        self.journal = journal or Journal(sys.stderr)
        check_bind(house.doors, team.http)
        self._tracer = Tracer(team.http.otel)
        self._uvicorn: uvicorn.Server | None = None
        meters = Meters(house, self.connections, lambda: self.journal.lost)
        desk = Desk(
            house=house,
            limits=team.limits,
            shift=self.shift,
            meters=meters,
            memory=Memory(team.limits.remembered_bytes),
            hearing=Hearing(team.feedback, Path(team.state)),
            reading=Reading(),
            looking=Looking(team.limits, team.media),
            media=team.media,
        )
        house.people.listeners.append(desk.memory.forget_person)
        self._tools = AsTools(desk, team, self.journal.bug) if team.mcp.serve else None
        self.app = _app(desk, team, self._tools)
        gate = Gate(house.doors, house.rates, team.http, team.limits, self.shift, self.connections)
        self.asgi = Guard(self.app, gate, self.journal, meters, self._tracer)

    def connections(self) -> int:
        """How many are open."""
        return len(self._uvicorn.server_state.connections) if self._uvicorn else 0

    async def serve(self, sock: socket.socket, ready: Callable[[str], object] = lambda url: None) -> None:
        """Answer on a bound socket until SIGTERM or SIGINT (in the main thread), or `stop`; then drain.

        ready: told the address once it answers. A signal that ended it is raised again when all is over.
        """
        _raise_file_limit(self.team.limits.connections + protocol.SPARE_CONNECTIONS + OTHER_FILES)
        config = uvicorn.Config(
            self.asgi,
            http=protocol.protocol_with(self.team.limits.connections),
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
        watching = asyncio.ensure_future(self._watch(server))
        telling = asyncio.ensure_future(self._tell(server, _address(sock), ready))
        with self._server_lines():
            try:
                async with self._tools.running() if self._tools else contextlib.nullcontext():
                    await server.serve(sockets=[sock])
            finally:
                for task in (watching, telling):
                    task.cancel()
                await asyncio.gather(watching, telling, return_exceptions=True)
                self.close()

    def stop(self) -> None:
        """Begin the drain, as SIGTERM does. From the loop's thread."""
        if self._uvicorn:
            self._uvicorn.should_exit = True

    def close(self) -> None:
        """Write what the log and the traces still hold."""
        self._tracer.close()
        self.journal.close()

    async def _watch(self, server: uvicorn.Server) -> None:
        def told(count: int) -> None:
            self.journal.say("slow clients cut off", count=count)

        await protocol.watch(server.server_state.connections, self.team.limits.slow_client_s, told)

    async def _tell(self, server: uvicorn.Server, address: str, ready: Callable[[str], object]) -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        self.journal.say("ready", address=address)
        ready(address)
        known: Mapping[str, str] = {}
        while True:
            troubles = dict(self._house.troubles())
            for name, why in troubles.items():
                if known.get(name) != why:
                    self.journal.say("trouble", agent=name, why=why)
            for name in known.keys() - troubles.keys():
                self.journal.say("trouble over", agent=name)
            known = troubles
            await asyncio.sleep(TROUBLES_S)

    def _drain(self) -> None:
        """Told once that no connection is taken any more: what runs has `drain_s` left."""
        self.shift.closing = True
        self.journal.say("draining", connections=self.connections(), drain_s=self.team.http.drain_s)
        asyncio.get_running_loop().call_later(self.team.http.drain_s, self.shift.end)

    @contextlib.contextmanager
    def _server_lines(self) -> Iterator[None]:
        """What uvicorn and the workers' supervisor warn of goes into the journal, and nowhere else."""
        lines, loggers = ServerLines(self.journal), [logging.getLogger(name) for name in LOGGERS]
        before = [logger.propagate for logger in loggers]
        for logger in loggers:
            logger.addHandler(lines)
            logger.propagate = False
        try:
            yield
        finally:
            for logger, propagate in zip(loggers, before, strict=True):
                logger.removeHandler(lines)
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


def _app(desk: Desk, team: Team, tools: AsTools | None) -> FastAPI:
    app = build_app(desk, team.http.cors)
    for routes in (models, replies, vectors, speech, feedback, health, admin):
        app.include_router(routes.router)
    if tools is not None:
        app.include_router(mcp.router_of(tools))
    if team.a2a.card:
        app.include_router(card.router_of(team))
    openapi.describe(app)
    return app


def check_bind(doors: Doors, http: Http) -> None:
    """Raise ConfigError where others could reach a server without keys: then it is this machine alone that may."""
    if asks_for_key(doors):
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


def asks_for_key(doors: Doors) -> bool:
    """Whether nobody is let in without a key; also where there were keys and they are gone."""
    try:
        return not doors.is_open
    except UnavailableError:
        return True


def bind(team: Team) -> socket.socket:
    """The socket that the team's options name. Raises ConfigError when it cannot be had."""
    try:
        return protocol.listen(team.http.host, team.http.port)
    except (OSError, OverflowError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{team.http.host}:{team.http.port} cannot be listened on: {said}", "--http.port 0 takes a free port"
        ) from None


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _raise_file_limit(wanted: int) -> None:
    """Many systems let a process have 1,024 files, and a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
