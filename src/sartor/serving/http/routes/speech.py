"""Route /v1/audio/speech."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sartor.core.errors import SartorError, UnknownAgentError
from sartor.media.speech.audio_encoding import FORMATS, AudioClip
from sartor.media.speech.voice import TtsVoice
from sartor.serving.http.app import StrictJsonRoute
from sartor.serving.http.app_state import AppState, as_header, get_record, get_state
from sartor.serving.http.http_errors import FieldError, to_http_error
from sartor.serving.http.request_log import RequestRecord
from sartor.serving.http.request_models import SpeechRequest
from sartor.serving.http.shutdown import ClientDisconnectedError, until_disconnect
from sartor.serving.http.speech_service import DEFAULT, MODEL

router = APIRouter(route_class=StrictJsonRoute)
# The format without a header, so that finished pieces can be sent while the rest is being synthesised
STREAMED = "pcm"
_FILES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A file; pcm is 24,000 samples a second of 16 bits, little-endian, without a head, sent as it "
        "is spoken",
        "content": {form.media_type: {"schema": {"type": "string", "format": "binary"}} for form in FORMATS.values()},
    }
}


@router.post("/v1/audio/speech", responses=_FILES, response_class=Response)
async def speech(body: SpeechRequest, request: Request) -> Response:
    """Speak a text with one of the team's voices. Markdown, tables and JSON are spoken as in the chat."""
    state, record = get_state(request), get_record(request)
    state.check_speech(record.principal)
    voice, speaker = _voice(body, state), state.services.speech
    speaker.check_length(body.input)
    record.agent = MODEL
    form, speed = FORMATS[body.response_format or "mp3"], body.speed or 1.0
    deadline = asyncio.get_running_loop().time() + state.limits.deadline_s - record.elapsed_s
    if form.name == STREAMED:
        sounds = speaker.sounds(body.input, voice, speed)
        try:
            first_clip = await until_disconnect(request.receive, state.lifetime.within(anext(sounds), deadline))
        except BaseException:
            await sounds.aclose()
            raise
        response: Response = SoundStream(_pcm(state, sounds, first_clip, deadline), sounds, record)
    else:
        work = state.lifetime.within(speaker.say(body.input, voice, form.name, speed), deadline)
        spoken_text = await until_disconnect(request.receive, work)
        response = Response(spoken_text.sound, media_type=form.media_type)
    response.headers.update({"x-sartor-agent": MODEL, "x-sartor-reason": as_header(f"spoken by {voice.name}")})
    return response


def _voice(body: SpeechRequest, state: AppState) -> TtsVoice:
    """Return the voice of a request: `voice` if `model` is `speech`, else the voice that `model` names."""
    speaker = state.services.speech
    if body.model == MODEL:
        return speaker.voice(body.voice)
    try:
        voice = speaker.voice(body.model, "model")
    except FieldError as error:
        raise UnknownAgentError(
            f"nothing that speaks has the name {body.model[:80]!a}", f'"model": "{MODEL}"'
        ) from error
    if body.voice not in (DEFAULT, voice.name):
        problem = f"model is the voice {voice.name!r} and voice is {body.voice[:80]!a}"
        raise FieldError(problem, f'"model": "{MODEL}", or leave voice out', "voice")
    return voice


async def _pcm(
    state: AppState, sounds: AsyncGenerator[AudioClip, None], first_clip: AudioClip, deadline: float
) -> AsyncGenerator[bytes, None]:
    """Yield the PCM bytes of all pieces; the first one is already synthesised."""
    sound: AudioClip | None = first_clip
    while sound is not None:
        yield await state.services.speech.aside(functools.partial(sound.encoded, STREAMED))
        sound = await state.lifetime.within(anext(sounds, None), deadline)


class SoundStream(Response):
    """Streamed response of speech while it is synthesised.

    An error cuts the stream, since audio cannot carry an error message.
    """

    media_type = FORMATS[STREAMED].media_type

    def __init__(
        self, chunk_stream: AsyncGenerator[bytes, None], sounds: AsyncGenerator[AudioClip, None], record: RequestRecord
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunk_stream = chunk_stream
        self._sounds = sounds
        self._record = record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, unless the client disconnects first."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await until_disconnect(receive, self._send(send))
        except ClientDisconnectedError:
            self._record.error = "Gone"
        except SartorError as error:
            # without the final chunk the client sees that the response is incomplete
            self._record.error = to_http_error(error).kind
        finally:
            await self._sounds.aclose()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._chunk_stream) as chunk_stream:
            async for chunk in chunk_stream:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
