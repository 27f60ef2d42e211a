"""Media over HTTP: what is well reaches the house as it was sent, and what is not is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import serving
from media_files import audio_part, bomb, data_url, image_part, png, silence, sound
from sartor.core.errors import BusyError, ConfigError
from sartor.serving.http.media_checks import MediaChecker
from sartor.serving.http.request_body import TooLargeError, check_weight
from sartor.serving.team_config import MediaLimits, RequestLimits, load
from sartor.serving.types import AgentListing
from serving import chat

ROUTE = "/v1/chat/completions"
TEXT = {"type": "text", "text": "What is it?"}


def user(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"model": "faq", "messages": [{"role": role, "content": list(parts)}]}


def url_part(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


async def ask(folder: Path, *bodies: dict[str, Any], media: MediaLimits | None = None, **options: Any) -> Any:
    """The answers of one server, the requests that reached the house, and the log."""

    replies = serving.Replies()
    made = serving.team(folder, media=media or MediaLimits(), **options)
    async with serving.client(serving.house(replies=replies), made) as client:
        return [await client.post(ROUTE, json=body) for body in bodies], replies.asked, client.log


async def test_parts_reach_the_house_in_their_order_and_in_one_form(tmp_path: Path) -> None:
    picture, clip = png(), sound()
    parts = [image_part(picture), TEXT, audio_part(clip), {**TEXT, "text": "Say."}]
    parts[0]["image_url"]["detail"] = "low"
    (answer, streamed), asked, log = await ask(tmp_path, user(*parts), {**user(*parts), "stream": True})
    assert (answer.status_code, streamed.status_code) == (200, 200)
    wanted = [
        {"type": "image", "image": data_url(picture)},
        TEXT,
        {"type": "audio", "audio": data_url(clip, "audio/wav")},
        {"type": "text", "text": "Say."},
    ]
    assert [request.messages for request in asked] == [({"role": "user", "content": wanted},)] * 2
    assert "base64" not in log.getvalue() and data_url(picture)[40:80] not in log.getvalue()
    (answer,), asked, _ = await ask(tmp_path, user(TEXT, TEXT))
    assert asked[0].messages[0]["content"] == "What is it?What is it?", "text alone is one text, as ever"


WRONG: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "address": (
        user(url_part("https://example.org/a.png")),
        400,
        "no_data_url",
        "an address (https:); this server fetches nothing",
    ),
    "file": (user(url_part("FILE:///etc/passwd")), 400, "no_data_url", "an address (file:)"),
    "path": (user(url_part("a.png")), 400, "no_data_url", "no data URL"),
    "empty": (user(url_part("")), 400, "no_data_url", "no data URL"),
    "not base64": (user(url_part("data:image/png;base64,@@@@")), 400, "unreadable_image", "not base64"),
    "no base64 said": (user(url_part("data:image/png,abc")), 400, "unreadable_image", "begins with"),
    "sound as a picture": (user(url_part(data_url(sound(), "audio/wav"))), 400, "unreadable_image", "begins with"),
    "nothing": (user(url_part("data:image/png;base64,")), 400, "unreadable_image", "cannot identify"),
    "text": (user(url_part(data_url(b"hello"))), 400, "unreadable_image", "cannot identify"),
    "svg": (user(url_part(data_url(b"<svg/>", "image/svg+xml"))), 400, "unreadable_image", "cannot identify"),
    "cut header": (user(image_part(png()[:20])), 400, "unreadable_image", ""),
    "0 x 0": (user(image_part(bomb(0))), 400, "unreadable_image", ""),
    "100k x 100k": (user(image_part(bomb())), 400, "image_bomb", "10000000000 pixels"),
    "over the team's limit": (user(image_part(bomb(8_000))), 400, "image_bomb", "the limit is 50000000"),
    "second of two": (
        user(TEXT, image_part(png()), image_part(b"x")),
        400,
        "unreadable_image",
        "messages[0].content[2]",
    ),
    "0 samples": (user(audio_part(sound(0.0))), 400, "unreadable_audio", "no samples"),
    "a picture as a sound": (user(audio_part(png())), 400, "unreadable_audio", ""),
    "long": (user(audio_part(sound(301, 1000))), 400, "audio_too_long", "the limit is 300"),
    "655,350 Hz": (user(audio_part(silence(655_350, 300), "flac")), 400, "unreadable_audio", "at most 384000"),
    "9 channels": (user(audio_part(silence(8000, 1, 9, "WAV"))), 400, "unreadable_audio", "9 channels; at most 8"),
    "8 channels at 96 kHz": (
        user(audio_part(silence(96_000, 200, 8), "flac")),
        400,
        "audio_too_long",
        "at most 115200000",
    ),
    "no sound": (user(audio_part(b"")), 400, "unreadable_audio", ""),
    "form of no kind": (user(audio_part(sound(), "aiff")), 400, "invalid_request", "input_audio.format"),
    "17 parts": (
        user(*[image_part(png())] * 17),
        400,
        "too_many_media",
        "17 pictures and recordings; the limit is 16",
    ),
    "video": (user({"type": "video_url", "video_url": {"url": "a"}}), 400, "invalid_request", "which no agent reads"),
    "file part": (user({"type": "file", "file": {"file_id": "f"}}), 400, "invalid_request", "which no agent reads"),
    "of the assistant": (
        user(image_part(png()), role="assistant"),
        400,
        "invalid_request",
        "in a turn of 'assistant'",
    ),
    "of the system": (user(image_part(png()), role="system"), 400, "invalid_request", "in a turn of 'system'"),
    "url is a text": (
        user({"type": "image_url", "image_url": "data:image/png;base64,AA"}),
        400,
        "invalid_request",
        "is a text",
    ),
    "url is a number": (user(url_part(7)), 400, "invalid_request", "image_url.url is 7"),
    "a good picture beside a wrong field": (
        {**user(image_part(png())), "temprature": 1},
        400,
        "invalid_request",
        "temprature",
    ),
    "many times": ({**user(image_part(png() + bytes(200_000))), "n": 16}, 413, "request_too_large", "16 times"),
    "large": (
        user(url_part("data:image/png;base64," + "A" * 4_000_000)),
        413,
        "request_too_large",
        "the limit is 2000000",
    ),
    "larger": (user(url_part("data:image/png;base64," + "A" * 9_000_000)), 413, "request_too_large", "the limit is"),
    "a large text beside": (
        user({**TEXT, "text": "a" * 2_100_000}, image_part(png())),
        413,
        "request_too_large",
        "2000000",
    ),
    "much structure": (
        {**chat(), "metadata": {str(n): "a" for n in range(200_000)}},
        413,
        "request_too_large",
        "2000000",
    ),
}


@pytest.fixture(scope="module")
async def refusals(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("state")
    answers, asked, log = await ask(
        folder, *(body for body, *_ in WRONG.values()), chat(), media=MediaLimits(bytes=2_000_000)
    )
    assert len(asked) == 1 and answers[-1].status_code == 200, "the last alone reached the house"
    return dict(zip(WRONG, answers, strict=False)), log


@pytest.mark.parametrize("name", WRONG)
def test_media_that_cannot_be_read_are_refused_with_a_remedy(refusals: Any, name: str) -> None:
    _, status, code, said = WRONG[name]
    answer = refusals[0][name]
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert said in error["message"] and error["remedy"] and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 600 and error["kind"] == "RequestError"
    if code.startswith("unreadable"):
        assert error["param"].startswith("messages[0].content[")


def test_nothing_of_what_was_refused_is_logged(refusals: Any) -> None:
    lines = refusals[1].lines
    assert {line["status"] for line in lines if line["event"] == "request"} == {200, 400, 413}
    assert not any(word in json.dumps(lines) for word in ("base64", "example.org", "passwd", "iVBOR", "RIFF"))


async def test_a_body_may_be_larger_by_its_media_alone(tmp_path: Path) -> None:
    picture = png(side=1) + bytes(1_500_000)  # what stands behind a picture's end is not looked at
    (answer, refused), asked, _ = await ask(
        tmp_path,
        user(image_part(picture)),
        user(image_part(picture), {**TEXT, "text": "b" * 60_000}),
        limits={"body_bytes": 50_000},
    )
    assert (answer.status_code, refused.status_code, len(asked)) == (200, 413, 1)
    check_weight(b'{"a": "' + b"AB\\/+" * 100_000 + b'"}', 1000)
    with pytest.raises(TooLargeError):
        check_weight(b'{"a": ' + b"[]," * 1000, 1000)


async def test_media_of_all_requests_together_are_bounded() -> None:
    looking = MediaChecker(RequestLimits(), MediaLimits(), max_bytes=1000)
    messages = [{"role": "user", "content": [{"type": "image", "image": data_url(png(side=1))}]}]
    size = len(data_url(png(side=1)))
    async with looking.looked_at(messages, size):
        assert looking.held_bytes == size
        many = MediaChecker(RequestLimits(), MediaLimits(), max_bytes=size)
        async with many.looked_at(messages, size):
            with pytest.raises(BusyError, match="are allowed"):
                async with many.looked_at(messages, size):
                    pass
            async with many.looked_at([{"role": "user", "content": "text"}], 9):  # is never refused for others' media
                pass
        assert many.held_bytes == 0
    with pytest.raises(Exception, match="cannot identify"):
        async with looking.looked_at([{"content": [{"type": "image", "image": data_url(b"x")}]}], 60):
            pass
    assert looking.held_bytes == 0


def test_the_limits_are_options_of_a_team(tmp_path: Path) -> None:
    (tmp_path / "team.yaml").write_text("base: starter\nmedia: {bytes: 1000, parts: 2}\n")
    assert load(tmp_path / "team.yaml").media == MediaLimits(bytes=1000, parts=2)
    with pytest.raises(ConfigError, match="a worker is sent at most"):
        MediaLimits(bytes=50_000_000)


async def test_the_openapi_shows_the_parts(tmp_path: Path) -> None:
    async with serving.client(serving.house(), serving.team(tmp_path)) as client:
        result = (await client.get("/openapi.json")).json()
    schemas = result["components"]["schemas"]
    assert {"ImagePart", "ImageUrl", "AudioPart", "InputAudio"} <= set(schemas)
    assert "mp3" in schemas["InputAudio"]["properties"]["format"]["enum"]


async def test_models_say_what_they_read(tmp_path: Path) -> None:
    class Roster(serving.Roster):
        async def listed(self) -> Any:
            seeing = AgentListing("eye", "2", ("2", "1"), {}, True, {"2": ("image",), "1": ()})
            return [*await super().listed(), seeing]

    async with serving.client(serving.house(agent_admin=Roster()), serving.team(tmp_path)) as client:
        result = (await client.get("/v1/models")).json()["data"]
    reads = {model["id"]: model["modalities"] for model in result}
    assert (reads["eye"], reads["eye@2"], reads["eye@1"]) == (["text", "image"], ["text", "image"], ["text"])
    assert (reads["auto"], reads["base"], reads["faq"]) == (["text", "image"], ["text"], ["text"])
