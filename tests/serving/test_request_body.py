"""Requests that mean harm: each is answered by a 4xx with a remedy, soon, and the next one is answered as ever."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import serving
from sartor.core import strict_json
from sartor.core.errors import BusyError, RequestError
from sartor.core.strict_json import MOST_NESTED, nested
from sartor.serving.http.request_body import BodyReader, TooLargeError, parse
from serving import chat

COMPLETIONS = "/v1/chat/completions"
DEEP = 100_000


def user(content: Any) -> dict[str, Any]:
    return {"model": "faq", "messages": [{"role": "user", "content": content}]}


def image(url: Any) -> dict[str, Any]:
    return user([{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": url}}])


def deep_schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def schema(value: Any) -> dict[str, Any]:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": value}})


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "a", **function}}


HOSTILE: dict[str, Any] = {
    # no JSON, or more than JSON
    "nothing": b"",
    "not json": b"model=faq",
    "half": b'{"model": "faq", "messages": [{"role": "user", "content": "hi',
    "not utf-8": b'{"model": "\xff\xfe"}',
    "utf-16": '{"model": "faq"}'.encode("utf-16"),
    "bom": b"\xef\xbb\xbf" + json.dumps(chat()).encode(),
    "nan": json.dumps(chat(temperature=float("nan"))).encode(),
    "infinity": json.dumps(chat(top_p=float("inf"))).encode(),
    "1e999": b'{"model": "faq", "messages": [], "temperature": 1e999}',
    "number of 100,000 digits": b'{"model": "faq", "seed": ' + b"9" * 100_000 + b"}",
    "key twice": b'{"model": "faq", "model": "home", "messages": [{"role": "user", "content": "hi"}]}',
    "raw control character": b'{"model": "faq", "messages": [{"role": "user", "content": "a\x00b"}]}',
    # depth
    "100,000 lists": b"[" * DEEP + b"]" * DEEP,
    "100,000 open lists": b"[" * DEEP,
    "100,000 objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep in a field": b'{"model": "faq", "metadata": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep schema": schema(deep_schema(80)),
    "deep tool": chat(tools=[tool(parameters=deep_schema(80))]),
    # size
    "a large prompt": chat("a" * 2_100_000),
    "large base64": image("data:image/png;base64," + "A" * 2_100_000),
    "257 turns": {"model": "faq", "messages": [{"role": "user", "content": "a"}] * 257},
    "large schema": schema({"type": "object", "description": "a" * 100_000}),
    "129 tools": chat(tools=[tool(name=f"t{number}") for number in range(129)]),
    "20 stops": chat(stop=["a"] * 20),
    "10,000 choices": chat(n=10_000),
    "1,000,000 tokens": chat(max_tokens=1_000_000),
    "300 prompts": {"model": "faq", "prompt": ["a"] * 300},
    # addresses to fetch
    "metadata service": image("http://169.254.169.254/latest/meta-data/"),
    "https": image("https://example.org/a.png"),
    "file": image("file:///etc/passwd"),
    "upper case": image("HTTP://localhost:8440/metrics"),
    "ftp": image("ftp://localhost/a"),
    "no scheme": image("//localhost/a"),
    "data": image("data:image/png;base64,AAAA"),
    "image as text": user([{"type": "image_url", "image_url": "http://localhost/"}]),
    "audio": user([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]),
    "a file by id": user([{"type": "file", "file": {"file_id": "f"}}]),
    "schema elsewhere": schema({"$ref": "http://localhost/schema"}),
    "schema in a file": schema({"anyOf": [{"items": {"$dynamicRef": "file:///etc/passwd"}}]}),
    "tool schema elsewhere": chat(tools=[tool(parameters={"$ref": "https://example.org/"})]),
    # characters
    "nul": chat("a\x00b"),
    "escape": chat("\x1b[2J"),
    "delete": chat("a\x7f"),
    "half of a pair": b'{"model": "faq", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "half of a pair in a key": b'{"model": "faq", "\\udfff": 1}',
    "nul in the model": chat(model="faq\x00"),
    # wrong types
    "a list": [],
    "a text": "hi",
    "null": b"null",
    "no model": {"messages": []},
    "model is a number": chat(model=7),
    "model is a list": chat(model=["faq"]),
    "no messages": {"model": "faq"},
    "messages are empty": {"model": "faq", "messages": []},
    "messages are a text": {"model": "faq", "messages": "hi"},
    "a message is a text": {"model": "faq", "messages": ["hi"]},
    "a message is null": {"model": "faq", "messages": [None]},
    "no role": {"model": "faq", "messages": [{"content": "hi"}]},
    "role is a list": {"model": "faq", "messages": [{"role": [], "content": "hi"}]},
    "role is unknown": {"model": "faq", "messages": [{"role": "god", "content": "hi"}]},
    "content is a number": user(7),
    "content is an object": user({"text": "hi"}),
    "content is an empty list": user([]),
    "a part is a text": user(["hi"]),
    "a part without a type": user([{"text": "hi"}]),
    "a part of no kind": user([{"type": "hologram", "hologram": "hi"}]),
    "temperature is a text": chat(temperature="0.7"),
    "temperature is true": chat(temperature=True),
    "temperature is below": chat(temperature=-1),
    "top_p is 0": chat(top_p=0),
    "max_tokens is 0": chat(max_tokens=0),
    "max_tokens is half": chat(max_tokens=1.5),
    "n is 0": chat(n=0),
    "seed is 2**64": chat(seed=2**64),
    "stop is empty": chat(stop=""),
    "stop holds nothing": chat(stop=[""]),
    "stop is a number": chat(stop=7),
    "stream is a text": chat(stream="yes"),
    "penalty is 3": chat(frequency_penalty=3),
    # together wrong, or not done here
    "unknown field": chat(temprature=0.7),
    "options without a stream": chat(stream_options={"include_usage": True}),
    "alternatives without logprobs": chat(top_logprobs=3),
    "two limits": chat(max_tokens=3, max_completion_tokens=4),
    "bias": chat(logit_bias={"50256": -100}),
    "store": chat(store=True),
    "audio out": chat(modalities=["text", "audio"]),
    "old functions": chat(functions=[{"name": "a"}]),
    "format of no kind": chat(response_format={"type": "xml"}),
    "format without a schema": chat(response_format={"type": "json_schema"}),
    "schema is a list": schema([]),
    "tool without a name": chat(tools=[{"type": "function", "function": {}}]),
    "tool of another kind": chat(tools=[{"type": "browser"}]),
    "tool with a bad name": chat(tools=[tool(name="a b")]),
    "tools of one name": chat(tools=[tool(), tool()]),
    "choice without tools": chat(tool_choice="required"),
    "choice of no tool": chat(tools=[tool()], tool_choice={"type": "function", "function": {"name": "b"}}),
    "choice of no kind": chat(tools=[tool()], tool_choice="perhaps"),
    "echo": {"model": "faq", "prompt": "a", "echo": True},
    "prompt of tokens": {"model": "faq", "prompt": [1, 2, 3]},
    "prompts of auto": {"model": "auto", "prompt": ["a", "b"]},
    "best of 3": {"model": "faq", "prompt": "a", "best_of": 3},
}


@pytest.fixture(scope="module")
async def answers(anyio_backend: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All of them, asked of one server; after each, an honest request."""
    replies = serving.Replies()
    made = serving.team(tmp_path_factory.mktemp("state"))
    found: dict[str, Any] = {}
    headers = {"content-type": "application/json"}
    async with serving.client(serving.house(replies=replies), made, **headers) as client:
        for name, body in HOSTILE.items():
            path = "/v1/completions" if isinstance(body, dict) and "prompt" in body else COMPLETIONS
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            began = time.process_time()  # of all threads; other processes do not count
            answer = await client.post(path, content=content)
            found[name] = (answer, time.process_time() - began)
            assert (await client.post(COMPLETIONS, json=chat())).status_code == 200, name
        found["log"] = client.log.lines
    assert len(replies.asked) == len(HOSTILE), "a hostile request reached the house"
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused_with_a_remedy(answers: dict[str, Any], name: str) -> None:
    answer, took_s = answers[name]
    error = answer.json()["error"]
    assert 400 <= answer.status_code < 500, answer.text
    assert error["message"] and error["remedy"] and error["type"] and error["code"]
    assert len(error["message"]) < 600
    assert took_s < 3


def test_what_was_refused_stands_in_no_log(answers: dict[str, Any]) -> None:
    said = json.dumps(answers["log"])
    assert not re.search("169.254|passwd|hologram|temprature|AAAA", said)


def test_a_refusal_names_the_field_and_the_one_that_was_meant(answers: dict[str, Any]) -> None:
    said = {name: answers[name][0].json()["error"] for name in HOSTILE}
    assert (
        said["unknown field"]["message"]
        == "there is no field 'temprature'; 'temperature' was probably meant; try: \"temperature\": ..."
    )
    assert said["unknown field"]["param"] == "temprature"
    assert said["role is unknown"]["param"] == "messages[0].role"
    assert said["no model"]["message"].startswith("model is missing; try: ")
    assert said["temperature is below"]["remedy"] == "send a value of at least 0.0"
    assert said["key twice"]["message"].startswith("the key 'model' stands twice in one object")
    assert said["file"]["message"].startswith(
        "messages[0].content[1] is an address (file:); this server fetches nothing"
    )
    assert answers["a large prompt"][0].status_code == 413
    assert said["bias"]["message"].startswith("logit_bias is an object of 1; this server does not do that")


def test_what_json_allows_is_parsed_as_it_is() -> None:
    value = {"a": [1, -2.5, 1e3, True, None, "tab\tline\nend\r é 😀 \u2028"], "": {}, "{[": "]}", "b": "\\"}
    for ascii_only in (True, False):
        assert parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value
    assert parse(b'"\\ud83d\\ude00"') == "😀"


@pytest.mark.parametrize("depth", [MOST_NESTED, MOST_NESTED + 1])
def test_depth_is_counted_outside_of_strings(depth: int) -> None:
    body = b'{"[": "\\"[[[{", "a": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
    assert nested(body) == depth
    if depth > MOST_NESTED:
        with pytest.raises(RequestError, match="nested 65 deep"):
            parse(body)
    else:
        parse(body)


@given(st.text('\\"[]{}a', max_size=60), st.integers(1, 9))
def test_depth_does_not_depend_on_the_pieces_that_are_scanned(text: str, piece: int) -> None:
    body = text.encode()
    with pytest.MonkeyPatch.context() as patch:
        whole = nested(body)
        patch.setattr(strict_json, "_PIECE", piece)
        assert nested(body) == nested(bytearray(body)) == whole


@pytest.mark.parametrize(
    "body", [b'\\"' * 500_000, b'"' * 500_001, b'"\\' * 500_000, b"[" * 1_000_000, b'"' + b"\\" * 999_999]
)
def test_the_scan_of_a_body_is_linear(body: bytes) -> None:
    began = time.process_time()
    nested(body)
    assert time.process_time() - began < 2


async def trickle(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def test_bodies_are_counted_while_they_come_in_and_together() -> None:
    reading = BodyReader(max_bytes=10)
    assert await reading.read_body(trickle(b"ab", b"cd"), {}, 4) == b"abcd"
    with pytest.raises(TooLargeError, match="more than 4 bytes"):
        await reading.read_body(trickle(b"ab", b"cde", b"f"), {}, 4)
    for announced in ("5", "9" * 5000):
        with pytest.raises(TooLargeError, match="the limit is 4"):
            await reading.read_body(trickle(), {"content-length": announced}, 4)
    with pytest.raises(BusyError, match="hold 12 bytes; 10"):
        await reading.read_body(trickle(b"a" * 6, b"a" * 6), {}, 100)
    assert reading.held_bytes == 0


async def test_a_body_that_does_not_come_is_given_up(tmp_path: Path) -> None:
    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async with serving.client(serving.house(), serving.team(tmp_path, limits={"slow_client_s": 0.02})) as client:
        result = await client.post(COMPLETIONS, content=never(), headers={"content-type": "application/json"})
    assert result.status_code == 408
