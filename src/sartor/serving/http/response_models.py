"""Pydantic models of responses."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Finish = Literal["stop", "length", "tool_calls"]


class ResponseModel(BaseModel):
    """Response body or a part of one."""

    model_config = ConfigDict(extra="forbid")


class ErrorBody(ResponseModel):
    """Error description. `kind` is a heading of docs/errors.md; `remedy` says what to do."""

    message: str
    type: str
    param: str | None
    code: str
    kind: str
    remedy: str


class ErrorAnswer(ResponseModel):
    """OpenAI's error object."""

    error: ErrorBody


class Cached(ResponseModel):
    """Number of the prompt's tokens that were cached."""

    cached_tokens: int


class UsageBody(ResponseModel):
    """Tokens of all choices together; those of the prompt are counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Cached


class CalledBody(ResponseModel):
    """Function that is called; `arguments` is JSON text."""

    name: str
    arguments: str


class CallBody(ResponseModel):
    """Tool call."""

    id: str
    type: Literal["function"]
    function: CalledBody


class AudioBody(ResponseModel):
    """Reply as speech.

    data: a file in base64.
    transcript: text that is spoken.
    expires_at: time of the reply, since no speech is kept.
    """

    id: str
    data: str
    transcript: str
    expires_at: int


class MessageBody(ResponseModel):
    """Message of the agent. `tool_calls` is present if it calls tools, `audio` if speech was requested."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CallBody] | None = None
    audio: AudioBody | None = None


class Token(ResponseModel):
    """Token, natural log of its probability, and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenChoice(Token):
    """Token with its most likely alternatives."""

    top_logprobs: list[Token]


class ChatLogprobs(ResponseModel):
    """Log-probabilities of each token of the reply."""

    content: list[TokenChoice]
    refusal: None


class ChatChoice(ResponseModel):
    """One reply of a chat completion."""

    index: int
    message: MessageBody
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatAnswer(ResponseModel):
    """Answer of POST /v1/chat/completions.

    `id` holds the receipt of the first choice; `model` is the exact version.
    """

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody


class TextLogprobs(ResponseModel):
    """Log-probabilities of each token of the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(ResponseModel):
    """One text of a text completion."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Finish


class TextAnswer(ResponseModel):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: UsageBody


class EmbeddingObject(ResponseModel):
    """Embedding of one text, of unit length: numbers, or base64 of little-endian 32-bit floats."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class VectorUsage(ResponseModel):
    """Tokens of all texts, as the model reads them."""

    prompt_tokens: int
    total_tokens: int


class VectorAnswer(ResponseModel):
    """Answer of POST /v1/embeddings."""

    object: Literal["list"]
    model: str
    data: list[EmbeddingObject]
    usage: VectorUsage


class ModelBody(ResponseModel):
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


class ModelsAnswer(ResponseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"]
    data: list[ModelBody]


class WorkerHealth(ResponseModel):
    """Worker process. `role` says whether a ready worker answers or is spare."""

    state: str
    role: str
    memory_bytes: int
    restarts: int


class AgentHealth(ResponseModel):
    """Exact version of an agent.

    breaker, why: state of its circuit breaker and the reason for its last opening.
    queued, live: number of requests that wait and that are being answered.
    """

    breaker: str
    why: str
    queued: int
    live: int


class HealthAnswer(ResponseModel):
    """Answer of GET /health. Of agents it contains those that the sent key opens.

    agents: by exact version, those with a known state.
    troubles: reasons why something cannot be served as configured.
    """

    status: Literal["ok", "degraded", "unavailable"]
    workers: list[WorkerHealth]
    agents: dict[str, AgentHealth]
    troubles: dict[str, str]


class FeedbackAnswer(ResponseModel):
    """Answer of POST /v1/feedback.

    `learnable`: whether the prompt was still known, and its words may be kept and learnt from.
    """

    receipt: str
    agent: str
    learnable: bool


class AgentBody(ResponseModel):
    """Agent as in the registry. `state` holds its trial, fall-backs and notes."""

    name: str
    live: str
    versions: list[str]
    state: dict[str, Any]


class AgentsAnswer(ResponseModel):
    """Answer of GET /v1/agents."""

    agents: list[AgentBody]
