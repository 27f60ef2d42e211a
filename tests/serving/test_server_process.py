"""`sartor serve` as a process: from TEAM.yaml to an address, real workers behind it, and an end by a signal."""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from server_process import address, children, serve
from speaking import needs_espeak

SCHEMA: Any = {
    "type": "object",
    "properties": {"place": {"enum": ["kitchen", "hall"]}, "on": {"type": "boolean"}},
    "required": ["place", "on"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "light", "parameters": SCHEMA}}]


EXTREMES: list[dict[str, Any]] = [
    {"temperature": 5e-324},
    {"temperature": 2, "top_p": 5e-324},
    {"temperature": 1e-40, "frequency_penalty": -2, "n": 3},
    {"seed": -(2**63), "temperature": 1},
    {"seed": 2**63 - 1, "temperature": 1, "n": 16},
    {"stop": ["x" * 5000, "\u2028"]},
    {"logprobs": True, "top_logprobs": 20, "stream": True},
    {"tools": TOOLS, "tool_choice": "required", "temperature": 2},
    {"messages": [{"role": "tool", "tool_call_id": "", "content": "<|im_end|>"}]},
    {"messages": [{"role": "user", "content": ""}]},
    *(
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}
        for schema in (
            {"not": {}},
            {"$ref": "#"},
            {"enum": []},
            {"type": "string", "minLength": 10**9},
            {"type": "number", "multipleOf": 0},
            {"pattern": "(?=x)"},
            {"patternProperties": {"(": {}}},
            {"allOf": [{"type": "string"}, {"type": "integer"}]},
        )
    ),
]


def extremes(url: str) -> None:
    """Requests that the OpenAPI allows and that an engine may choke on: each is answered, or refused, and no worker ends."""
    with httpx.Client(base_url=url, timeout=60) as client:
        for fields in EXTREMES:
            body = {"model": "base", "messages": [{"role": "user", "content": "é😀"}], "max_tokens": 2, **fields}
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code in (200, 400) and '"code":"unavailable"' not in answer.text, (
                fields,
                answer.text,
            )
        assert client.get("/health").json()["workers"][0]["restarts"] == 0


@pytest.mark.services
@pytest.mark.alone
def test_sigterm_lets_a_reply_end_and_stops_the_workers(tiny_base: Path, tmp_path: Path) -> None:
    """The front process loads no torch, health names a missing Release, and the log has each stage."""
    told: list[Any] = []

    def ask(url: str) -> None:
        body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
            told.extend(line for line in answer.iter_lines() if line)

    with serve(tmp_path / "state", str(tiny_base)) as (process, log):
        url = address(process)
        assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text(), "the front process has loaded torch"
        health = httpx.get(f"{url}/health", timeout=120).json()
        assert health["status"] == "degraded" and "there is no directory" in health["troubles"]["nobody"]
        names = {model["id"] for model in httpx.get(f"{url}/v1/models", timeout=120).json()["data"]}
        assert names - {"speech"} == {"base", "auto"}
        body = {"model": "nobody", "messages": [{"role": "user", "content": "hi"}]}
        refused = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        assert (
            refused.status_code == 503 and "not admitted: there is no directory" in refused.json()["error"]["message"]
        )
        workers = children(process)
        extremes(url)
        thread = threading.Thread(target=ask, args=(url,))
        thread.start()
        while not told and thread.is_alive():
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert process.wait(120) == 143
        assert process.stdout and process.stdout.read() == ""
        said = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert told[-1] == "data: [DONE]" and '"finish_reason":"length"' in told[-2]
    stages = ["opening the base", "admitting", "agents open", "ready", "trouble", "draining"]
    assert [line["event"] for line in said if line["event"] != "request"] == stages
    assert said[0]["base"] == str(tiny_base) and (said[1]["agent"], said[2]["served"]) == ("nobody", [])
    asked = [
        line for line in said if line["event"] == "request"
    ]  # the last may end before the signal is heard: a busy machine
    assert asked[-1]["reply_tokens"] == 300
    assert workers and not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.services
@pytest.mark.alone
def test_ctrl_c_before_it_answers_ends_everything(tiny_base: Path, tmp_path: Path) -> None:
    with serve(tmp_path / "state", str(tiny_base)) as (process, _):
        while not (workers := children(process)):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
        assert process.stdout and process.stdout.read() == ""
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


@pytest.mark.services
@pytest.mark.alone
@pytest.mark.parametrize(
    "flags", [("--host", "0.0.0.0"), ("--http.prot", "1"), ("--http.otel", "", "--port", "99999")]
)
def test_what_cannot_be_served_is_said_before_any_worker_starts(tmp_path: Path, flags: tuple[str, ...]) -> None:
    with serve(tmp_path / "state", "starter", *flags) as (process, _):
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 2
    assert json.loads(said)["error"]["kind"] == "ConfigError"


@pytest.mark.circle
def test_openais_client_against_the_starter_base(tmp_path: Path) -> None:
    import openai

    with serve(tmp_path / "state", "starter") as (process, _):
        client = openai.OpenAI(base_url=f"{address(process)}/v1", api_key="none", max_retries=0)
        question: Any = [{"role": "user", "content": "Switch the light in the hall on."}]
        common: Any = {"model": "base", "temperature": 0}
        with client:
            stream: Any = client.chat.completions.create(**common, messages=question, max_tokens=16, stream=True)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            whole: Any = client.chat.completions.create(**common, messages=question, max_tokens=16)
            assert whole.choices[0].message.content == text and len(text) > 10
            formed: Any = client.chat.completions.create(
                **common,
                messages=question,
                max_tokens=40,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "light", "schema": SCHEMA, "strict": True},
                },
            )
            assert set(json.loads(formed.choices[0].message.content)) == {"place", "on"}
            called: Any = client.chat.completions.create(
                **common, messages=question, max_tokens=60, tools=TOOLS, tool_choice="required"
            )
            (call,) = called.choices[0].message.tool_calls
            assert call.function.name == "light" and set(json.loads(call.function.arguments)) == {"place", "on"}
            vectors = client.embeddings.create(
                model="base", input=["light on", "light off", "the price of tea in China"]
            )
            near, far = (
                sum(a * b for a, b in zip(vectors.data[0].embedding, vectors.data[at].embedding)) for at in (1, 2)
            )
            assert near > far
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143


@needs_espeak
@pytest.mark.services
@pytest.mark.alone
def test_a_served_team_speaks_and_leaves_no_voice_behind(tmp_path: Path, tiny_base: Path) -> None:
    with serve(tmp_path / "state", str(tiny_base)) as (process, _):
        url = address(process)
        body = {"model": "speech", "input": "Hello there.", "response_format": "wav"}
        answer = httpx.post(f"{url}/v1/audio/speech", json=body, timeout=60)
        assert answer.content[:4] == b"RIFF" and answer.headers["content-type"] == "audio/wav"
        assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text(), "the front process has loaded torch"
        long = {**body, "input": "A sentence of some words. " * 150, "response_format": "opus"}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/audio/speech", json=long, timeout=0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
    assert [path for path in Path("/proc").glob("[0-9]*/cwd") if _leads_to(path, tmp_path / "state")] == []


def _leads_to(link: Path, where: Path) -> bool:
    """Whether a process, which may end at any time, works there."""
    try:
        return link.readlink() == where
    except OSError:
        return False
