"""Replies in OpenAI's forms: the object of a chat or a text, and the chunks of one that is streamed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sartor.agents.serve.replies import Reply
from sartor.inference.engine import Done, Logprob, Piece

# What OpenAI and vLLM say for a probability of nothing: JSON has no -inf
LEAST_LOGPROB = -9999.0


@dataclass(frozen=True)
class Head:
    """What every object of one answer begins with. `model` is the exact version that answers."""

    id: str
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    def of(self, kind: str, choices: Sequence[Any], **more: Any) -> dict[str, Any]:
        """An object of that kind."""
        said = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**said, "system_fingerprint": self.fingerprint, "choices": list(choices), **more}


class Shape(Protocol):
    """One of the two forms."""

    prefix: str
    whole_kind: str
    chunk_kind: str

    def whole(self, index: int, reply: Reply) -> dict[str, Any]:
        """A choice of the object."""
        ...

    def begin(self, index: int) -> Iterator[dict[str, Any]]:
        """What a choice's stream begins with."""
        ...

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """More of a choice."""
        ...

    def end(self, index: int, done: Done) -> Iterator[dict[str, Any]]:
        """The end of a choice."""
        ...


class Chat:
    """`chat.completion`. one_call: the client wants one tool call at most (`parallel_tool_calls: false`)."""

    prefix, whole_kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, with_logprobs: bool, one_call: bool) -> None:
        self._with_logprobs = with_logprobs
        self._one_call = one_call

    def whole(self, index: int, reply: Reply) -> dict[str, Any]:
        """See Shape."""
        calls = self._calls(reply.done)
        message: dict[str, Any] = {"role": "assistant", "content": reply.text if reply.text or not calls else None}
        message["refusal"] = None
        if calls:
            message["tool_calls"] = calls
        logprobs = _chat_logprobs(reply.logprobs) if self._with_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _finish(reply.done)}

    def begin(self, index: int) -> Iterator[dict[str, Any]]:
        """See Shape."""
        yield self._delta(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """See Shape."""
        return self._delta(index, {"content": piece.text}, piece.logprobs)

    def end(self, index: int, done: Done) -> Iterator[dict[str, Any]]:
        """See Shape."""
        if calls := self._calls(done):
            yield self._delta(index, {"tool_calls": [{"index": place, **call} for place, call in enumerate(calls)]})
        yield {**self._delta(index, {}), "finish_reason": _finish(done)}

    def _delta(self, index: int, delta: Mapping[str, Any], logprobs: Sequence[Logprob] = ()) -> dict[str, Any]:
        said = _chat_logprobs(logprobs) if self._with_logprobs and logprobs else None
        return {"index": index, "delta": delta, "logprobs": said, "finish_reason": None}

    def _calls(self, done: Done) -> list[Mapping[str, Any]]:
        return list(done.tool_calls[:1] if self._one_call else done.tool_calls)


class Text:
    """`text_completion`: logprobs count their offsets over the whole reply of a choice."""

    prefix, whole_kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, with_logprobs: bool) -> None:
        self._with_logprobs = with_logprobs
        self._offsets: dict[int, int] = {}

    def whole(self, index: int, reply: Reply) -> dict[str, Any]:
        """See Shape."""
        return self._choice(index, reply.text, reply.logprobs, _finish(reply.done))

    def begin(self, index: int) -> Iterator[dict[str, Any]]:
        """See Shape."""
        yield from ()

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """See Shape."""
        return self._choice(index, piece.text, piece.logprobs, None)

    def end(self, index: int, done: Done) -> Iterator[dict[str, Any]]:
        """See Shape."""
        yield self._choice(index, "", (), _finish(done))

    def _choice(self, index: int, text: str, logprobs: Sequence[Logprob], finish: str | None) -> dict[str, Any]:
        said = self._logprobs(index, logprobs) if self._with_logprobs else None
        return {"index": index, "text": text, "logprobs": said, "finish_reason": finish}

    def _logprobs(self, index: int, logprobs: Sequence[Logprob]) -> dict[str, Any]:
        offsets = []
        for item in logprobs:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(item.token)
        return {
            "tokens": [item.token for item in logprobs],
            "token_logprobs": [_finite(item.logprob) for item in logprobs],
            "top_logprobs": [{token: _finite(value) for token, value in item.top} for item in logprobs],
            "text_offset": offsets,
        }


def _finish(done: Done) -> str:
    return "tool_calls" if done.tool_calls else done.finish


def _chat_logprobs(logprobs: Sequence[Logprob]) -> dict[str, Any]:
    content = [
        {**_token(item.token, item.logprob), "top_logprobs": [_token(token, value) for token, value in item.top]}
        for item in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": _finite(logprob), "bytes": list(token.encode(errors="replace"))}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB
