"""Event stream of one reply, ended exactly once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine

from sartor.inference.engine import Event, ReplyDone, ReplyFailed, TextDelta
from sartor.serving.types import EventStream

Ended = Callable[["ReplyStream", ReplyDone | ReplyFailed], Coroutine[object, object, None]]


class ReplyStream:
    """Events of one reply; an EventStream.

    release: called once when the reply has ended in any way.
    ended: awaited before the client gets the last event; not called for a reply that was closed before.
    took_s: seconds spent waiting for the workers; a slow client adds nothing.
    """

    def __init__(self, events: EventStream, release: Callable[[], object], ended: Ended, took_s: float = 0.0) -> None:
        self._events = events
        self._release = release
        self._ended = ended
        self._texts: list[str] = []
        self._is_over = False
        self.tokens = 0
        self.took_s = took_s

    @property
    def text(self) -> str:
        """Text received so far."""
        return "".join(self._texts)

    def __aiter__(self) -> ReplyStream:
        return self

    async def __anext__(self) -> Event:
        if self._is_over:
            raise StopAsyncIteration
        began = time.monotonic()
        try:
            event = await anext(self._events)
        except asyncio.CancelledError:
            raise  # the caller closes the stream or reads on
        except BaseException:
            self._over()
            raise
        finally:
            self.took_s += time.monotonic() - began
        if isinstance(event, TextDelta):
            self._texts.append(event.text)
            self.tokens += event.tokens
            return event
        self._over()
        await self._ended(self, event)
        return event

    async def aclose(self) -> None:
        """Cancel the reply unless it has ended."""
        if not self._is_over:
            self._over()
            await self._events.aclose()

    def _over(self) -> None:
        self._is_over = True
        self._release()
