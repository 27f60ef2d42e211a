"""Chat and text completions."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sartor.media.speech.text_normalization import spoken
from sartor.media.speech.voice import TtsVoice
from sartor.serving.http.app import JsonResponse, StrictJsonRoute
from sartor.serving.http.app_state import get_record, get_state, reply_headers
from sartor.serving.http.http_errors import FieldError
from sartor.serving.http.reply_collection import ReplyGroup
from sartor.serving.http.request_conversion import chat_request, open_replies, text_requests
from sartor.serving.http.request_models import ChatRequest, Delivered, TextRequest
from sartor.serving.http.response_format import (
    ChatCompletionFormat,
    CompletionFormat,
    CompletionHeader,
    SseResponse,
    TextCompletionFormat,
    chunks,
)
from sartor.serving.http.response_models import ChatAnswer, TextAnswer
from sartor.serving.http.shutdown import until_disconnect
from sartor.serving.http.speech_service import SpeechService
from sartor.serving.types import AgentRequest


@dataclass(frozen=True)
class SpokenReplies:
    """Who speaks the replies, into which form of file."""

    speaker: SpeechService
    voice: TtsVoice
    form: str

    async def add(self, choices: Sequence[dict[str, Any]], opened: ReplyGroup) -> None:
        """Give each choice's message its `audio`. A reply without words, as a call of a tool, has none."""
        for choice, answer in zip(choices, opened.answers, strict=True):
            message = choice["message"]
            if not spoken(message["content"] or "").text:
                continue
            said = await self.speaker.say(message["content"], self.voice, self.form)
            message["audio"] = {
                "id": f"audio_{answer.receipt}",
                "data": base64.b64encode(said.sound).decode(),
                "transcript": said.text,
                "expires_at": int(time.time()),
            }


router = APIRouter(route_class=StrictJsonRoute)


def _documented(model: type) -> dict[int | str, dict[str, Any]]:
    stream = {"schema": {"type": "string"}, "example": "data: {...}\n\ndata: [DONE]\n\n"}
    return {200: {"model": model, "description": "The reply", "content": {"text/event-stream": stream}}}


@router.post("/v1/chat/completions", responses=_documented(ChatAnswer))
async def chat(asked: ChatRequest, request: Request) -> Response:
    """A conversation goes on: by an agent, a version of it, the base, or whom `auto` chooses."""
    await get_state(request).check_model(asked.model, get_record(request).visitor)
    question = chat_request(asked, get_state(request).limits)
    spoken = _aloud(asked, request)
    shape = ChatCompletionFormat(with_logprobs=bool(asked.logprobs), one_call=asked.parallel_tool_calls is False)
    async with get_state(request).looking.looked_at(question.messages, request.state.body_bytes, asked.n or 1):
        return await _deliver(request, [question], asked, shape, spoken)


def _aloud(asked: ChatRequest, request: Request) -> SpokenReplies | None:
    """How the replies are spoken, if they are. Whatever is wrong with that is said before a reply is made."""
    if asked.audio is None:
        return None
    desk = get_state(request)
    desk.check_speech(get_record(request).visitor)
    form = "pcm" if asked.audio.format == "pcm16" else asked.audio.format
    return SpokenReplies(desk.house.speech, desk.house.speech.voice(asked.audio.voice, "audio.voice"), form)


@router.post("/v1/completions", responses=_documented(TextAnswer))
async def text(asked: TextRequest, request: Request) -> Response:
    """A raw text goes on, without the chat template."""
    await get_state(request).check_model(asked.model, get_record(request).visitor)
    questions = text_requests(asked, get_state(request).limits)
    if asked.model == "auto" and len(questions) > 1:
        raise FieldError("`auto` chooses for one prompt, and there are several", "send one, or name the agent", "prompt")
    return await _deliver(request, questions, asked, TextCompletionFormat(with_logprobs=asked.logprobs is not None))


async def _deliver(
    request: Request,
    questions: Sequence[AgentRequest],
    asked: Delivered,
    shape: CompletionFormat,
    aloud: SpokenReplies | None = None,
) -> Response:
    """Open every choice of every question, and answer in the form that was asked for."""
    desk, entry = get_state(request), get_record(request)
    opened = await open_replies(request, questions, asked.user or "", asked.n or 1)
    head = CompletionHeader(shape.prefix + opened.first.receipt, opened.first.agent, desk.fingerprint())
    if asked.stream:
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return SseResponse(chunks(opened, shape, head, entry, with_usage), opened, entry, reply_headers(opened))
    return await _whole(request, opened, head, shape, aloud)


async def _whole(
    request: Request, opened: ReplyGroup, head: CompletionHeader, shape: CompletionFormat, aloud: SpokenReplies | None
) -> Response:
    try:
        replies = await until_disconnect(request.receive, opened.whole())
    finally:
        await opened.close()
    said = [shape.whole(place, reply) for place, reply in enumerate(replies)]
    if aloud is not None:
        await until_disconnect(request.receive, opened.within(aloud.add(said, opened)))
    usage = get_record(request).usage.as_json()
    return JsonResponse(head.of(shape.whole_kind, said, usage=usage), headers=dict(reply_headers(opened)))
