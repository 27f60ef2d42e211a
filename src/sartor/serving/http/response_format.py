"""OpenAI response objects and server-sent event chunks."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeAlias, TypeVar, cast

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sartor.core.errors import SartorError
from sartor.inference.engine import Logprob, ReplyDone, TextDelta
from sartor.serving.http.http_errors import BUG, to_http_error
from sartor.serving.http.reply_collection import CollectedReply, ReplyGroup
from sartor.serving.http.request_log import RequestRecord
from sartor.serving.http.response_models import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatDelta,
    ChatLogprobs,
    ChunkToolCall,
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionFields,
    CompletionLogprobs,
    CompletionUsage,
    FinishReason,
    MessageToolCall,
    TokenLogprob,
    TopLogprob,
)
from sartor.serving.http.shutdown import ClientDisconnectedError, until_disconnect

# Log-probability of an impossible token, as OpenAI and vLLM report it: JSON has no -inf
LEAST_LOGPROB = -9999.0

Chunk: TypeAlias = ChatCompletionChunk | CompletionChunk
ChoiceT = TypeVar("ChoiceT")


class CompletionFormat(Protocol[ChoiceT]):
    """Conversion of replies to response objects, for chat and text completions. `ChoiceT` is a choice of a chunk."""

    def whole(self, replies: Sequence[CollectedReply], usage: CompletionUsage) -> ChatCompletion | Completion:
        """Return the response for complete replies."""
        ...

    def chunk(self, choices: list[ChoiceT], usage: CompletionUsage | None) -> Chunk:
        """Return a chunk of a streamed response."""
        ...

    def begin(self, index: int) -> Iterator[ChoiceT]:
        """Yield the first deltas of a choice's stream."""
        ...

    def delta(self, index: int, delta: TextDelta) -> ChoiceT:
        """Return the streamed choice for a piece of text."""
        ...

    def end(self, index: int, done: ReplyDone) -> Iterator[ChoiceT]:
        """Yield the last deltas of a choice's stream."""
        ...


class ChatCompletionFormat:
    """Format of `chat.completion`.

    receipt: of the first reply.
    one_call: keep only the first tool call (`parallel_tool_calls: false`).
    """

    def __init__(self, receipt: str, fields: CompletionFields, *, with_logprobs: bool, one_call: bool) -> None:
        self._id = f"chatcmpl-{receipt}"
        self._fields = fields
        self._with_logprobs = with_logprobs
        self._one_call = one_call

    def whole(self, replies: Sequence[CollectedReply], usage: CompletionUsage) -> ChatCompletion:
        """Return the response for complete replies."""
        choices = [self._choice(index, reply) for index, reply in enumerate(replies)]
        return {"id": self._id, "object": "chat.completion", **self._fields, "choices": choices, "usage": usage}

    def chunk(self, choices: list[ChatChunkChoice], usage: CompletionUsage | None) -> ChatCompletionChunk:
        """Return a chunk of a streamed response."""
        return {"id": self._id, "object": "chat.completion.chunk", **self._fields, "choices": choices, "usage": usage}

    def begin(self, index: int) -> Iterator[ChatChunkChoice]:
        """Yield the delta that opens the assistant's message."""
        yield self._delta(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, delta: TextDelta) -> ChatChunkChoice:
        """Return the streamed choice for a piece of text."""
        return self._delta(index, {"content": delta.text}, delta.logprobs)

    def end(self, index: int, done: ReplyDone) -> Iterator[ChatChunkChoice]:
        """Yield the tool calls, if any, then the finish reason."""
        if tool_calls := self._tool_calls(done):
            chunk_calls: list[ChunkToolCall] = [
                {"index": call_index, **tool_call} for call_index, tool_call in enumerate(tool_calls)
            ]
            yield self._delta(index, {"tool_calls": chunk_calls})
        yield {**self._delta(index, {}), "finish_reason": _finish_reason(done)}

    def _choice(self, index: int, reply: CollectedReply) -> ChatChoice:
        tool_calls = self._tool_calls(reply.done)
        content = reply.text if reply.text or not tool_calls else None
        message: ChatCompletionMessage = {"role": "assistant", "content": content, "refusal": None}
        if tool_calls:
            message["tool_calls"] = tool_calls
        if reply.audio:
            message["audio"] = reply.audio
        logprobs = _chat_logprobs(reply.logprobs) if self._with_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _finish_reason(reply.done)}

    def _delta(self, index: int, delta: ChatDelta, logprobs: Sequence[Logprob] = ()) -> ChatChunkChoice:
        chat_logprobs = _chat_logprobs(logprobs) if self._with_logprobs and logprobs else None
        return {"index": index, "delta": delta, "logprobs": chat_logprobs, "finish_reason": None}

    def _tool_calls(self, done: ReplyDone) -> list[MessageToolCall]:
        tool_calls = cast(Sequence[MessageToolCall], done.tool_calls)  # ReplyDone holds them in OpenAI's form
        return list(tool_calls[:1] if self._one_call else tool_calls)


class TextCompletionFormat:
    """Format of `text_completion`. The offsets of log-probabilities count over the whole reply of a choice.

    receipt: of the first reply.
    """

    def __init__(self, receipt: str, fields: CompletionFields, *, with_logprobs: bool) -> None:
        self._id = f"cmpl-{receipt}"
        self._fields = fields
        self._with_logprobs = with_logprobs
        self._offsets: dict[int, int] = {}

    def whole(self, replies: Sequence[CollectedReply], usage: CompletionUsage) -> Completion:
        """Return the response for complete replies."""
        choices = [self._choice(index, reply) for index, reply in enumerate(replies)]
        return {"id": self._id, "object": "text_completion", **self._fields, "choices": choices, "usage": usage}

    def chunk(self, choices: list[CompletionChunkChoice], usage: CompletionUsage | None) -> CompletionChunk:
        """Return a chunk of a streamed response."""
        return {"id": self._id, "object": "text_completion", **self._fields, "choices": choices, "usage": usage}

    def begin(self, index: int) -> Iterator[CompletionChunkChoice]:
        """Yield nothing: a text completion has no opening delta."""
        yield from ()

    def delta(self, index: int, delta: TextDelta) -> CompletionChunkChoice:
        """Return the streamed choice for a piece of text."""
        logprobs = self._logprobs(index, delta.logprobs)
        return {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": None}

    def end(self, index: int, done: ReplyDone) -> Iterator[CompletionChunkChoice]:
        """Yield an empty piece with the finish reason."""
        logprobs = self._logprobs(index, ())
        yield {"index": index, "text": "", "logprobs": logprobs, "finish_reason": _finish_reason(done)}

    def _choice(self, index: int, reply: CollectedReply) -> CompletionChoice:
        logprobs = self._logprobs(index, reply.logprobs)
        return {"index": index, "text": reply.text, "logprobs": logprobs, "finish_reason": _finish_reason(reply.done)}

    def _logprobs(self, index: int, logprobs: Sequence[Logprob]) -> CompletionLogprobs | None:
        if not self._with_logprobs:
            return None
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


def _finish_reason(done: ReplyDone) -> FinishReason:
    assert done.finish != "cancelled"  # `ReplyGroup.events` raises CutError for it
    return "tool_calls" if done.tool_calls else done.finish


def _chat_logprobs(logprobs: Sequence[Logprob]) -> ChatLogprobs:
    content: list[TokenLogprob] = []
    for logprob in logprobs:
        top_logprobs = [_token(token, value) for token, value in logprob.top]
        content.append({**_token(logprob.token, logprob.logprob), "top_logprobs": top_logprobs})
    return {"content": content, "refusal": None}


def _token(token: str, logprob: float) -> TopLogprob:
    return {"token": token, "logprob": _finite(logprob), "bytes": list(token.encode(errors="replace"))}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


# JSON escapes the line ends of server-sent events. Many clients split lines at these characters too.
_LINE_ENDS = tuple((letter, f"\\u{ord(letter):04x}") for letter in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
END = {"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False}


async def chunks(
    group: ReplyGroup, formatter: CompletionFormat[ChoiceT], record: RequestRecord, with_usage: bool
) -> AsyncGenerator[Chunk, None]:
    """Yield OpenAI's chunks of a streamed response.

    with_usage: end with a chunk that holds the token usage; the other chunks then have `"usage": null`, as in OpenAI's
    API.
    """

    def chunk_of(choices: list[ChoiceT], usage: CompletionUsage | None = None) -> Chunk:
        chunk = formatter.chunk(choices, usage)
        if not with_usage:
            del chunk["usage"]
        return chunk

    for index in range(len(group.answers)):
        for choice in formatter.begin(index):
            yield chunk_of([choice])
    async with aclosing(group.merged()) as events:
        async for index, event in events:
            if isinstance(event, ReplyDone):
                for choice in formatter.end(index, event):
                    yield chunk_of([choice])
            elif event.text or event.logprobs:  # without either (its text is still held back) it makes no chunk
                yield chunk_of([formatter.delta(index, event)])
    if with_usage:
        yield chunk_of([], record.usage.as_json())


class SseResponse(Response):
    """Streamed response of server-sent events.

    An error after the start is sent as an event, and the stream still ends with `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunk_stream: AsyncGenerator[Chunk, None],
        group: ReplyGroup,
        record: RequestRecord,
        headers: Mapping[str, str],
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
