"""Conversion of OpenAI request bodies to `AgentRequest`."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request as HttpRequest

from sartor.core.records import Part
from sartor.inference.tool_calls import read_choice, read_tools
from sartor.serving.http.app_state import USER_HEADER, get_record, get_state
from sartor.serving.http.http_errors import FieldError
from sartor.serving.http.media_checks import data_url
from sartor.serving.http.reply_collection import ReplyGroup, ReplyTerms, open_answers
from sartor.serving.http.request_models import (
    AssistantTurn,
    ChatRequest,
    ImagePart,
    MediaPart,
    NamedTool,
    ObjectFormat,
    SamplingFields,
    SchemaFormat,
    TextPart,
    TextRequest,
    Turn,
)
from sartor.serving.http.shutdown import until_disconnect
from sartor.serving.team_config import RequestLimits
from sartor.serving.types import AgentRequest
from sartor.text.json_schema import JSON_OBJECT, read_schema

SEED_BITS = 31
_SAMPLED = ("temperature", "top_p", "frequency_penalty", "presence_penalty")


def chat_request(body: ChatRequest, limits: RequestLimits) -> AgentRequest:
    """Return the request of a chat completion.

    Raises RequestError for combinations of fields that contradict each other or exceed the limits.
    """
    if len(body.messages) > limits.messages:
        raise FieldError(
            f"messages holds {len(body.messages)} turns; the limit is {limits.messages}",
            "leave out the oldest, or raise limits.messages in TEAM.yaml",
            "messages",
        )
    _check_stream(body.stream, body.stream_options)
    _check_speech(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise FieldError("top_logprobs is set and logprobs is not", '"logprobs": true', "top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise FieldError(
            f"max_tokens is {body.max_tokens} and max_completion_tokens {body.max_completion_tokens}",
            "send max_completion_tokens alone",
            "max_tokens",
        )
    declared = read_tools([tool.model_dump(exclude_none=True) for tool in body.tools or ()])
    tool_choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, NamedTool) else body.tool_choice
    tools, must_call = read_choice(tool_choice, declared)
    for tool in tools:
        _check_references(
            tool["function"].get("parameters"), f"the parameters of the tool {tool['function']['name']!r}"
        )
    return AgentRequest(
        model=body.model,
        messages=tuple(_message(turn, index) for index, turn in enumerate(body.messages)),
        sampling=_sampling(body, body.max_completion_tokens or body.max_tokens, limits),
        schema=_schema(body),
        tools=tools if body.tools else None,
        must_call=must_call,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else -1,
        streams=bool(body.stream),
    )


def text_requests(body: TextRequest, limits: RequestLimits) -> list[AgentRequest]:
    """Return one request for each prompt of a text completion.

    Raises RequestError for combinations of fields that contradict each other or exceed the limits.
    """
    _check_stream(body.stream, body.stream_options)
    sampling = _sampling(body, body.max_tokens, limits)
    top_logprobs = -1 if body.logprobs is None else body.logprobs
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    return [AgentRequest(body.model, text=prompt, sampling=sampling, top_logprobs=top_logprobs) for prompt in prompts]


def choices(request: AgentRequest, count: int) -> list[AgentRequest]:
    """Return `count` copies of a request, with consecutive seeds that begin with the request's own."""
    seed = request.sampling["seed"]
    seeds = [(seed + index + 2**63) % 2**64 - 2**63 for index in range(count)]
    return [replace(request, sampling={**request.sampling, "seed": seed}) for seed in seeds]


def _check_stream(stream: bool | None, options: object) -> None:
    if options is not None and not stream:
        raise FieldError("stream_options is set and stream is not", '"stream": true', "stream_options")


def _check_speech(body: ChatRequest) -> None:
    """Raise FieldError for contradictory speech options.

    Speech needs text beside it and cannot be streamed. OpenAI's API does not stream speech in file formats either.
    """
    kinds = set(body.modalities or ())
    if kinds == {"audio"}:
        raise FieldError(
            "modalities is ['audio']; a reply is spoken beside its text", '["text", "audio"]', "modalities"
        )
    if ("audio" in kinds) != (body.audio is not None):
        remedy = '"modalities": ["text", "audio"], "audio": {"voice": "default", "format": "wav"}'
        name = "modalities" if body.audio is not None else "audio"
        raise FieldError(
            "a reply is spoken when both modalities and audio say so, and one of them does not", remedy, name
        )
    if body.audio is not None and body.stream:
        remedy = '"stream": false; or stream the text and send its sentences to /v1/audio/speech'
        raise FieldError("stream is set and audio too; speech comes with the whole reply", remedy, "stream")
    for index, turn in enumerate(body.messages):
        if isinstance(turn, AssistantTurn) and turn.audio is not None and turn.content is None:
            param = f"messages[{index}].audio"
            raise FieldError(
                f"{param} stands without content; no speech is kept here", '"content": what was said, as text', param
            )


def _sampling(body: SamplingFields, max_tokens: int | None, limits: RequestLimits) -> Mapping[str, Any]:
    """Return the sampling options that were sent, with a seed.

    A missing seed is drawn, so that a sampled reply can be reproduced.
    """
    if max_tokens is not None and max_tokens > limits.reply_tokens:
        raise FieldError(
            f"max_tokens is {max_tokens}; the limit is {limits.reply_tokens}",
            f'"max_tokens": {limits.reply_tokens}, or raise limits.reply_tokens in TEAM.yaml',
            "max_tokens",
        )
    fields = {name: value for name in _SAMPLED if (value := getattr(body, name)) is not None}
    if max_tokens is not None:
        fields["max_tokens"] = max_tokens
    if body.stop is not None:
        fields["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    return {**fields, "seed": secrets.randbits(SEED_BITS) if body.seed is None else body.seed}


def _schema(body: ChatRequest) -> str:
    if isinstance(body.response_format, ObjectFormat):
        return JSON_OBJECT
    if not isinstance(body.response_format, SchemaFormat):
        return ""
    schema = body.response_format.json_schema.schema_
    _check_references(schema, "response_format.json_schema.schema")
    text = json.dumps(schema)
    read_schema(text)
    return text


def _check_references(schema: Any, subject: str) -> None:
    """Raise FieldError for a schema that refers outside itself. Nothing is fetched."""
    for key, value in _references(schema):
        if not value.startswith("#"):
            raise FieldError(
                f"{subject} refers to {value[:80]!a} by {key}; nothing is fetched", 'put it under "$defs"', "schema"
            )


def _references(schema: Any) -> Iterator[tuple[str, str]]:
    pending = [schema]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from (
                (key, item[key]) for key in ("$ref", "$dynamicRef", "$recursiveRef") if isinstance(item.get(key), str)
            )
            pending += item.values()
        elif isinstance(item, list):
            pending += item


def _message(turn: Turn, index: int) -> dict[str, Any]:
    """Return a turn in OpenAI's form, without the fields that are always empty in replies.

    Content without media becomes one string; the role `developer` becomes `system`.
    """
    message = turn.model_dump(include={"role", "name", "tool_calls", "tool_call_id"}, exclude_none=True)
    if message["role"] == "developer":
        message["role"] = "system"
    for call in message.get("tool_calls", ()):
        call.pop("index", None)
    content = turn.content
    if content is None:
        return message
    if isinstance(content, str):
        return {**message, "content": content}
    texts = [part.text for part in content if isinstance(part, TextPart)]
    if len(texts) == len(content):
        return {**message, "content": "".join(texts)}
    # with media: the parts in the short form that curation reads too
    parts = [_part(part, f"messages[{index}].content[{position}]").plain() for position, part in enumerate(content)]
    return {**message, "content": parts}


def _part(part: TextPart | MediaPart, param: str) -> Part:
    if isinstance(part, TextPart):
        return Part("text", part.text)
    if isinstance(part, ImagePart):
        return Part("image", media=data_url(part.image_url.url, "image", param))
    return Part("audio", media=f"data:audio/{part.input_audio.format};base64,{part.input_audio.data}")


def as_list(texts: str | Sequence[str]) -> list[str]:
    """Return one or several texts as a list."""
    return [texts] if isinstance(texts, str) else list(texts)


async def open_replies(
    http_request: HttpRequest, requests: Sequence[AgentRequest], user: str = "", count: int = 1
) -> ReplyGroup:
    """Open `count` replies to each request, under the client's key, user and deadline.

    user: the field `user` of the body.
    Raises what `open_answers` raises, FieldError and KeyRefusedError for the user, and ClientDisconnectedError.
    """
    state, record = get_state(http_request), get_record(http_request)
    header, principal = http_request.headers.get(USER_HEADER, ""), record.principal
    person = state.person(user, header)
    terms = ReplyTerms(record, state.lifetime, count, partial(state.remember, record, person))
    allowed_person, deadline_s = state.allowed_person(person, header, principal), state.limits.deadline_s
    choice_requests = [
        replace(
            choice_request,
            openable=principal.agents,
            deadline_s=deadline_s,
            person=allowed_person,
            key=principal.key,
            cache_owner=f"{principal.key} {allowed_person}" if principal.key else "",
        )
        for request in requests
        for choice_request in choices(request, terms.per_prompt)
    ]
    return await until_disconnect(http_request.receive, open_answers(state.services.replies, choice_requests, terms))
