"""Pydantic models of responses."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Finish = Literal["stop", "length", "tool_calls"]


class ResponseModel(BaseModel):
    """An answer or a part of one."""

    model_config = ConfigDict(extra="forbid")


class ErrorBody(ResponseModel):
    """What is wrong. `kind` is a heading of docs/errors.md, `remedy` the next thing to do."""

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
    """Of the prompt's tokens."""

    cached_tokens: int


class UsageBody(ResponseModel):
    """Tokens of all choices together; the prompt's are counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Cached


class CalledBody(ResponseModel):
    """Which function; `arguments` is JSON text."""

    name: str
    arguments: str


class CallBody(ResponseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledBody


class AudioBody(ResponseModel):
    """The reply as speech: base64 of a file. transcript: what is said. expires_at: at once, since nothing is kept."""

    id: str
    data: str
    transcript: str
    expires_at: int


class MessageBody(ResponseModel):
    """What the agent says. `tool_calls` is there when it calls tools, `audio` when it was asked to speak."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CallBody] | None = None
    audio: AudioBody | None = None


class Token(ResponseModel):
    """A token, the natural log of its probability, its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class TokenChoice(Token):
    """A token and what else might have stood there."""

    top_logprobs: list[Token]


class ChatLogprobs(ResponseModel):
    """Of each token of the reply."""

    content: list[TokenChoice]
    refusal: None


class ChatChoice(ResponseModel):
    """One reply."""

    index: int
    message: MessageBody
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatAnswer(ResponseModel):
    """Answer of POST /v1/chat/completions. `id` holds the receipt of the first choice; `model` is the exact
    version.
    """

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageBody


class TextLogprobs(ResponseModel):
    """Of each token of the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(ResponseModel):
    """One text."""

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
    """The vector of one text, of unit length: numbers, or base64 of little-endian 32 bit floats."""

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
    """A name that may be asked for. root: the exact version behind it; parent: the base of an agent, as vLLM has it.

    max_model_len: tokens of a prompt and its reply; null of `speech`, which reads none. modalities: what it reads.
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
    """A worker process. role: of one that is ready, whether it answers or is spare."""

    state: str
    role: str
    memory_bytes: int
    restarts: int


class AgentHealth(ResponseModel):
    """An agent's exact version: its breaker and what opened it last, requests that wait and that are answered."""

    breaker: str
    why: str
    queued: int
    live: int


class HealthAnswer(ResponseModel):
    """Answer of GET /health. Of agents it tells what the sent key opens.

    agents: those of whom something is known, by exact version. troubles: what cannot be served as it should, and why.
    """

    status: Literal["ok", "degraded", "unavailable"]
    workers: list[WorkerHealth]
    agents: dict[str, AgentHealth]
    troubles: dict[str, str]


class FeedbackAnswer(ResponseModel):
    """Answer of POST /v1/feedback. `learnable`: the prompt was still known, and its words may be kept and learnt
    from.
    """

    receipt: str
    agent: str
    learnable: bool


class AgentBody(ResponseModel):
    """An agent as the registry has it; `state` holds its trial, fall-backs and notes."""

    name: str
    live: str
    versions: list[str]
    state: dict[str, Any]


class AgentsAnswer(ResponseModel):
    """Answer of GET /v1/agents."""

    agents: list[AgentBody]
