"""Deadlines, client disconnects and server shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from sartor.core.errors import DeadlineError
from sartor.serving.http.http_errors import CutError

T = TypeVar("T")


class ClientDisconnectedError(Exception):
    """Closed connection: the client does not wait for its response any more."""


class ServerLifetime:
    """Shutdown state of the server.

    is_closing: new requests are refused.
    is_over: running replies are interrupted.
    """

    def __init__(self) -> None:
        self.is_closing = False
        self.is_over = False
        self._waits: set[asyncio.Timeout] = set()

    async def within(self, work: Awaitable[T], deadline: float) -> T:
        """Return the result of `work`, bounded by a deadline on the event loop's clock.

        Raises DeadlineError after the deadline; CutError if the server ends first.
        """
        if self.is_over:
            deadline = 0.0
        try:
            async with asyncio.timeout_at(deadline) as wait:
                self._waits.add(wait)
                try:
                    return await work
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            if not wait.expired():
                raise
        if self.is_over:
            raise CutError(
                "the server ended before the reply did", "ask again; another server, or this one soon, answers"
            )
        raise DeadlineError(
            "the reply took longer than limits.deadline_s", "ask for less: max_tokens, or a shorter text to speak"
        )

    def end(self) -> None:
        """Interrupt everything that still runs; each waiting caller gets a CutError."""
        self.is_over = True
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())


async def client_disconnected(receive: Receive) -> None:
    """Return when the client has closed the connection. The request's body must have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; cancel it if the client disconnects.

    Raises ClientDisconnectedError after a disconnect.
    """
    work_task, disconnect_task = asyncio.ensure_future(work), asyncio.ensure_future(client_disconnected(receive))
    try:
        await asyncio.wait({work_task, disconnect_task}, return_when=asyncio.FIRST_COMPLETED)
        if not work_task.done():
            raise ClientDisconnectedError
        return work_task.result()
    finally:
        for task in (work_task, disconnect_task):
            task.cancel()
        await asyncio.gather(work_task, disconnect_task, return_exceptions=True)
