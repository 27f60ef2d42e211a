"""Routes of chat and text completions."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sartor.media.speech.text_normalization import spoken
from sartor.media.speech.voice import TtsVoice
from sartor.serving.http.app import JsonResponse, StrictJsonRoute
from sartor.serving.http.app_state import get_record, get_state, reply_headers
from sartor.serving.http.http_errors import FieldError
from sartor.serving.http.reply_collection import CollectedReply, ReplyGroup
from sartor.serving.http.request_conversion import chat_request, open_replies, text_requests
from sartor.serving.http.request_models import ChatRequest, Delivered, TextRequest
from sartor.serving.http.response_format import (
    ChatCompletionFormat,
    CompletionFormat,
    SseResponse,
    TextCompletionFormat,
    chunks,
)
from sartor.serving.http.response_models import ChatCompletion, ChatCompletionAudio, Completion, CompletionFields
from sartor.serving.http.shutdown import until_disconnect
from sartor.serving.http.speech_service import SpeechService
from sartor.serving.types import AgentRequest


@dataclass(frozen=True)
class SpokenReplies:
    """Voice and file format of the spoken replies to one request."""

    speaker: SpeechService
    voice: TtsVoice
    form: str

    async def add(self, replies: Sequence[CollectedReply], group: ReplyGroup) -> None:
        """Add `audio` to each reply. A reply without words, such as a tool call, gets none."""
        for reply, answer in zip(replies, group.answers, strict=True):
            if not spoken(reply.text).text:
                continue
            spoken_text = await self.speaker.say(reply.text, self.voice, self.form)
            reply.audio = ChatCompletionAudio(
                id=f"audio_{answer.receipt}",
                data=base64.b64encode(spoken_text.sound).decode(),
                transcript=spoken_text.text,
                expires_at=int(time.time()),
            )


router = APIRouter(route_class=StrictJsonRoute)


def _documented(model: type) -> dict[int | str, dict[str, Any]]:
    stream = {"schema": {"type": "string"}, "example": "data: {...}\n\ndata: [DONE]\n\n"}
    return {200: {"model": model, "description": "The reply", "content": {"text/event-stream": stream}}}


@router.post("/v1/chat/completions", responses=_documented(ChatCompletion))
async def chat(body: ChatRequest, http_request: Request) -> Response:
    """Continue a conversation with an agent, a version of it, the base, or the agent that `auto` chooses."""
    await get_state(http_request).check_model(body.model, get_record(http_request).principal)
    request = chat_request(body, get_state(http_request).limits)
    spoken_replies = _spoken_replies(body, http_request)
    make_format = partial(
        ChatCompletionFormat, with_logprobs=bool(body.logprobs), one_call=body.parallel_tool_calls is False
    )
    async with get_state(http_request).media_checker.looked_at(
        request.messages, http_request.state.body_bytes, body.n or 1
    ):
        return await _deliver(http_request, [request], body, make_format=make_format, spoken_replies=spoken_replies)


def _spoken_replies(body: ChatRequest, http_request: Request) -> SpokenReplies | None:
    """Return how the replies are spoken; None if no speech is requested.

    Raises errors of the speech options before any reply is generated.
    """
    if body.audio is None:
        return None
    state = get_state(http_request)
    state.check_speech(get_record(http_request).principal)
    form = "pcm" if body.audio.format == "pcm16" else body.audio.format
    return SpokenReplies(state.services.speech, state.services.speech.voice(body.audio.voice, "audio.voice"), form)


@router.post("/v1/completions", responses=_documented(Completion))
async def text(body: TextRequest, http_request: Request) -> Response:
    """Continue raw text, without the chat template."""
    await get_state(http_request).check_model(body.model, get_record(http_request).principal)
    requests = text_requests(body, get_state(http_request).limits)
    if body.model == "auto" and len(requests) > 1:
        raise FieldError(
            "`auto` chooses for one prompt, and there are several", "send one, or name the agent", "prompt"
        )
    make_format = partial(TextCompletionFormat, with_logprobs=body.logprobs is not None)
    return await _deliver(http_request, requests, body, make_format)


async def _deliver(
    http_request: Request,
    requests: Sequence[AgentRequest],
    body: Delivered,
    make_format: Callable[[str, CompletionFields], CompletionFormat[Any]],
    spoken_replies: SpokenReplies | None = None,
) -> Response:
    """Open all choices of all prompts, and answer with a stream or a complete object as requested."""
    state, record = get_state(http_request), get_record(http_request)
    group = await open_replies(http_request, requests, body.user or "", body.n or 1)
    fields = CompletionFields(
        created=int(time.time()), model=group.first.agent, system_fingerprint=state.fingerprint()
    )
    formatter = make_format(group.first.receipt, fields)
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return SseResponse(chunks(group, formatter, record, with_usage), group, record, reply_headers(group))
    return await _whole(http_request, group, formatter, spoken_replies)


async def _whole(
    http_request: Request,
    group: ReplyGroup,
    formatter: CompletionFormat[Any],
    spoken_replies: SpokenReplies | None,
) -> Response:
    try:
        replies = await until_disconnect(http_request.receive, group.whole())
    finally:
        await group.close()
    if spoken_replies is not None:
        await until_disconnect(http_request.receive, group.within(spoken_replies.add(replies, group)))
    body = formatter.whole(replies, get_record(http_request).usage.as_json())
    return JsonResponse(body, headers=dict(reply_headers(group)))
