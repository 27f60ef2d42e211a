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
    """The client has closed the connection: nobody is there to be answered."""


class ServerLifetime:
    """The server's working time. `closing`: no new request is taken; `over`: what still runs is cut."""

    def __init__(self) -> None:
        self.closing = False
        self.over = False
        self._waits: set[asyncio.Timeout] = set()

    async def within(self, work: Awaitable[T], at: float) -> T:
        """The result of `work`, by `at` of the loop's clock. Raises DeadlineError, and CutError when the shift ends before."""
        if self.over:
            at = 0.0
        try:
            async with asyncio.timeout_at(at) as wait:
                self._waits.add(wait)
                try:
                    return await work
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            if not wait.expired():
                raise
        if self.over:
            raise CutError("the server ended before the reply did", "ask again; another server, or this one soon, answers")
        raise DeadlineError(
            "the reply took longer than limits.deadline_s", "ask for less: max_tokens, or a shorter text to speak"
        )

    def end(self) -> None:
        """Cut what still runs, each with an error of its own."""
        self.over = True
        for wait in self._waits:
            wait.reschedule(asyncio.get_running_loop().time())


async def gone(receive: Receive) -> None:
    """Returns when the client has closed the connection. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes. Raises GoneError then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
