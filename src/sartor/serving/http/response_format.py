"""OpenAI response objects and server-sent event chunks."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sartor.core.errors import SartorError
from sartor.inference.engine import Logprob, ReplyDone, TextDelta
from sartor.serving.http.http_errors import BUG, to_http_error
from sartor.serving.http.reply_collection import CollectedReply, ReplyGroup
from sartor.serving.http.request_log import RequestRecord
from sartor.serving.http.shutdown import ClientDisconnectedError, until_disconnect

# Log-probability of an impossible token, as OpenAI and vLLM report it: JSON has no -inf
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class CompletionHeader:
    """Common fields of all objects of one response.

    model: exact version that answers.
    created: Unix time, s.
    """

    id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def of(self, kind: str, choices: Sequence[Any], **extra: Any) -> dict[str, Any]:
        """Return an object of this kind with its choices and extra fields."""
        fields = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**fields, "system_fingerprint": self.fingerprint, "choices": list(choices), **extra}


class CompletionFormat(Protocol):
    """Conversion of replies to choices, for chat and text completions.

    prefix: of the response id.
    whole_kind, chunk_kind: value of `object` in a complete response and in a chunk.
    """

    prefix: str
    whole_kind: str
    chunk_kind: str

    def whole(self, index: int, reply: CollectedReply) -> dict[str, Any]:
        """Return the choice for a complete reply."""
        ...

    def begin(self, index: int) -> Iterator[dict[str, Any]]:
        """Yield the first deltas of a choice's stream."""
        ...

    def delta(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """Return the streamed choice for a piece of text."""
        ...

    def end(self, index: int, done: ReplyDone) -> Iterator[dict[str, Any]]:
        """Yield the last deltas of a choice's stream."""
        ...


class ChatCompletionFormat:
    """Format of `chat.completion`.

    one_call: keep only the first tool call (`parallel_tool_calls: false`).
    """

    prefix, whole_kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, with_logprobs: bool, one_call: bool) -> None:
        self._with_logprobs = with_logprobs
        self._one_call = one_call

    def whole(self, index: int, reply: CollectedReply) -> dict[str, Any]:
        """Return the choice for a complete reply."""
        tool_calls = self._tool_calls(reply.done)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": reply.text if reply.text or not tool_calls else None,
        }
        message["refusal"] = None
        if tool_calls:
            message["tool_calls"] = tool_calls
        logprobs = _chat_logprobs(reply.logprobs) if self._with_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _finish(reply.done)}

    def begin(self, index: int) -> Iterator[dict[str, Any]]:
        """Yield the delta that opens the assistant's message."""
        yield self._delta(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """Return the streamed choice for a piece of text."""
        return self._delta(index, {"content": delta.text}, delta.logprobs)

    def end(self, index: int, done: ReplyDone) -> Iterator[dict[str, Any]]:
        """Yield the tool calls, if any, then the finish reason."""
        if tool_calls := self._tool_calls(done):
            yield self._delta(
                index,
                {
                    "tool_calls": [
                        {"index": call_index, **tool_call} for call_index, tool_call in enumerate(tool_calls)
                    ]
                },
            )
        yield {**self._delta(index, {}), "finish_reason": _finish(done)}

    def _delta(self, index: int, delta: Mapping[str, Any], logprobs: Sequence[Logprob] = ()) -> dict[str, Any]:
        chat_logprobs = _chat_logprobs(logprobs) if self._with_logprobs and logprobs else None
        return {"index": index, "delta": delta, "logprobs": chat_logprobs, "finish_reason": None}

    def _tool_calls(self, done: ReplyDone) -> list[Mapping[str, Any]]:
        return list(done.tool_calls[:1] if self._one_call else done.tool_calls)


class TextCompletionFormat:
    """Format of `text_completion`. The offsets of log-probabilities count over the whole reply of a choice."""

    prefix, whole_kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, with_logprobs: bool) -> None:
        self._with_logprobs = with_logprobs
        self._offsets: dict[int, int] = {}

    def whole(self, index: int, reply: CollectedReply) -> dict[str, Any]:
        """Return the choice for a complete reply."""
        return self._choice(index, reply.text, reply.logprobs, _finish(reply.done))

    def begin(self, index: int) -> Iterator[dict[str, Any]]:
        """Yield nothing: a text completion has no opening delta."""
        yield from ()

    def delta(self, index: int, delta: TextDelta) -> dict[str, Any]:
        """Return the streamed choice for a piece of text."""
        return self._choice(index, delta.text, delta.logprobs, None)

    def end(self, index: int, done: ReplyDone) -> Iterator[dict[str, Any]]:
        """Yield an empty piece with the finish reason."""
        yield self._choice(index, "", (), _finish(done))

    def _choice(self, index: int, text: str, logprobs: Sequence[Logprob], finish: str | None) -> dict[str, Any]:
        text_logprobs = self._logprobs(index, logprobs) if self._with_logprobs else None
        return {"index": index, "text": text, "logprobs": text_logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, logprobs: Sequence[Logprob]) -> dict[str, Any]:
        offsets = []
        for logprob in logprobs:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(logprob.token)
        return {
            "tokens": [logprob.token for logprob in logprobs],
            "token_logprobs": [_finite(logprob.logprob) for logprob in logprobs],
            "top_logprobs": [{token: _finite(value) for token, value in logprob.top} for logprob in logprobs],
            "text_offset": offsets,
        }


def _finish(done: ReplyDone) -> str:
    return "tool_calls" if done.tool_calls else done.finish


def _chat_logprobs(logprobs: Sequence[Logprob]) -> dict[str, Any]:
    content = [
        {
            **_token(logprob.token, logprob.logprob),
            "top_logprobs": [_token(token, value) for token, value in logprob.top],
        }
        for logprob in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": _finite(logprob), "bytes": list(token.encode(errors="replace"))}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


Chunks = AsyncGenerator[dict[str, Any], None]
# JSON escapes the line ends of server-sent events. Many clients split lines at these characters too.
_LINE_ENDS = tuple((letter, f"\\u{ord(letter):04x}") for letter in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
END = {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}


async def chunks(
    group: ReplyGroup, formatter: CompletionFormat, header: CompletionHeader, record: RequestRecord, with_usage: bool
) -> Chunks:
    """Yield OpenAI's chunks of a streamed response.

    with_usage: end with a chunk that holds the token usage; the other chunks then have `"usage": null`, as in OpenAI's
    API.
    """
    extra: dict[str, Any] = {"usage": None} if with_usage else {}
    for index in range(len(group.answers)):
        for choice in formatter.begin(index):
            yield header.of(formatter.chunk_kind, [choice], **extra)
    async with aclosing(group.merged()) as events:
        async for index, event in events:
            for choice in _choices(formatter, index, event):
                yield header.of(formatter.chunk_kind, [choice], **extra)
    if with_usage:
        yield header.of(formatter.chunk_kind, [], usage=record.usage.as_json())


def _choices(formatter: CompletionFormat, index: int, event: TextDelta | ReplyDone) -> Iterable[dict[str, Any]]:
    if isinstance(event, ReplyDone):
        return formatter.end(index, event)
    # an event without text or log-probabilities (its text is still held back) makes no chunk
    return [formatter.delta(index, event)] if event.text or event.logprobs else []


class SseResponse(Response):
    """Streamed response of server-sent events.

    An error after the start is sent as an event, and the stream still ends with `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(
        self, chunk_stream: Chunks, group: ReplyGroup, record: RequestRecord, headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunk_stream = chunk_stream
        self._group = group
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, unless the client disconnects first."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await until_disconnect(receive, self._send(send))
        except ClientDisconnectedError:
            self._record.error = "Gone"
        finally:
            # In a task of its own: closing a reply may have to notify others, even while this task is being cancelled
            await asyncio.shield(asyncio.ensure_future(self._group.close()))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._chunk_stream) as chunk_stream:
            try:
                async for chunk in chunk_stream:
                    await _event(send, chunk)
                    # Neither await above yields while text and buffer space last. Yield, so that other tasks run and
                    # a disconnect is noticed.
                    await asyncio.sleep(0)
            except SartorError as error:
                fault = to_http_error(error)
                self._record.error = fault.kind
                await _event(send, fault.as_json())
            except Exception:  # `AuthMiddleware` logs it; end the stream, or the client would wait forever
                await _event(send, BUG.as_json())
                await send(END)
                raise
        await send(END)


async def _event(send: Send, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character, escaped in _LINE_ENDS:
        text = text.replace(character, escaped)
    body = b"data: " + text.encode(errors="replace") + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})
