"""Server-sent events: a reply while it is made, to a client that may leave, or read slowly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sartor.agents.serve.entry import Entry
from sartor.agents.serve.faults import BUG, fault_of
from sartor.agents.serve.replies import Answers
from sartor.agents.serve.running import GoneError, while_there
from sartor.agents.serve.shapes import Head, Shape
from sartor.core.errors import SartorError
from sartor.inference.engine import Done, Piece

Chunks = AsyncGenerator[dict[str, Any], None]
# JSON escapes the line ends of server-sent events; many clients split lines at these too
_LINE_ENDS = tuple((letter, f"\\u{ord(letter):04x}") for letter in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
END = {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}


async def chunks(opened: Answers, shape: Shape, head: Head, entry: Entry, with_usage: bool) -> Chunks:
    """OpenAI's chunks. with_usage: the last holds the tokens, and the others say null, as OpenAI has it."""
    more: dict[str, Any] = {"usage": None} if with_usage else {}
    for place in range(len(opened.answers)):
        for choice in shape.begin(place):
            yield head.of(shape.chunk_kind, [choice], **more)
    async with aclosing(opened.merged()) as events:
        async for place, event in events:
            for choice in _choices(shape, place, event):
                yield head.of(shape.chunk_kind, [choice], **more)
    if with_usage:
        yield head.of(shape.chunk_kind, [], usage=entry.usage.as_json())


def _choices(shape: Shape, place: int, event: Piece | Done) -> Iterable[dict[str, Any]]:
    if isinstance(event, Done):
        return shape.end(place, event)
    # tokens whose text is still held back tell nothing
    return [shape.piece(place, event)] if event.text or event.logprobs else []


class EventStream(Response):
    """The response of a stream. An error that comes after it began is an event; then, too, the stream ends as it should."""

    media_type = "text/event-stream"

    def __init__(self, said: Chunks, opened: Answers, entry: Entry, headers: Mapping[str, str]) -> None:
        super().__init__(headers={**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._said = said
        self._opened = opened
        self._entry = entry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all, unless the client goes before."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await while_there(receive, self._send(send))
        except GoneError:
            self._entry.error = "Gone"
        finally:
            # in a task of its own: what closes a reply may have to be told to others, also while this task is being ended
            await asyncio.shield(asyncio.ensure_future(self._opened.close()))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._said) as said:
            try:
                async for chunk in said:
                    await _event(send, chunk)
                    # neither of the two waits while there is text and room: others, and the client's leaving, must be heard
                    await asyncio.sleep(0)
            except SartorError as error:
                fault = fault_of(error)
                self._entry.error = fault.kind
                await _event(send, fault.as_json())
            except Exception:  # the guard logs it; the client must not wait for a stream that nobody goes on with
                await _event(send, BUG.as_json())
                await send(END)
                raise
        await send(END)


async def _event(send: Send, value: Mapping[str, Any]) -> None:
    said = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for letter, escaped in _LINE_ENDS:
        said = said.replace(letter, escaped)
    body = b"data: " + said.encode(errors="replace") + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})
