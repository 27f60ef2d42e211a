"""The server on a real socket: OpenAI's client, clients that leave, stall, flood or lie, and an end that loses no reply."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

import serving
from sartor.inference.engine import ReplyDone, TextDelta
from sartor.serving.http import server as server_module
from sartor.serving.http.request_log import RequestLog
from sartor.serving.http.server import HttpServer
from serving import chat, running

pytestmark = [pytest.mark.services, pytest.mark.alone]
COMPLETIONS = "/v1/chat/completions"
TOOLS: Any = [{"type": "function", "function": {"name": "light", "parameters": {"type": "object", "properties": {}}}}]
SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "i", "schema": {"type": "object"}, "strict": True}}


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, serving.Replies, serving.Log]]:
    """A server without keys: its address, its replies, its log."""
    replies, log = serving.Replies(), serving.Log()
    with running(
        HttpServer(serving.house(replies=replies), serving.team(tmp_path, http={"drain_s": 1.0}), log=RequestLog(log))
    ) as url:
        yield url, replies, log


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10)


def head(body: bytes | int, *lines: str) -> bytes:
    size = body if isinstance(body, int) else len(body)
    said = [
        f"POST {COMPLETIONS} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {size}",
        *lines,
    ]
    return ("\r\n".join(said) + "\r\n\r\n").encode()


def receive(raw: socket.socket, until: bytes) -> bytes:
    said = b""
    while until not in said:
        more = raw.recv(65536)
        assert more, f"{until!r} did not come: {said!r}"
        said += more
    return said


def wait_for(what: Any, within_s: float = 60.0) -> None:
    until = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def test_openais_client_works_unchanged(served: Any) -> None:
    import openai

    url, replies, _ = served
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()][:3] == ["base", "auto", "faq"]
        assert client.models.retrieve("faq@1.0").id == "faq@1.0"
        said: Any = client.chat.completions.create(**chat(logprobs=True, top_logprobs=1, n=2, seed=1))
        assert [choice.message.content for choice in said.choices] == ["the sky is blue "] * 2
        assert said.choices[0].logprobs.content[0].top_logprobs[0].token == "the "
        assert said.usage.total_tokens == 15
        stream: Any = client.chat.completions.create(**chat(stream=True, stream_options={"include_usage": True}))
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "the sky is blue "
        assert chunks[-1].usage.completion_tokens == 4
        called: Any = client.chat.completions.create(
            **chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
        )
        (call,) = called.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"room": "hall"}
        again: Any = client.chat.completions.create(
            model="faq",
            messages=[
                {"role": "user", "content": "light on"},
                called.choices[0].message,
                {"role": "tool", "tool_call_id": call.id, "content": "done"},
            ],
        )
        assert again.choices[0].finish_reason == "stop"
        formed: Any = client.chat.completions.create(**chat(response_format=SCHEMA))
        assert json.loads(formed.choices[0].message.content) == {"intent": "on"}
        text: Any = client.completions.create(model="base", prompt="the sky", max_tokens=5)
        assert text.choices[0].text == "the sky is blue "
        vectors = client.embeddings.create(model="base", input=["a", "bcd"])
        assert [list(vector.embedding) for vector in vectors.data] == [[0.0, 1.0], [0.0, 3.0]]
        raw = client.chat.completions.with_raw_response.create(**chat())
        assert raw.headers["x-sartor-receipt"] == raw.parse().id.removeprefix("chatcmpl-")
    assert replies.asked[0].model == "faq"


def test_openais_client_raises_its_own_errors(served: Any) -> None:
    import openai

    url, replies, _ = served
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(**chat(model="gpt-9"))
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="try: leave logit_bias out"):
            client.chat.completions.create(**chat(), logit_bias={"1": 5})
        replies.ends_with = serving.failed("DeadlineError")
        with pytest.raises(openai.APIError, match="too slow"):
            list(client.chat.completions.create(**chat(stream=True)))


def test_what_every_answer_says_and_does_not_say(served: Any) -> None:
    url, _, log = served
    answer = httpx.get(f"{url}/v1/models", headers={"x-request-id": "abc-1"}, timeout=120)
    assert answer.headers["x-request-id"] == "abc-1"
    assert "server" not in answer.headers
    raw = connect(url)
    raw.sendall(b"NONSENSE\r\n\r\n")
    assert receive(raw, b'"remedy"').startswith(b"HTTP/1.1 400")
    raw.close()
    wait_for(lambda: log.lines)  # a thread writes it
    assert [line["event"] for line in log.lines][0] == "ready"


def test_answers_do_not_wait_for_the_network(served: Any) -> None:
    """Head and body are two packets: with Nagle's algorithm the second waits for the client's delayed ACK, 40 ms."""
    with httpx.Client(base_url=served[0], timeout=120) as client:
        took = []
        for _ in range(80):
            began = time.perf_counter()
            client.post(COMPLETIONS, json=chat())
            took.append(time.perf_counter() - began)
    assert min(took[30:]) < 0.03  # quick ACKs are used up by then


def test_a_client_that_leaves_ends_its_reply(served: Any) -> None:
    url, replies, log = served
    replies.hold = asyncio.Event()
    for number, stream in enumerate((True, False), 1):
        raw = connect(url)
        body = json.dumps(chat(stream=stream)).encode()
        raw.sendall(head(body) + body)
        wait_for(lambda: len(replies.asked) == number)  # noqa: B023
        if stream:
            receive(raw, b"the ")
        raw.close()
        wait_for(lambda: f"r{number}" in replies.closed)  # noqa: B023
    assert replies.done == []
    wait_for(lambda: sum(line.get("error") == "Gone" for line in log.lines) == 2)


@pytest.mark.parametrize("chunked", [False, True])
def test_ten_megabyte_body_is_refused_with_413(served: Any, chunked: bool) -> None:
    """The connection serves the next request, whether the body was chunked or not."""
    url, replies, _ = served
    body = json.dumps(chat("a" * 10_000_000)).encode()
    pieces = (body[at : at + 65536] for at in range(0, len(body), 65536))
    with httpx.Client(base_url=url, headers={"content-type": "application/json"}, timeout=120) as client:
        began = time.monotonic()
        answer = client.post(COMPLETIONS, content=pieces if chunked else body)
        assert time.monotonic() - began < 60
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert client.post(COMPLETIONS, json=chat()).status_code == 200
    assert len(replies.asked) == 1


def test_a_client_that_waits_to_be_told_sends_no_large_body(served: Any) -> None:
    raw = connect(served[0])
    raw.sendall(head(40_000_000, "Expect: 100-continue"))
    assert receive(raw, b"remedy").startswith(b"HTTP/1.1 413")
    raw.close()


def test_stalling_clients_are_cut_off_and_others_are_not(tmp_path: Path) -> None:
    """A head and a body that never end, a body after its refusal, a reply that nobody reads."""
    replies, log = serving.Replies(), serving.Log()
    replies.pieces = [TextDelta("c", "x" * 50_000, 1)] * 1000
    team = serving.team(tmp_path, limits={"slow_client_s": 2.0})
    with running(HttpServer(serving.house(replies=replies), team, log=RequestLog(log))) as url:
        slow_head, slow_body, refused, deaf = (connect(url) for _ in range(4))
        slow_head.sendall(b"POST /v1/chat")
        slow_body.sendall(head(100) + b'{"model"')
        refused.sendall(head(40_000_000) + b"{")
        deaf_body = json.dumps(chat(stream=True)).encode()
        deaf.sendall(head(deaf_body) + deaf_body)
        ends = {}
        until = time.monotonic() + 60
        while len(ends) < 3 and time.monotonic() < until:
            for name, raw in (("head", slow_head), ("body", slow_body), ("refused", refused)):
                if name not in ends and is_cut(raw):
                    ends[name] = True
            assert httpx.get(f"{url}/health", timeout=120).status_code == 200
            time.sleep(0.1)
        assert set(ends) == {"head", "body", "refused"}
        wait_for(lambda: replies.closed)
        for raw in (slow_head, slow_body, refused, deaf):
            raw.close()
    assert replies.done == []
    assert any(line["event"] == "slow clients cut off" for line in log.lines)


def is_cut(raw: socket.socket) -> bool:
    """Sends one byte more, as a slow client does; whether the other side is gone."""
    try:
        raw.sendall(b"a")
        raw.settimeout(0.01)
        while raw.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


async def test_a_thousand_connections_at_once(served: Any) -> None:
    url, replies, _ = served
    body = json.dumps(chat()).encode()

    async def one(gate: asyncio.Event) -> bytes:
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        await gate.wait()
        writer.write(head(body, "Connection: close") + body)
        said = await reader.read()
        writer.close()
        return said

    gate = asyncio.Event()
    tasks = [asyncio.ensure_future(one(gate)) for _ in range(1000)]
    await asyncio.sleep(0.5)
    assert httpx.get(f"{url}/health", timeout=120).status_code == 200
    gate.set()
    answers = await asyncio.gather(*tasks)
    assert sum(answer.startswith(b"HTTP/1.1 200") and b"the sky is blue" in answer for answer in answers) == 1000
    assert len(replies.done) == 1000


def test_connections_above_the_limit_get_503(tmp_path: Path) -> None:
    """Connections far above the limit are dropped; once they are closed the server answers again."""
    server = HttpServer(
        serving.house(), serving.team(tmp_path, limits={"connections": 5}), log=RequestLog(serving.Log())
    )
    with running(server) as url:
        held = [connect(url) for _ in range(5)]
        crowded = httpx.get(f"{url}/v1/models", timeout=120)
        assert (crowded.status_code, crowded.headers["retry-after"]) == (503, "5")
        many = [connect(url) for _ in range(200)]
        wait_for(lambda: server.connections() <= 5 + 128)
        for raw in (*held, *many):
            raw.close()
        wait_for(lambda: server.connections() == 0)
        assert httpx.get(f"{url}/v1/models", timeout=120).status_code == 200


def streamed(url: str, told: list[str]) -> None:
    with httpx.stream("POST", f"{url}{COMPLETIONS}", json=chat(stream=True), timeout=20) as answer:
        told.append(str(answer.status_code))
        told.extend(line for line in answer.iter_lines() if line)


@pytest.mark.parametrize("in_time", [True, False])
def test_shutdown_drains_replies_and_ends_late_ones_by_error(tmp_path: Path, in_time: bool) -> None:
    """A reply within drain_s ends with stop, a later one with an error event; new connections fail."""

    class Waiting(serving.Replies):
        async def _events(self, request: Any, receipt: str) -> Any:
            yield TextDelta("c", "half ", 1)
            await asyncio.sleep(0.6 if in_time else 60)
            yield TextDelta("c", "whole", 1)
            yield ReplyDone("c", "stop", 1, 2)

    log, told = serving.Log(), list[str]()
    server = HttpServer(
        serving.house(replies=Waiting()),
        serving.team(tmp_path, http={"drain_s": 10.0 if in_time else 0.3}),
        log=RequestLog(log),
    )
    with running(server) as url:
        idle = connect(url)
        thread = threading.Thread(target=streamed, args=(url, told))
        thread.start()
        wait_for(lambda: len(told) > 2)
        began = time.monotonic()
    thread.join()
    assert time.monotonic() - began < 30
    assert told[0] == "200" and told[-1] == "data: [DONE]"
    last = json.loads(told[-2].removeprefix("data: "))
    if in_time:
        assert last["choices"][0]["finish_reason"] == "stop"
    else:
        assert last["error"]["code"] == "unavailable"
    with pytest.raises(OSError):
        connect(url)
    idle.close()
    assert "draining" in [line["event"] for line in log.lines]


def test_a_log_that_nobody_reads_stalls_nothing(tmp_path: Path) -> None:
    class Stuck(serving.Log):
        free = threading.Event()

        def write(self, text: str) -> int:
            self.free.wait()
            return super().write(text)

    log = Stuck()
    with running(HttpServer(serving.house(), serving.team(tmp_path), log=RequestLog(log))) as url:
        assert [httpx.get(f"{url}/v1/models", timeout=120).status_code for _ in range(3)] == [200] * 3
        log.free.set()
    assert len(log.lines) >= 4


def test_trouble_is_logged_once_and_when_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "TROUBLES_S", 0.01)
    log, troubles = serving.Log(), {"faq": "its Release is not there"}
    with running(HttpServer(serving.house(troubles=lambda: troubles), serving.team(tmp_path), log=RequestLog(log))):
        until(lambda: any(line["event"] == "trouble" for line in log.lines))
        troubles.clear()
        until(lambda: any(line["event"] == "trouble over" for line in log.lines))
    said = [line for line in log.lines if line["event"].startswith("trouble")]
    assert [(line["event"], line["agent"], line.get("why")) for line in said] == [
        ("trouble", "faq", "its Release is not there"),
        ("trouble over", "faq", None),
    ]


def until(is_so: Callable[[], bool], within_s: float = 60.0) -> None:
    end = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)
