"""Connections that are slow, silent, endless or too many: uvicorn's HTTP protocol with bounds on time and memory.

uvicorn bounds the size of a request's head, and the quiet between two requests. What it lets pass is here: a head or a body
that trickles, a client that does not read what is sent to it, and one connection too many.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sartor.agents.serve.faults import Fault

# Beyond limits.connections a client is told so, in an answer; beyond so many more it is not even heard
SPARE_CONNECTIONS = 128
# What one client may leave unread in this process, and in the kernel
UNREAD_BYTES = 64 << 10
KERNEL_BYTES = 256 << 10
_MALFORMED = Fault(
    400, "invalid_request_error", "invalid_http", "this is not an HTTP request", "send HTTP/1.1 with a head below 64 KiB",
    "RequestError",
)  # fmt: skip


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
        headers = [(b"content-type", b"application/json"), (b"connection", b"close"), (b"content-length", b"%d" % len(body))]
        for event in (
            h11.Response(status_code=400, reason=b"Bad Request", headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def cut_if_slow(self, now: float, limit_s: float) -> bool:
        """Cut the connection when, for so long, it has been without a whole request, or has not read what it was sent."""
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


def protocol_with(most: int) -> type[Connection]:
    """The protocol for a server that takes so many connections."""
    return type("BoundedConnection", (Connection,), {"most": most})


async def watch(connections: Iterable[Any], limit_s: float, told: Callable[[int], object]) -> None:
    """Cut off slow clients until cancelled; `told` of how many at once. `connections` is looked at anew each time."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(min(1.0, limit_s / 4))
        if cut := sum(connection.cut_if_slow(loop.time(), limit_s) for connection in list(connections)):
            told(cut)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError when it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is said: without it each answer waits 40 ms for an ACK
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
        sock.bind((host, port))
    except (OSError, OverflowError):
        sock.close()
        raise
    return sock
