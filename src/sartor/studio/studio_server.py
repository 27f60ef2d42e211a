"""Uvicorn server of a studio that stands alone."""

from __future__ import annotations

import uvicorn
from starlette.types import ASGIApp

from sartor.serving.http.auth_middleware import is_loopback
from sartor.serving.http.server import bind_error, listen, protocol_with

MAX_CONNECTIONS = 256
KEEP_ALIVE_S = 15
# open streams end then, and their browsers ask again
SHUTDOWN_S = 2


def is_local(host: str) -> bool:
    """Return whether no other machine can reach an address."""
    return is_loopback(host)


class StudioServer:
    """Server of a studio, which listens from its creation on.

    address: its URL. Raises ConfigError for an address that cannot be bound.
    """

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        try:
            self._socket = listen(host, port)
        except (OSError, OverflowError) as error:
            raise bind_error(host, port, error) from None
        self._socket.listen()
        name, number = self._socket.getsockname()[:2]
        self.address = f"http://[{name}]:{number}" if ":" in name else f"http://{name}:{number}"
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
        self._server = uvicorn.Server(config)

    async def serve(self) -> None:
        """Serve until SIGTERM or SIGINT, which is raised again afterwards, or until `stop`."""
        with self._socket:
            await self._server.serve(sockets=[self._socket])

    def stop(self) -> None:
        """End the server soon. It may be called from another thread."""
        self._server.should_exit = True
