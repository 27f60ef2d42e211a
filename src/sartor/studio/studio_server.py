"""Uvicorn server of a studio that stands alone."""

from __future__ import annotations

from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from sartor.core.errors import ConfigError
from sartor.serving.http.auth_middleware import is_loopback
from sartor.serving.http.server import listen, protocol_with

MAX_CONNECTIONS = 256
KEEP_ALIVE_S = 15
# open streams end then, and their browsers ask again
SHUTDOWN_S = 2


def is_local(host: str) -> bool:
    """Return whether no other machine can reach an address."""
    return is_loopback(host)


async def run(app: ASGIApp, host: str, port: int, *, ready: Callable[[str], object]) -> None:
    """Serve a studio until SIGTERM or SIGINT, which is raised again afterwards.

    ready: called with the address once it listens. Raises ConfigError for an address that cannot be bound.
    """
    try:
        sock = listen(host, port)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{host}:{port} cannot be listened on: {reason}", "--port 0 takes a free port") from None
    sock.listen()
    config = uvicorn.Config(
        app,
        http=protocol_with(MAX_CONNECTIONS),
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    name, number = sock.getsockname()[:2]
    ready(f"http://[{name}]:{number}" if ":" in name else f"http://{name}:{number}")
    await uvicorn.Server(config).serve(sockets=[sock])
