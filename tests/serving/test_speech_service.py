"""POST /v1/audio/speech, and replies that are spoken beside their text."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import serving
from sartor.core.errors import ConfigError
from sartor.inference.engine import TextDelta
from sartor.serving.http.request_log import RequestLog
from sartor.serving.http.response_models import ChatCompletion
from sartor.serving.http.server import HttpServer
from sartor.serving.http.speech_service import SpeechService
from sartor.serving.team_config import SpeechOptions, load
from serving import chat
from speaking import SAYS, needs_espeak, play_espeak, play_piper

SPEECH, COMPLETIONS = "/v1/audio/speech", "/v1/chat/completions"
HI = {"model": "speech", "voice": "default", "input": "Turn on the light in the kitchen."}
ALOUD = {"modalities": ["text", "audio"], "audio": {"voice": "default", "format": "wav"}}


async def ask(
    tmp_path: Path, *calls: tuple[str, str, Any], speech: SpeechOptions | None = None, key: str = "", **parts: Any
) -> list[Any]:
    """The answers to a few requests, all at once."""

    house = serving.house(speech=SpeechService(speech or SpeechOptions(voice="espeak")), **parts)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with serving.client(house, serving.team(tmp_path / "state"), **headers) as client:
        try:
            asked = [client.request(method, path, json=body) for method, path, body in calls]
            return await asyncio.gather(*asked)
        finally:
            await house.speech.close()


def heard(data: bytes) -> tuple[float, float, int]:
    """Seconds, the root of the mean square, samples a second of a file."""
    samples, rate = soundfile.read(io.BytesIO(data))
    return len(samples) / rate, float(np.sqrt(np.mean(samples**2))), rate


@needs_espeak
@pytest.mark.parametrize("form", ["mp3", "opus", "flac", "wav"])
async def test_a_text_is_spoken_in_every_form(tmp_path: Path, form: str) -> None:
    (answer,) = await ask(tmp_path, ("POST", SPEECH, {**HI, "response_format": form}))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == {"mp3": "audio/mpeg", "opus": "audio/ogg"}.get(form, f"audio/{form}")
    assert (answer.headers["x-sartor-agent"], answer.headers["x-sartor-reason"]) == ("speech", "spoken by espeak")
    seconds, loudness, rate = heard(answer.content)
    assert 1 < seconds < 4 and 0.02 < loudness < 0.5 and rate == (24_000 if form == "opus" else 22_050)


@needs_espeak
async def test_pcm_is_the_same_speech_at_24_khz_in_pieces(tmp_path: Path) -> None:
    text = {**HI, "input": "This is a sentence of some words. " * 30}
    wav, pcm = await ask(
        tmp_path,
        ("POST", SPEECH, {**text, "response_format": "wav"}),
        ("POST", SPEECH, {**text, "response_format": "pcm"}),
    )
    assert len(pcm.content) / 2 / 24_000 == pytest.approx(heard(wav.content)[0], rel=0.01)
    assert pcm.headers["content-type"] == "audio/pcm"
    assert "content-length" not in pcm.headers


@needs_espeak
async def test_speed_language_and_written_marks(tmp_path: Path) -> None:
    bodies = [
        HI,
        {**HI, "speed": 2.0},
        {**HI, "voice": "espeak:de"},
        {**HI, "model": "espeak"},
        {**HI, "input": "**Turn** on the `light` in the [kitchen](http://a.org/b/c)."},
    ]
    answers = await ask(tmp_path, *(("POST", SPEECH, {**body, "response_format": "wav"}) for body in bodies))
    plain, fast, german, by_model, marked = (answer.content for answer in answers)
    assert heard(fast)[0] < 0.7 * heard(plain)[0]
    assert german != plain
    assert by_model == marked == plain


@needs_espeak
@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "model"),
        ({"model": "speech"}, 400, "input"),
        ({**HI, "input": ""}, 400, "input"),
        ({**HI, "input": "...  \n"}, 400, None),
        ({**HI, "input": "x" * 4097}, 400, "input"),
        ({**HI, "input": "hi " * 400_000}, 400, "input"),
        ({**HI, "input": "a\x00b"}, 400, None),
        ({**HI, "input": ["hi"]}, 400, "input"),
        ({**HI, "model": "tts-1"}, 404, "model"),
        ({**HI, "model": "faq"}, 404, "model"),
        ({**HI, "model": "../speech"}, 404, "model"),
        ({**HI, "voice": "alloy"}, 400, "voice"),
        ({**HI, "voice": "espeak:../../etc/passwd"}, 400, "voice"),
        ({**HI, "voice": "espeak:-w /etc/x"}, 400, "voice"),
        ({**HI, "voice": "espeak:en-us+../x"}, 400, "voice"),
        ({**HI, "voice": "piper:/etc/passwd.onnx"}, 400, "voice"),
        ({**HI, "voice": "piper:joe"}, 400, "voice"),
        ({**HI, "voice": ""}, 400, "voice"),
        ({**HI, "model": "espeak", "voice": "espeak:de"}, 400, "voice"),
        ({**HI, "response_format": "aac"}, 400, "response_format"),
        ({**HI, "speed": 0.2}, 400, "speed"),
        ({**HI, "speed": 0.3}, 400, None),
        ({**HI, "speed": 9}, 400, "speed"),
        ({**HI, "stream_format": "sse"}, 400, "stream_format"),
        ({**HI, "instructions": "whisper"}, 400, "instructions"),
        ({**HI, "vioce": "espeak"}, 400, "vioce"),
    ],
)
async def test_what_cannot_be_spoken_is_refused_with_a_remedy(
    tmp_path: Path, body: dict[str, Any], status: int, param: str | None
) -> None:
    bad, good = await ask(tmp_path, ("POST", SPEECH, body), ("POST", SPEECH, HI))
    error = bad.json()["error"]
    assert (bad.status_code, error["param"]) == (status, param), bad.text
    assert error["remedy"] and len(error["message"]) < 600
    assert good.status_code == 200


@needs_espeak
async def test_a_text_above_the_body_limit_is_413(tmp_path: Path) -> None:
    (answer,) = await ask(tmp_path, ("POST", SPEECH, {**HI, "input": "x" * 2_000_001}))
    assert answer.status_code == 413


@pytest.mark.parametrize("speech", [SpeechOptions(voice="off"), SpeechOptions()])
async def test_a_team_that_does_not_speak_has_no_such_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speech: SpeechOptions
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    calls = [
        ("POST", SPEECH, HI),
        ("GET", "/v1/models/speech", None),
        ("POST", COMPLETIONS, chat(**ALOUD)),
        ("GET", "/v1/models", None),
    ]
    *none, listed = await ask(tmp_path, *calls, speech=speech)
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in none] == [(404, "model_not_found")] * 3
    assert "apt-get install espeak-ng" in none[0].json()["error"]["remedy"]
    assert "speech" not in [model["id"] for model in listed.json()["data"]]


@needs_espeak
async def test_the_model_is_listed_and_a_key_opens_it(tmp_path: Path) -> None:
    calls = [
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/speech", None),
        ("POST", SPEECH, HI),
        ("POST", COMPLETIONS, chat(**ALOUD)),
    ]
    listed, one, spoken, said = await ask(tmp_path, *calls, keys=serving.KEYS, key="key-all")
    assert [model for model in listed.json()["data"] if model["id"] == "speech"] == [one.json()]
    assert (one.json()["root"], one.json()["parent"], one.json()["max_model_len"]) == ("espeak", None, None)
    assert (spoken.status_code, said.status_code) == (200, 200)
    listed, one, spoken, said = await ask(tmp_path, *calls, keys=serving.KEYS, key="key-faq")
    assert "speech" not in [model["id"] for model in listed.json()["data"]]
    assert [one.status_code, spoken.status_code, said.status_code] == [403, 403, 403]
    assert "sartor agents key speech" in spoken.json()["error"]["remedy"]
    assert [answer.status_code for answer in (await ask(tmp_path, *calls, keys=serving.KEYS))] == [401] * 4


@needs_espeak
async def test_a_reply_is_text_and_speech_in_one_call(tmp_path: Path) -> None:
    replies = serving.Replies(text='{"intent": "HassTurnOn", "area": "hall"}')
    (answer,) = await ask(tmp_path, ("POST", COMPLETIONS, chat(**ALOUD, n=2)), replies=replies)
    said = serving.checked(ChatCompletion, answer.json())
    for place, choice in enumerate(said["choices"]):
        audio = choice["message"]["audio"]
        assert choice["message"]["content"].strip() == replies.text
        assert (audio["id"], audio["transcript"]) == (f"audio_r{place + 1}", "intent: Hass Turn On.\narea: hall.")
        assert audio["expires_at"] <= time.time()
        assert 1 < heard(base64.b64decode(audio["data"]))[0] < 5
    assert replies.closed == ["r1", "r2"]


@needs_espeak
async def test_reply_without_words_has_no_audio(tmp_path: Path) -> None:
    """Tool calls and emoji have no audio; a spoken reply in a later request counts as its text."""
    tools = [{"type": "function", "function": {"name": "light", "parameters": {"type": "object", "properties": {}}}}]
    (called,) = await ask(tmp_path, ("POST", COMPLETIONS, chat(**ALOUD, tools=tools, tool_choice="required")))
    assert "audio" not in called.json()["choices"][0]["message"]
    replies = serving.Replies(pieces=[TextDelta("c", "👍", 1)])
    (drawn,) = await ask(tmp_path, ("POST", COMPLETIONS, chat(**ALOUD)), replies=replies)
    assert drawn.json()["choices"][0]["message"] == {"role": "assistant", "content": "👍", "refusal": None}
    (first,) = await ask(tmp_path, ("POST", COMPLETIONS, chat(**ALOUD)))
    turns = [*chat()["messages"], first.json()["choices"][0]["message"], {"role": "user", "content": "and then?"}]
    replies = serving.Replies()
    (second,) = await ask(tmp_path, ("POST", COMPLETIONS, {**chat(), "messages": turns}), replies=replies)
    assert second.status_code == 200, second.text
    assert replies.asked[0].messages[1] == {"role": "assistant", "content": "the sky is blue "}


@needs_espeak
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"modalities": ["text", "audio"]}, "audio"),
        ({"audio": ALOUD["audio"]}, "modalities"),
        ({**ALOUD, "modalities": ["audio"]}, "modalities"),
        ({**ALOUD, "modalities": ["text"]}, "modalities"),
        ({**ALOUD, "modalities": ["song"]}, "modalities[0]"),
        ({**ALOUD, "stream": True}, "stream"),
        ({**ALOUD, "audio": {"voice": "alloy", "format": "wav"}}, "audio.voice"),
        ({**ALOUD, "audio": {"voice": "piper:/etc/passwd.onnx", "format": "wav"}}, "audio.voice"),
        ({**ALOUD, "audio": {"voice": "default", "format": "aac"}}, "audio.format"),
        ({**ALOUD, "audio": {"voice": "default"}}, "audio.format"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "audio": {"id": "audio_r1"}}]},
            "messages[1].audio",
        ),
    ],
)
async def test_wrong_speech_fields_are_refused_before_the_reply(
    tmp_path: Path, fields: dict[str, Any], param: str
) -> None:
    """The 400 names the wrong field, and no agent is called."""
    replies = serving.Replies()
    (answer,) = await ask(tmp_path, ("POST", COMPLETIONS, chat(**{**fields})), replies=replies)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert replies.asked == []


@needs_espeak
async def test_excess_speech_requests_get_429_with_retry_after(tmp_path: Path) -> None:
    """Twenty at once are spoken; with a limit of five texts, 15 of 20 are refused."""
    calls = [
        ("POST", SPEECH, {**HI, "input": f"Sentence number {place}.", "response_format": "wav"}) for place in range(20)
    ]
    answers = await ask(tmp_path, *calls)
    assert [answer.status_code for answer in answers] == [200] * 20
    assert len({answer.content for answer in answers}) == 20
    few = await ask(tmp_path, *calls, speech=SpeechOptions(voice="espeak", at_once=1, waiting=5))
    busy = [answer for answer in few if answer.status_code == 429]
    assert len(busy) == 15 and all(int(answer.headers["retry-after"]) >= 1 for answer in busy)


async def test_a_long_text_holds_up_neither_a_short_one_nor_a_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_espeak(tmp_path, "sleep 0.05; head -c 44 /dev/zero | tr '\\0' '\\1'; cat", monkeypatch)

    done: list[str] = []
    house = serving.house(speech=SpeechService(SpeechOptions(voice="espeak", at_once=1)))

    async def post(client: Any, name: str, path: str, body: Any) -> None:
        assert (await client.post(path, json=body)).status_code == 200
        done.append(name)

    async with serving.client(house, serving.team(tmp_path / "state")) as client:
        long = asyncio.ensure_future(
            post(client, "long", SPEECH, {**HI, "input": "A sentence of words. " * 190, "response_format": "pcm"})
        )
        await asyncio.sleep(0.12)
        await asyncio.gather(
            post(client, "reply", COMPLETIONS, chat()),
            post(client, "short", SPEECH, {**HI, "response_format": "pcm"}),
        )
        await long
    await house.speech.close()
    result = done
    assert result == ["reply", "short", "long"]


@pytest.mark.parametrize(("body", "status"), [("exec sleep 60", 504), ("exit 1", 503), ("kill -9 $$", 503)])
async def test_a_voice_that_hangs_or_dies_is_an_error_of_that_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, status: int
) -> None:
    play_espeak(tmp_path, body, monkeypatch)
    calls = [("POST", SPEECH, {**HI, "response_format": form}) for form in ("wav", "pcm")]
    answers = await ask(
        tmp_path,
        *calls,
        ("POST", COMPLETIONS, chat()),
        speech=SpeechOptions(voice="espeak", patience_s=0.3 if status == 504 else 120.0),
    )
    assert [answer.status_code for answer in answers] == [status, status, 200]
    assert all(answer.json()["error"]["remedy"] for answer in answers[:2])


async def test_speech_past_the_deadline_is_504(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that leaves frees its slot, so that the next request is not refused as one too many."""
    play_espeak(tmp_path, "sleep 0.2; head -c 46 /dev/zero | tr '\\0' '\\1'", monkeypatch)

    speaker = SpeechService(SpeechOptions(voice="espeak", at_once=1, waiting=1))
    house = serving.house(speech=speaker)
    long = {**HI, "input": "A sentence of words. " * 190, "response_format": "wav"}
    async with serving.client(house, serving.team(tmp_path / "state", limits={"deadline_s": 0.3})) as client:
        late = (await client.post(SPEECH, json=long)).status_code
        leaving = asyncio.ensure_future(client.post(SPEECH, json=long))
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        next_one = (await client.post(SPEECH, json={**HI, "response_format": "pcm"})).status_code
    await speaker.close()
    assert late == 504
    assert next_one in (200, 504)  # its piece stands behind one that is still spoken, but no place is taken


def test_stream_that_fails_is_cut_and_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = f"if [ -e {tmp_path}/once ]; then exit 1; fi; touch {tmp_path}/once; head -c 400 /dev/zero | tr '\\0' '\\1'"
    play_espeak(tmp_path, body, monkeypatch)
    log = serving.Log()
    house = serving.house(speech=SpeechService(SpeechOptions(voice="espeak", at_once=1)))
    server = HttpServer(house, serving.team(tmp_path / "state"), log=RequestLog(log))
    import httpx

    long = {**HI, "input": "A sentence of words. " * 100, "response_format": "pcm"}
    with serving.running(server) as url, pytest.raises(httpx.RemoteProtocolError):
        httpx.post(url + SPEECH, json=long, timeout=120)
    (line,) = [line for line in log.lines if line["event"] == "request"]
    assert (line["route"], line["error"], line["agent"]) == (SPEECH, "UnavailableError", "speech")
    assert "sentence" not in log.getvalue()


async def test_client_names_a_voice_without_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The team's file has the path; a path or another voice from a client is refused with 400."""
    play_piper(tmp_path, SAYS, monkeypatch)
    (tmp_path / "team.yaml").write_text("base: tiny\nspeech: {voice: piper:anna.onnx}\n")
    speech = load(tmp_path / "team.yaml").speech
    assert speech.voice == f"piper:{tmp_path}/anna.onnx"
    bodies = [
        {**HI, "voice": voice, "response_format": "wav"}
        for voice in ("default", "piper:anna", f"piper:{tmp_path}/anna.onnx", "espeak")
    ]
    answers = await ask(tmp_path, *(("POST", SPEECH, body) for body in bodies), speech=speech)
    assert [answer.status_code for answer in answers] == [200, 200, 400, 400]
    assert answers[0].content == answers[1].content


@pytest.mark.parametrize(
    "speech", [{"voice": "nobody"}, {"voice": "piper:none.onnx"}, {"voice": "espeak", "at_once": 0}]
)
def test_team_with_a_missing_voice_is_refused_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speech: Any
) -> None:
    """An unknown voice, an absent file and at_once of zero raise ConfigError."""
    play_espeak(tmp_path, "exit 1", monkeypatch)
    (tmp_path / "team.yaml").write_text(json.dumps({"base": "tiny", "speech": speech}))
    with pytest.raises(ConfigError):
        SpeechService(load(tmp_path / "team.yaml").speech)


@needs_espeak
@pytest.mark.services
def test_openais_client_speaks(tmp_path: Path) -> None:
    import openai

    house = serving.house(speech=SpeechService(SpeechOptions()))
    server = HttpServer(house, serving.team(tmp_path / "state"), log=RequestLog(serving.Log()))
    with serving.running(server) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert client.models.retrieve("speech").owned_by == "sartor"
        with client.audio.speech.with_streaming_response.create(
            model="speech", voice="default", input=HI["input"]
        ) as answer:
            answer.stream_to_file(tmp_path / "hi.mp3")
        assert 1 < heard((tmp_path / "hi.mp3").read_bytes())[0] < 4
        long = "This is a sentence of some words. " * 100
        with client.audio.speech.with_streaming_response.create(
            model="speech", voice="espeak:en-gb", input=long, response_format="pcm"
        ) as answer:
            chunks = list(answer.iter_bytes())
        assert len(chunks) > 5 and 60 < sum(map(len, chunks)) / 48_000 < 400
        question: Any = [{"role": "user", "content": "hello"}]
        said = client.chat.completions.create(
            model="faq", messages=question, modalities=["text", "audio"], audio={"voice": "default", "format": "mp3"}
        )
        message = said.choices[0].message
        assert message.audio is not None and message.audio.transcript == "the sky is blue."
        assert 0.5 < heard(base64.b64decode(message.audio.data))[0] < 3
        question += [message.model_dump(exclude_none=True), {"role": "user", "content": "and then?"}]
        assert client.chat.completions.create(model="faq", messages=question).choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="no voice has the name"):
            client.audio.speech.create(model="speech", voice="alloy", input="hi")
        with pytest.raises(openai.NotFoundError, match="nothing that speaks"):
            client.audio.speech.create(model="tts-1", voice="alloy", input="hi")


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a niceness of their own on Linux alone")
async def test_whoever_speaks_lets_the_workers_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_espeak(tmp_path, f"nice > {tmp_path}/nice; head -c 46 /dev/zero | tr '\\0' '\\1'", monkeypatch)
    speaker = SpeechService(SpeechOptions(voice="espeak"))
    own = os.getpriority(os.PRIO_PROCESS, 0)

    await speaker.say("hello", speaker.voice("default"), "wav")
    in_thread = await speaker.aside(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    await speaker.close()
    result = in_thread
    assert result == int((tmp_path / "nice").read_text()) == min(own + 10, 19)
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
