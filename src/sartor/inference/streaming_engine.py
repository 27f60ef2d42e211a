"""Base class of engines that stream tokens over HTTP.

A subclass defines how a call is requested and read (`read`), and what must be ready before (`begin`). A thread runs
one asyncio loop; its only output is the queue that `step` reads, so the caller sees an ordinary engine.
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

# longest wait of a step for a first event, s; a call submitted meanwhile waits as long
STEP_S = 0.02
_LONGEST = 1 << 22  # limit on the bytes of one event


class StreamedReply:
    """A reply being read: its call, prompt token ids, constraint and progress.

    slot: the server's slot for it, for engines that assign slots.
    may_reuse: whether it may reuse the last prompt of its slot.
    tokens: reply tokens read so far.
    cached: prompt tokens that the server took from its cache.
    """

    def __init__(self, call: GenerateCall, prompt: Sequence[int], constraint: Constraint | None = None) -> None:
        self.call = call
        self.prompt = list(prompt)
        self.constraint = constraint
        self.slot = 0
        self.may_reuse = True
        self.is_ended = False
        self.tokens = 0
        self.cached = 0
        self._reader = CallReader(call)

    def piece(self, text: str, tokens: int = 0, logprobs: tuple[Logprob, ...] = ()) -> TextDelta:
        """Return the event for more text of the reply. Raises ModelError if the text violates the schema."""
        self.tokens += tokens
        try:
            if self.constraint is not None:
                self.constraint.accept(text)
        except RequestError as error:  # the server ignored the schema or interprets it differently
            raise ModelError(f"the reply left its schema: {error.problem}", "engine: {kind: local}") from None
        return TextDelta(self.call.id, self._reader.feed(text), tokens, logprobs)

    def end(self, finish: Finish) -> list[Event]:
        """Return the last events of the reply."""
        self.is_ended = True
        rest_text, calls = self._reader.end()
        done_event = ReplyDone(
            self.call.id,
            finish,
            prompt_tokens=len(self.prompt),
            reply_tokens=self.tokens,
            cached_tokens=self.cached,
            tool_calls=calls,
        )
        if rest_text and finish != "cancelled":
            return [TextDelta(self.call.id, rest_text), done_event]
        return [done_event]


class StreamEngine(ABC):
    """Common part of engines whose server computes the tokens."""

    def __init__(self, rows: int, waiting: int) -> None:
        self.rows, self._max_waiting = rows, waiting
        self._waiting: deque[StreamedReply] = deque()
        self._live: dict[str, tuple[StreamedReply, Future[None]]] = {}
        self._event_queue: queue.SimpleQueue[Event | Exception] = queue.SimpleQueue()
        self._pending_events: list[Event] = []
        # no read timeout between two events: the caller sets deadlines
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(10.0, read=None), limits=httpx.Limits(max_connections=None), trust_env=False
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="streams", daemon=True)
        self._thread.start()

    @abstractmethod
    def open_reply(self, call: GenerateCall) -> StreamedReply:
        """Open the reply to a call. Raises as `submit` does for a call that cannot be answered."""

    @abstractmethod
    def read(self, reply: StreamedReply) -> AsyncGenerator[Event]:
        """Request one reply and yield its events: TextDeltas, then those of `StreamedReply.end`.

        It runs on the thread. A SartorError becomes a ReplyFailed.
        """

    def begin(self, reply: StreamedReply) -> bool:
        """Prepare a waiting call for a free row; return False if it must keep waiting."""
        return True

    @property
    def live(self) -> list[StreamedReply]:
        """Replies that are being read."""
        return [reply for reply, _ in self._live.values()]

    @property
    def busy(self) -> bool:
        """Whether a call waits, is being answered, or has events that `step` has not returned."""
        return bool(self._waiting or self._live or self._pending_events)

    def submit(self, call: GenerateCall) -> None:
        """Queue a call. Raises BusyError if the queue is full."""
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
        """Start waiting calls where rows are free, and return new events, waiting up to STEP_S for the first."""
        while self._waiting and len(self._live) < self.rows and self.begin(self._waiting[0]):
            reply = self._waiting.popleft()
            self._live[reply.call.id] = reply, self.on_thread(self._read_to_end(reply))
        events, self._pending_events = self._pending_events, []
        return events + self._receive(0 if events else STEP_S)

    def on_thread(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run a coroutine on the thread's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """End every call without events, then the thread."""
        self._waiting.clear()
        for call in list(self._live):
            self.cancel(call)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._finish())
        self._loop.close()

    async def _finish(self) -> None:
        """Cancel the remaining tasks and let their connections close."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.aclose()
        await self._loop.shutdown_asyncgens()

    async def _read_to_end(self, reply: StreamedReply) -> None:
        """Read one reply to its end, putting its events into the queue."""
        try:
            async with contextlib.aclosing(self.read(reply)) as events:
                async for event in events:
                    self._event_queue.put(event)
        except SartorError as error:
            self._event_queue.put(_failed(reply.call.id, error))
        except Exception as error:  # a bug: `step` raises it in the caller's thread
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
    """Yield the JSON objects of a stream of server-sent events, up to `[DONE]`.

    Raises UnavailableError for an event that is not a JSON object or is longer than _LONGEST: the server is then not
    of the expected kind.
    """
    async for line in _lines(response):
        if not line.startswith(b"data:"):
            continue
        payload = line[5:].strip()
        if payload == b"[DONE]":
            return
        yield json_object(payload)


def json_object(content: bytes) -> dict[str, Any]:
    """Return a server's answer as a JSON object. Raises UnavailableError if it is none."""
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
    """Yield lines as the protocol ends them.

    httpx would also split at Unicode line separators inside a reply.
    """
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
