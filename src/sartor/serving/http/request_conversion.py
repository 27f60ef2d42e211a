"""OpenAI request bodies to agent Requests."""

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


def chat_request(asked: ChatRequest, limits: RequestLimits) -> AgentRequest:
    """The Request of a chat. Raises RequestError for what only holds together wrongly."""
    if len(asked.messages) > limits.messages:
        raise FieldError(
            f"messages holds {len(asked.messages)} turns; the limit is {limits.messages}",
            "leave out the oldest, or raise limits.messages in TEAM.yaml",
            "messages",
        )
    _check_stream(asked.stream, asked.stream_options)
    _check_speech(asked)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise FieldError("top_logprobs is set and logprobs is not", '"logprobs": true', "top_logprobs")
    if asked.max_tokens is not None and asked.max_completion_tokens not in (None, asked.max_tokens):
        raise FieldError(
            f"max_tokens is {asked.max_tokens} and max_completion_tokens {asked.max_completion_tokens}",
            "send one of the two",
            "max_tokens",
        )
    declared = read_tools([tool.model_dump(exclude_none=True) for tool in asked.tools or ()])
    choice = asked.tool_choice.model_dump() if isinstance(asked.tool_choice, NamedTool) else asked.tool_choice
    tools, must_call = read_choice(choice, declared)
    for tool in tools:
        _check_references(tool["function"].get("parameters"), f"the parameters of the tool {tool['function']['name']!r}")
    return AgentRequest(
        model=asked.model,
        messages=tuple(_message(turn, place) for place, turn in enumerate(asked.messages)),
        sampling=_sampling(asked, asked.max_completion_tokens or asked.max_tokens, limits),
        schema=_schema(asked),
        tools=tools if asked.tools else None,
        must_call=must_call,
        top_logprobs=(asked.top_logprobs or 0) if asked.logprobs else -1,
        streams=bool(asked.stream),
    )


def text_requests(asked: TextRequest, limits: RequestLimits) -> list[AgentRequest]:
    """One Request per prompt. Raises RequestError for what only holds together wrongly."""
    _check_stream(asked.stream, asked.stream_options)
    sampling = _sampling(asked, asked.max_tokens, limits)
    top = -1 if asked.logprobs is None else asked.logprobs
    prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    return [AgentRequest(asked.model, text=prompt, sampling=sampling, top_logprobs=top) for prompt in prompts]


def choices(request: AgentRequest, count: int) -> list[AgentRequest]:
    """The same question `count` times, each with a seed of its own that follows from the first."""
    seed = request.sampling["seed"]
    seeds = [(seed + place + 2**63) % 2**64 - 2**63 for place in range(count)]
    return [replace(request, sampling={**request.sampling, "seed": seed}) for seed in seeds]


def _check_stream(stream: bool | None, options: object) -> None:
    if options is not None and not stream:
        raise FieldError("stream_options is set and stream is not", '"stream": true', "stream_options")


def _check_speech(asked: ChatRequest) -> None:
    """Speech comes with text, and whole: OpenAI's service does not stream it in the forms that can be kept in a file either."""
    kinds = set(asked.modalities or ())
    if kinds == {"audio"}:
        raise FieldError("modalities is ['audio']; a reply is spoken beside its text", '["text", "audio"]', "modalities")
    if ("audio" in kinds) != (asked.audio is not None):
        remedy = '"modalities": ["text", "audio"], "audio": {"voice": "default", "format": "wav"}'
        name = "modalities" if asked.audio is not None else "audio"
        raise FieldError("a reply is spoken when both modalities and audio say so, and one of them does not", remedy, name)
    if asked.audio is not None and asked.stream:
        remedy = '"stream": false; or stream the text and send its sentences to /v1/audio/speech'
        raise FieldError("stream is set and audio too; speech comes with the whole reply", remedy, "stream")
    for place, turn in enumerate(asked.messages):
        if isinstance(turn, AssistantTurn) and turn.audio is not None and turn.content is None:
            param = f"messages[{place}].audio"
            raise FieldError(f"{param} stands without content; no speech is kept here", "send the reply's content", param)


def _sampling(asked: SamplingFields, most: int | None, limits: RequestLimits) -> Mapping[str, Any]:
    """The options that were given. A seed is drawn where none is, so that a reply that is sampled can be made again."""
    if most is not None and most > limits.reply_tokens:
        raise FieldError(
            f"max_tokens is {most}; the limit is {limits.reply_tokens}",
            f'"max_tokens": {limits.reply_tokens}, or raise limits.reply_tokens in TEAM.yaml',
            "max_tokens",
        )
    said = {name: value for name in _SAMPLED if (value := getattr(asked, name)) is not None}
    if most is not None:
        said["max_tokens"] = most
    if asked.stop is not None:
        said["stop"] = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    return {**said, "seed": secrets.randbits(SEED_BITS) if asked.seed is None else asked.seed}


def _schema(asked: ChatRequest) -> str:
    if isinstance(asked.response_format, ObjectFormat):
        return JSON_OBJECT
    if not isinstance(asked.response_format, SchemaFormat):
        return ""
    schema = asked.response_format.json_schema.schema_
    _check_references(schema, "response_format.json_schema.schema")
    text = json.dumps(schema)
    read_schema(text)
    return text


def _check_references(schema: Any, what: str) -> None:
    """A schema refers to its own parts only: nobody fetches another."""
    for key, value in _references(schema):
        if not value.startswith("#"):
            raise FieldError(f"{what} refers to {value[:80]!a} by {key}; nothing is fetched", 'put it under "$defs"', "schema")


def _references(schema: Any) -> Iterator[tuple[str, str]]:
    waiting = [schema]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from ((key, item[key]) for key in ("$ref", "$dynamicRef", "$recursiveRef") if isinstance(item.get(key), str))
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item


def _message(turn: Turn, place: int) -> dict[str, Any]:
    """A turn in OpenAI's form, text without media in one piece: what replies always have empty is left out."""
    said = turn.model_dump(include={"role", "name", "tool_calls", "tool_call_id"}, exclude_none=True)
    if said["role"] == "developer":
        said["role"] = "system"
    for call in said.get("tool_calls", ()):
        call.pop("index", None)
    return {**said, "content": _content(turn.content, f"messages[{place}].content")} if turn.content is not None else said


def _content(content: str | Sequence[TextPart | MediaPart], param: str) -> str | list[dict[str, str]]:
    """A text, or where there are media the parts in the short form, which curation reads too."""
    if isinstance(content, str):
        return content
    if all(isinstance(part, TextPart) for part in content):
        return "".join(part.text for part in content if isinstance(part, TextPart))
    return [_part(part, f"{param}[{place}]").plain() for place, part in enumerate(content)]


def _part(part: TextPart | MediaPart, param: str) -> Part:
    if isinstance(part, TextPart):
        return Part("text", part.text)
    if isinstance(part, ImagePart):
        return Part("image", media=data_url(part.image_url.url, "image", param))
    return Part("audio", media=f"data:audio/{part.input_audio.format};base64,{part.input_audio.data}")


def as_list(asked: str | Sequence[str]) -> list[str]:
    """One or several texts as a list."""
    return [asked] if isinstance(asked, str) else list(asked)


async def open_replies(request: HttpRequest, questions: Sequence[AgentRequest], user: str = "", count: int = 1) -> ReplyGroup:
    """The Answers to these questions, `count` each, by the rules of who asks: names, persons, times, receipts.

    user: whom the client names. Raises what `open_answers` raises, GoneError when the client goes.
    """
    desk, entry = get_state(request), get_record(request)
    header, visitor = request.headers.get(USER_HEADER, ""), entry.visitor
    person = desk.person(user, header)
    terms = ReplyTerms(entry, desk.shift, count, partial(desk.remember, visitor.key, person))
    own, deadline_s = desk.spoken_for(person, header, visitor), desk.limits.deadline_s
    every = [
        replace(choice, openable=visitor.agents, deadline_s=deadline_s, person=own)
        for question in questions
        for choice in choices(question, terms.per_prompt)
    ]
    return await until_disconnect(request.receive, open_answers(desk.house.replies, every, terms))
