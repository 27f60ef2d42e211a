"""Base class of engines that stream tokens over HTTP.

An engine of this kind says how one call is asked and read (`read`), and what must be ready before (`begin`). The
thread runs one asyncio loop; its only way out is the queue that `step` takes from, so the holder sees a plain engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import httpx

from sartor.core.errors import BusyError, ModelError, RequestError, SartorError, UnavailableError
from sartor.inference.constrained_decoding import Constraint
from sartor.inference.engine import Event, Finish, GenerateCall, Logprob, ReplyDone, ReplyFailed, TextDelta
from sartor.inference.tool_calls import CallReader

# How long a step waits for a first event: as long as a call that is submitted meanwhile may have to wait
STEP_S = 0.02
_LONGEST = 1 << 22  # bytes of one event


class StreamedReply:
    """One reply as it is read: its call, its prompt's token ids, what it must obey, and what has come of it.

    slot: which of the server's places it has, for engines that give them out.
    """

    def __init__(self, call: GenerateCall, prompt: Sequence[int], constraint: Constraint | None = None) -> None:
        self.call = call
        self.prompt = list(prompt)
        self.constraint = constraint
        self.slot = 0
        self.is_ended = False
        self.tokens = 0
        self.cached = 0
        self._reader = CallReader(call)

    def piece(self, text: str, tokens: int = 0, logprobs: tuple[Logprob, ...] = ()) -> TextDelta:
        """More of it."""
        self.tokens += tokens
        self._check_schema(text)
        return TextDelta(self.call.id, self._reader.feed(text), tokens, logprobs)

    def _check_schema(self, text: str) -> None:
        """Raises ModelError where the server left the schema: it did not know it, or read it otherwise."""
        try:
            if self.constraint is not None:
                self.constraint.accept(text)
        except RequestError as error:
            raise ModelError(f"the reply left its schema: {error.problem}", "engine: {kind: local}") from None

    def end(self, finish: Finish) -> list[Event]:
        """Its last events."""
        self.is_ended = True
        rest_text, calls = self._reader.end()
        done_event = ReplyDone(self.call.id, finish, len(self.prompt), self.tokens, self.cached, calls)
        return (
            [TextDelta(self.call.id, rest_text), done_event] if rest_text and finish != "cancelled" else [done_event]
        )


class StreamEngine(ABC):
    """The part of an Engine that is the same whoever computes."""

    def __init__(self, rows: int, waiting: int) -> None:
        self.rows, self._max_waiting = rows, waiting
        self._waiting: deque[StreamedReply] = deque()
        self._live: dict[str, tuple[StreamedReply, Future[None]]] = {}
        self._event_queue: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._pending_events: list[Event] = []
        # no limit between two events: a deadline is the holder's
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(10.0, read=None), limits=httpx.Limits(max_connections=None), trust_env=False
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="streams", daemon=True)
        self._thread.start()

    @abstractmethod
    def open_reply(self, call: GenerateCall) -> StreamedReply:
        """The reply that a call begins. Raises what `submit` does for a call that cannot be answered."""

    @abstractmethod
    def read(self, reply: StreamedReply) -> AsyncGenerator[Event]:
        """Ask for one reply and read it: Pieces, then what `Reply.end` says. Runs on the thread. SartorErrors become
        Failed.
        """

    def begin(self, reply: StreamedReply) -> bool:
        """Make ready for a waiting call, for which there is a free row; False if it must go on waiting."""
        return True

    @property
    def live(self) -> list[StreamedReply]:
        """The replies that are being read."""
        return [reply for reply, _ in self._live.values()]

    @property
    def busy(self) -> bool:
        """Whether a call waits, is answered, or has ended untold."""
        return bool(self._waiting or self._live or self._pending_events)

    def submit(self, call: GenerateCall) -> None:
        """Queue a call."""
        if len(self._waiting) >= self._max_waiting:
            raise BusyError(
                f"{len(self._waiting)} calls wait; at most {self._max_waiting} may",
                "send it again after the seconds of Retry-After, or raise engine.waiting in the team's file",
            )
        self._waiting.append(self.open_reply(call))

    def cancel(self, call: str) -> None:
        """End a call, waiting or live."""
        for reply in self._waiting:
            if reply.call.id == call:
                self._waiting.remove(reply)
                self._pending_events += reply.end("cancelled")
                return
        if call in self._live:
            reply, task = self._live.pop(call)
            task.cancel()
            self._pending_events += reply.end("cancelled")

    def fail(self, adapter: str, error: SartorError) -> None:
        """End every call of an adapter with an error."""
        for reply in [*self._waiting, *self.live]:
            if reply.call.adapter == adapter:
                self.cancel(reply.call.id)
                self._pending_events[:] = [event for event in self._pending_events if event.call != reply.call.id]
                self._pending_events.append(_failed(reply.call.id, error))

    def step(self) -> list[Event]:
        """Begin what may begin, and hand on what has come, waiting up to STEP_S for the first of it."""
        while self._waiting and len(self._live) < self.rows and self.begin(self._waiting[0]):
            reply = self._waiting.popleft()
            self._live[reply.call.id] = reply, self.on_thread(self._read_to_end(reply))
        events, self._pending_events = self._pending_events, []
        return events + self._receive(0 if events else STEP_S)

    def on_thread(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Have the thread do something."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """End every call untold, and the thread."""
        self._waiting.clear()
        for call in list(self._live):
            self.cancel(call)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._finish())
        self._loop.close()

    async def _finish(self) -> None:
        """Let the tasks that were cancelled end, so that their connections close."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.aclose()
        await self._loop.shutdown_asyncgens()

    async def _read_to_end(self, reply: StreamedReply) -> None:
        """Read one reply to its end."""
        try:
            async with contextlib.aclosing(self.read(reply)) as events:
                async for event in events:
                    self._event_queue.put(event)
        except SartorError as error:
            self._event_queue.put(_failed(reply.call.id, error))
        except Exception as error:  # a bug: the holder of the engine must see it, and cannot from here
            self._event_queue.put(error)

    def _receive(self, wait_s: float) -> list[Event]:
        events: list[Event] = []
        if not self._live:
            return events
        try:
            event = self._event_queue.get(timeout=wait_s) if wait_s else self._event_queue.get_nowait()
            while True:
                self._accept(event, events)
                event = self._event_queue.get_nowait()
        except queue.Empty:
            return events

    def _accept(self, event: Event | Exception, events: list[Event]) -> None:
        if isinstance(event, Exception):
            raise event
        if event.call not in self._live:  # cancelled meanwhile
            return
        events.append(event)
        if not isinstance(event, TextDelta):
            del self._live[event.call]


def _failed(call: str, error: SartorError) -> ReplyFailed:
    return ReplyFailed(call, error.kind, error.problem, error.remedy)


async def events_of(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, up to `[DONE]`.

    Raises UnavailableError for one that is no JSON object, or longer than _LONGEST: the sender is not what it was said
    to be.
    """
    async for line in _lines(response):
        if not line.startswith(b"data:"):
            continue
        payload = line[5:].strip()
        if payload == b"[DONE]":
            return
        yield json_object(payload)


def json_object(content: bytes) -> dict[str, Any]:
    """What a server said, as a JSON object. Raises UnavailableError where it is none."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UnavailableError(
            f"the server sent {content[:80]!r} where a JSON object was due",
            "engine.url: http://HOST:PORT/v1 of vLLM, SGLang or llama-server",
        )
    return value


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines as the protocol ends them; httpx would also cut at the separators that Unicode has inside of a reply."""
    buffer = b""
    async for chunk in response.aiter_bytes():
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            yield line
        if len(buffer) > _LONGEST:
            raise UnavailableError(
                f"the server sent a line of more than {_LONGEST} bytes",
                "engine.url: http://HOST:PORT/v1 of vLLM, SGLang or llama-server",
            )
    if buffer:
        yield buffer
