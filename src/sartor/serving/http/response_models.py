"""Response bodies as typed dictionaries, which the routes build and /openapi.json shows.

mypy checks each body where it is built, so that no request and no token pays for a validation. A `NotRequired` key is
absent where it does not apply; any other is present, if only as null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypeAlias

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # pydantic takes that of `typing` from Python 3.12 on only

FinishReason: TypeAlias = Literal["stop", "length", "tool_calls"]


@with_config(ConfigDict(extra="forbid"))
class ResponseBody(TypedDict):
    """Response body or a part of one."""


class ErrorObject(ResponseBody):
    """Error description. `kind` is a heading of docs/errors.md; `remedy` says what to do."""

    message: str
    type: str
    param: str | None
    code: str
    kind: str
    remedy: str


class ErrorResponse(ResponseBody):
    """OpenAI's error object."""

    error: ErrorObject


class PromptTokensDetails(ResponseBody):
    """Number of the prompt's tokens that were cached."""

    cached_tokens: int


class CompletionUsage(ResponseBody):
    """Tokens of all choices together; those of the prompt are counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class FunctionCall(ResponseBody):
    """Function that is called; `arguments` is JSON text."""

    name: str
    arguments: str


class MessageToolCall(ResponseBody):
    """Tool call."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatCompletionAudio(ResponseBody):
    """Reply as speech.

    data: a file in base64.
    transcript: text that is spoken.
    expires_at: time of the reply, since no speech is kept.
    """

    id: str
    data: str
    transcript: str
    expires_at: int


class ChatCompletionMessage(ResponseBody):
    """Message of the agent. `tool_calls` is present if it calls tools, `audio` if speech was requested."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[MessageToolCall] | None]
    audio: NotRequired[ChatCompletionAudio | None]


class TopLogprob(ResponseBody):
    """Token, natural log of its probability, and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """Token with its most likely alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseBody):
    """Log-probabilities of each token of the reply."""

    content: list[TokenLogprob]
    refusal: None


class CompletionFields(TypedDict):
    """Common fields of the completions and chunks of one response.

    created: Unix time, s.
    model: exact version that answers.
    """

    created: int
    model: str
    system_fingerprint: str


class ChatChoice(ResponseBody):
    """One reply of a chat completion."""

    index: int
    message: ChatCompletionMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(ResponseBody):
    """Answer of POST /v1/chat/completions.

    `id` holds the receipt of the first choice; `model` is the exact version.
    """

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: CompletionUsage


class ChunkToolCall(MessageToolCall):
    """Tool call in a stream. Each is sent whole; `index` is its number in the reply."""

    index: int


class ChatDelta(ResponseBody, total=False):
    """Continuation of a message: its role, then pieces of text, then its tool calls."""

    role: Literal["assistant"]
    content: str
    tool_calls: list[ChunkToolCall]


class ChatChunkChoice(ResponseBody):
    """Continuation of one reply. `finish_reason` is null until the last."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(ResponseBody):
    """Event of a streamed chat completion.

    usage: present if the request asks for it; null except in the last chunk, which has no choices.
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[CompletionUsage | None]


class CompletionLogprobs(ResponseBody):
    """Log-probabilities of each token of the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(ResponseBody):
    """One text of a text completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(ResponseBody):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: CompletionUsage


class CompletionChunkChoice(ResponseBody):
    """Continuation of one text. `finish_reason` is null until the last."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionChunk(ResponseBody):
    """Event of a streamed text completion, with `usage` as in a chat's."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChunkChoice]
    usage: NotRequired[CompletionUsage | None]


class EmbeddingObject(ResponseBody):
    """Embedding of one text, of unit length: numbers, or base64 of little-endian 32-bit floats."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(ResponseBody):
    """Tokens of all texts, as the model reads them."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(ResponseBody):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingObject]
    usage: EmbeddingUsage


class ModelObject(ResponseBody):
    """Model name that requests may use.

    root: exact version behind it.
    parent: base of an agent, as in vLLM.
    max_model_len: limit for the tokens of a prompt and its reply; null for `speech`, which reads none.
    modalities: kinds of input that it reads.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    modalities: list[Literal["text", "image", "audio"]]


class ModelList(ResponseBody):
    """Answer of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelObject]


class WorkerHealth(ResponseBody):
    """Worker process. `role` says whether a ready worker answers or is spare.

    memory_bytes, restarts: only for the admin's key and for keys that open every agent, as in /metrics.
    """

    state: str
    role: str
    memory_bytes: NotRequired[int]
    restarts: NotRequired[int]


class AgentHealth(ResponseBody):
    """Exact version of an agent.

    breaker, why: state of its circuit breaker and the reason for its last opening.
    queued, live: number of requests that wait and that are being answered.
    """

    breaker: str
    why: str
    queued: int
    live: int


class ServerHealth(ResponseBody):
    """Answer of GET /health. Of agents it contains those that the sent key opens.

    agents: by exact version, those with a known state.
    troubles: reasons why something cannot be served as configured.
    """

    status: Literal["ok", "degraded", "unavailable"]
    workers: list[WorkerHealth]
    agents: dict[str, AgentHealth]
    troubles: dict[str, str]


class FeedbackResult(ResponseBody):
    """Answer of POST /v1/feedback.

    `learnable`: whether the prompt was still known, and its words may be kept and learnt from.
    """

    receipt: str
    agent: str
    learnable: bool


class AgentObject(ResponseBody):
    """Agent as in the registry. `state` holds its trial, fall-backs and notes."""

    name: str
    live: str
    versions: Sequence[str]
    state: Mapping[str, Any]


class AgentList(ResponseBody):
    """Answer of GET /v1/agents."""

    agents: list[AgentObject]
