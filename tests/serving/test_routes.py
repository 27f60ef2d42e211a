"""What each route answers, over a scripted house."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

import serving
from sartor.core.errors import DeadlineError, UnavailableError
from sartor.core.records import Feedback
from sartor.inference.engine import Logprob, ReplyFailed, TextDelta
from sartor.serving.feedback_store import Exchange, FeedbackStore, Memory
from sartor.serving.http.response_models import (
    AgentList,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    EmbeddingList,
    ErrorResponse,
    FeedbackResult,
    ModelList,
    ModelObject,
    ServerHealth,
)
from sartor.serving.types import AgentListing
from serving import chat, checked, events

COMPLETIONS = "/v1/chat/completions"
TOOLS = [{"type": "function", "function": {"name": "light", "parameters": {"type": "object", "properties": {}}}}]


async def ask(tmp_path: Path, *calls: tuple[str, str, Any], **parts: Any) -> list[Any]:
    """The answers to a few requests, one after the other."""

    async with serving.client(serving.house(**parts), serving.team(tmp_path)) as client:
        return [await client.request(method, path, json=body) for method, path, body in calls]


async def test_a_chat_is_answered_by_an_exact_version_with_a_receipt(tmp_path: Path) -> None:
    replies = serving.Replies()
    (answer,) = await ask(
        tmp_path, ("POST", COMPLETIONS, chat(temperature=0.5, max_tokens=9, seed=3, stop="x")), replies=replies
    )
    said = checked(ChatCompletion, answer.json())
    assert (said["model"], said["id"]) == ("faq@1.0", "chatcmpl-r1")
    assert said["choices"][0]["message"] == {"role": "assistant", "content": "the sky is blue ", "refusal": None}
    assert said["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert answer.headers["x-sartor-agent"] == "faq@1.0"
    assert answer.headers["x-sartor-reason"] == "asked by n\\xe4me and more"
    assert answer.headers["x-sartor-receipt"] == "r1"
    assert answer.headers["x-request-id"]
    asked = replies.asked[0]
    assert asked.sampling == {"temperature": 0.5, "max_tokens": 9, "seed": 3, "stop": ("x",)}
    assert asked.messages == ({"role": "user", "content": "hello"},)
    assert replies.closed == ["r1"]


async def test_request_without_sampling_passes_only_a_drawn_seed(tmp_path: Path) -> None:
    """The other fields are left to the Release; two requests have different seeds."""
    replies = serving.Replies()
    await ask(tmp_path, ("POST", COMPLETIONS, chat()), ("POST", COMPLETIONS, chat()), replies=replies)
    drawn = [request.sampling for request in replies.asked]
    assert [list(said) for said in drawn] == [["seed"], ["seed"]]
    assert drawn[0] != drawn[1]


async def test_several_choices_have_seeds_of_their_own_and_one_version(tmp_path: Path) -> None:
    replies = serving.Replies()
    (answer,) = await ask(tmp_path, ("POST", COMPLETIONS, chat(model="auto", n=3, seed=2**63 - 1)), replies=replies)
    said = checked(ChatCompletion, answer.json())
    assert [choice["index"] for choice in said["choices"]] == [0, 1, 2]
    assert [request.model for request in replies.asked] == ["auto", "faq@1.0", "faq@1.0"]
    assert len({request.sampling["seed"] for request in replies.asked}) == 3
    assert all(-(2**63) <= request.sampling["seed"] < 2**63 for request in replies.asked)
    assert (said["usage"]["prompt_tokens"], said["usage"]["completion_tokens"]) == (7, 12)
    assert answer.headers["x-sartor-receipt"] == "r1, r2, r3"


async def test_the_base_answers_further_choices_as_the_base(tmp_path: Path) -> None:
    replies = serving.Replies()
    (answer,) = await ask(tmp_path, ("POST", COMPLETIONS, chat(model="base", n=2)), replies=replies)
    assert answer.json()["model"] == "base@bbbbbbbbbbbb"
    assert [request.model for request in replies.asked] == ["base", "base"]


async def test_turns_and_parts_become_plain_messages(tmp_path: Path) -> None:
    replies = serving.Replies()
    call = {"id": "c1", "type": "function", "index": 0, "function": {"name": "light", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "light"}, {"type": "text", "text": " on"}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    ]
    (answer,) = await ask(tmp_path, ("POST", COMPLETIONS, {"model": "faq", "messages": messages}), replies=replies)
    assert answer.status_code == 200, answer.text
    assert replies.asked[0].messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "light on"},
        {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": call["function"]}]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"},
    )


async def test_schemas_and_tools_reach_the_call(tmp_path: Path) -> None:
    replies = serving.Replies()
    schema = {"type": "object", "properties": {"intent": {"$ref": "#/$defs/i"}}, "$defs": {"i": {"type": "string"}}}
    named = {"type": "function", "function": {"name": "light"}}
    bodies = [
        chat(response_format={"type": "json_object"}),
        chat(response_format={"type": "json_schema", "json_schema": {"name": "i", "schema": schema, "strict": True}}),
        chat(tools=TOOLS),
        chat(tools=TOOLS, tool_choice="none"),
        chat(tools=TOOLS, tool_choice="required"),
        chat(tools=TOOLS, tool_choice=named, parallel_tool_calls=False),
    ]
    answers = await ask(tmp_path, *(("POST", COMPLETIONS, body) for body in bodies), replies=replies)
    assert [answer.status_code for answer in answers] == [200] * 6, [answer.text for answer in answers]
    assert [bool(request.tools) for request in replies.asked] == [False, False, True, False, True, True]
    assert [request.must_call for request in replies.asked] == ["", "", "", "", "*", "light"]
    assert replies.asked[0].schema == '{"type":"object"}'
    assert json.loads(replies.asked[1].schema) == schema
    many, one = answers[4].json()["choices"][0], answers[5].json()["choices"][0]
    assert (many["finish_reason"], many["message"]["content"]) == ("tool_calls", None)
    assert [len(choice["message"]["tool_calls"]) for choice in (many, one)] == [2, 1]
    checked(ChatCompletion, answers[5].json())


@pytest.mark.parametrize("top", [None, 0, 1, 2])
async def test_logprobs(tmp_path: Path, top: int | None) -> None:
    replies = serving.Replies()
    (answer,) = await ask(tmp_path, ("POST", COMPLETIONS, chat(logprobs=True, top_logprobs=top)), replies=replies)
    content = checked(ChatCompletion, answer.json())["choices"][0]["logprobs"]["content"]
    assert [token["token"] for token in content] == ["the ", "sky ", "is ", "blue "]
    assert bytes(content[0]["bytes"]) == b"the "
    assert [len(token["top_logprobs"]) for token in content] == [top or 0] * 4
    if top == 2:
        assert content[0]["top_logprobs"][1]["logprob"] == -9999.0


async def test_a_text_goes_on_for_each_prompt(tmp_path: Path) -> None:
    replies = serving.Replies()
    (answer,) = await ask(
        tmp_path, ("POST", "/v1/completions", {"model": "faq", "prompt": ["a", "b"], "n": 2}), replies=replies
    )
    said = checked(Completion, answer.json())
    assert [choice["index"] for choice in said["choices"]] == [0, 1, 2, 3]
    assert [request.text for request in replies.asked] == ["a", "a", "b", "b"]
    assert said["usage"]["prompt_tokens"] == 14


async def test_text_logprob_offsets_count_over_the_whole_reply(tmp_path: Path) -> None:
    """Offsets of /v1/completions go on from chunk to chunk of a stream."""
    pieces = (
        TextDelta("c", "ab", 1, (Logprob("ab", -1.0),)),
        TextDelta("c", "c", 1, (Logprob("c", -2.0, (("c", -2.0),)),)),
    )
    body = {"model": "faq", "prompt": "a", "logprobs": 1}
    whole, stream = await ask(
        tmp_path,
        ("POST", "/v1/completions", body),
        ("POST", "/v1/completions", {**body, "stream": True}),
        replies=serving.Replies(pieces=pieces),
    )
    assert checked(Completion, whole.json())["choices"][0]["logprobs"]["text_offset"] == [0, 2]
    said = [checked(CompletionChunk, event)["choices"][0] for event in events(stream.text)[:-1]]
    assert [choice["logprobs"]["text_offset"] for choice in said[:2]] == [[0], [2]]
    assert [choice["text"] for choice in said] == ["ab", "c", ""]


async def test_a_stream_has_the_chunks_that_clients_expect(tmp_path: Path) -> None:
    (answer,) = await ask(tmp_path, ("POST", COMPLETIONS, chat(stream=True, stream_options={"include_usage": True})))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "content-length" not in answer.headers
    said = events(answer.text)
    assert said.pop() == "[DONE]"
    checked(list[ChatCompletionChunk], said)
    assert said[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in said[:-1]) == "the sky is blue "
    assert [chunk["choices"][0]["finish_reason"] for chunk in said[:-1]] == [None] * 5 + ["stop"]
    assert (said[-1]["choices"], said[-1]["usage"]["total_tokens"]) == ([], 11)
    assert {chunk["usage"] for chunk in said[:-1] if chunk["usage"] is None} == {None}
    assert {(chunk["id"], chunk["model"], chunk["object"]) for chunk in said} == {
        ("chatcmpl-r1", "faq@1.0", "chat.completion.chunk")
    }


async def test_a_stream_of_tool_calls_and_of_several_choices(tmp_path: Path) -> None:
    required = chat(stream=True, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    calls, many = await ask(tmp_path, ("POST", COMPLETIONS, required), ("POST", COMPLETIONS, chat(stream=True, n=3)))
    said = [checked(ChatCompletionChunk, chunk)["choices"][0] for chunk in events(calls.text)[:-1]]
    assert [call["function"]["name"] for call in said[1]["delta"]["tool_calls"]] == ["light"]
    assert said[1]["delta"]["tool_calls"][0]["index"] == 0
    assert said[-1]["finish_reason"] == "tool_calls"
    texts = dict.fromkeys(range(3), "")
    for choice in (chunk["choices"][0] for chunk in events(many.text)[:-1]):
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert set(texts.values()) == {"the sky is blue "}


async def test_text_that_is_held_back_makes_no_chunk(tmp_path: Path) -> None:
    pieces = (TextDelta("c", "", 3), TextDelta("c", "blue", 1))
    (answer,) = await ask(tmp_path, ("POST", COMPLETIONS, chat(stream=True)), replies=serving.Replies(pieces=pieces))
    assert [chunk["choices"][0]["delta"] for chunk in events(answer.text)[:-1]][1:] == [{"content": "blue"}, {}]


@pytest.mark.parametrize("count", [1, 3])
async def test_failed_reply_is_a_status_or_an_event_of_the_stream(tmp_path: Path, count: int) -> None:
    """A whole reply fails with HTTP 504, a stream with an error event before [DONE]."""
    failed = ReplyFailed("c", "DeadlineError", "60 s were over", "ask for less")
    replies = serving.Replies(ends_with=failed)
    whole, stream = await ask(
        tmp_path,
        ("POST", COMPLETIONS, chat(n=count)),
        ("POST", COMPLETIONS, chat(n=count, stream=True)),
        replies=replies,
    )
    assert (whole.status_code, whole.json()["error"]["kind"]) == (504, "DeadlineError")
    said = events(stream.text)
    assert said[-1] == "[DONE]"
    assert said[-2]["error"]["message"] == "60 s were over; try: ask for less"
    assert len(replies.closed) == 2 * count


@pytest.mark.parametrize("stream", [False, True])
async def test_the_front_keeps_the_deadline_itself(
    tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the reply has begun long before, also on a busy machine
    monkeypatch.setattr("sartor.serving.http.reply_collection.GRACE_S", 0.0)
    replies = serving.Replies(hold=asyncio.Event())

    async with serving.client(
        serving.house(replies=replies), serving.team(tmp_path, limits={"deadline_s": 5.0})
    ) as client:
        answer = await client.post(COMPLETIONS, json=chat(stream=stream))
    assert answer.status_code == (200 if stream else 504)
    said = events(answer.text)[-2] if stream else answer.json()
    assert said["error"]["kind"] == "DeadlineError"
    assert (replies.closed, replies.done) == (["r1"], [])


async def test_a_house_that_does_not_even_begin_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sartor.serving.http.reply_collection.GRACE_S", 0.0)

    class Hung(serving.Replies):
        async def open(self, request: Any) -> Any:
            await asyncio.Event().wait()

    async with serving.client(
        serving.house(replies=Hung()), serving.team(tmp_path, limits={"deadline_s": 0.02})
    ) as client:
        result = await client.post(COMPLETIONS, json=chat(n=3))
    assert result.status_code == 504


async def test_line_ends_that_only_some_clients_know_split_no_event(tmp_path: Path) -> None:
    pieces = (TextDelta("c", "a\u2028b\x85c\n\r\x0bé\ud800", 1),)
    (answer,) = await ask(tmp_path, ("POST", COMPLETIONS, chat(stream=True)), replies=serving.Replies(pieces=pieces))
    lines = [line for line in answer.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert json.loads(lines[1].removeprefix("data: "))["choices"][0]["delta"]["content"] == "a\u2028b\x85c\n\r\x0bé?"


async def test_an_agent_that_was_never_admitted_is_not_offered(tmp_path: Path) -> None:
    class Unready(serving.Roster):
        async def listed(self) -> Any:
            return [AgentListing("hurt", "", ()), AgentListing("shop", "1", ("1",), is_ready=False)]

    said, one, other = await ask(
        tmp_path,
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/shop", None),
        ("GET", "/v1/models/hurt", None),
        agent_admin=Unready(),
    )
    assert [(model["id"], model["root"]) for model in said.json()["data"]][2:] == [("hurt", "hurt")]
    assert (one.status_code, one.headers["retry-after"], other.status_code) == (503, "5", 200)
    assert "admitted" in one.json()["error"]["message"]


async def test_a_reply_that_stops_without_its_end_is_no_whole_reply(tmp_path: Path) -> None:
    class Torn(serving.Replies):
        async def _events(self, request: Any, receipt: str) -> Any:
            yield TextDelta("c", "half", 1)

    (answer,) = await ask(tmp_path, ("POST", COMPLETIONS, chat()), replies=Torn())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


async def test_a_bug_tells_nothing_and_is_logged_by_its_place(tmp_path: Path) -> None:
    replies = serving.Replies(fail=KeyError("my secret prompt"))
    async with serving.client(serving.house(replies=replies), serving.team(tmp_path)) as client:
        answer = await client.post(COMPLETIONS, json=chat("my secret prompt"))
        replies.fail, replies.ends_with = None, "no event"  # type: ignore[assignment]
        stream = await client.post(COMPLETIONS, json=chat("my secret prompt", stream=True))
    answer, stream, lines = answer, stream, client.log.lines
    assert (answer.status_code, answer.json()["error"]["kind"]) == (500, "Bug")
    assert events(stream.text)[-2:] == [answer.json(), "[DONE]"]
    bugs = [line for line in lines if line["event"] == "bug"]
    assert [bug["error"] for bug in bugs] == ["KeyError", "AttributeError"]
    assert bugs[0]["request"] == answer.headers["x-request-id"]
    assert "serving.py" in bugs[0]["at"][-1]
    assert "secret" not in json.dumps(lines) + answer.text


async def test_log_lines_have_no_content_and_count_tokens(tmp_path: Path) -> None:
    async with serving.client(serving.house(keys=serving.KEYS), serving.team(tmp_path)) as client:
        key = {"authorization": "Bearer key-faq", "x-request-id": "mine-1"}
        await client.post(COMPLETIONS, json=chat("my secret prompt"), headers=key)
        await client.post(COMPLETIONS, json=chat(model="a secret name"), headers=key)
        await client.get("/health")
        await client.get("/secret/path")
    lines = client.log.lines
    assert "secret" not in json.dumps(lines) and "sky" not in json.dumps(lines) and "key-faq" not in json.dumps(lines)
    first = {key: value for key, value in lines[0].items() if key not in ("time", "first_s", "wall_s")}
    assert first == {
        "event": "request",
        "request": "mine-1",
        "method": "POST",
        "route": COMPLETIONS,
        "status": 200,
        "key": "k1",
        "agent": "faq@1.0",
        "receipt": "r1",
        "finish": "stop",
        "prompt_tokens": 7,
        "cached_tokens": 2,
        "reply_tokens": 4,
    }
    assert [line["status"] for line in lines] == [200, 404, 401]


async def test_vectors(tmp_path: Path) -> None:
    body = {"model": "base", "input": ["a", "bcd"]}
    plain, packed, one, foreign = await ask(
        tmp_path,
        ("POST", "/v1/embeddings", body),
        ("POST", "/v1/embeddings", {**body, "encoding_format": "base64"}),
        ("POST", "/v1/embeddings", {**body, "input": "abcd"}),
        ("POST", "/v1/embeddings", {**body, "model": "/etc"}),
    )
    vectors = checked(EmbeddingList, plain.json())["data"]
    assert [vector["embedding"] for vector in vectors] == [[0.0, 1.0], [0.0, 3.0]]
    checked(EmbeddingList, packed.json())
    assert packed.json()["data"][0]["embedding"] == "AAAAAAAAgD8="
    assert one.json()["data"][0]["embedding"] == [0.0, 4.0]
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (404, "model_not_found")
    assert plain.json()["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


@pytest.mark.parametrize(
    ("said", "problem", "remedy"),
    [
        ([], "input holds nothing; it must hold at least 1", "send 1 or more"),
        (["a"] * 257, "input holds 257; the limit is 256", "send at most 256"),
        (
            ["a" * 999] * 101,
            "input has 100899 characters in 101 texts; the limit of one request is 100000",
            "several requests",
        ),
        (["a", "b" * 1001], "input[1] is longer than base reads", "split that text"),
        ([1, 2, 3], "input holds token ids", "send the text"),
        ([[1, 2], [3]], "input holds token ids", "send the text"),
    ],
    ids=["none", "many", "large", "long", "ids", "lists of ids"],
)
async def test_texts_that_cannot_all_become_vectors_are_refused(
    tmp_path: Path, said: Any, problem: str, remedy: str
) -> None:
    (answer,) = await ask(tmp_path, ("POST", "/v1/embeddings", {"model": "base", "input": said}))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "input")
    assert problem in error["message"] and remedy in error["remedy"]


async def test_a_list_that_is_too_long_says_the_limit(tmp_path: Path) -> None:
    (answer,) = await ask(tmp_path, ("POST", COMPLETIONS, chat(stop=["a"] * 1000)))
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "stop holds 1000; the limit is 16; try: send at most 16",
    )


async def test_answers_have_their_declared_form(tmp_path: Path) -> None:
    calls = [
        (ChatCompletion, "POST", COMPLETIONS, chat()),
        (FeedbackResult, "POST", "/v1/feedback", {"receipt": "r1", "rating": 1}),
        (ServerHealth, "GET", "/health", None),
        (ModelList, "GET", "/v1/models", None),
        (ModelObject, "GET", "/v1/models/faq", None),
        (AgentList, "GET", "/v1/agents", None),
        (ErrorResponse, "GET", "/v1/models/nobody", None),
        (ErrorResponse, "GET", "/v1/nothing", None),
    ]
    async with serving.client(
        serving.house(keys=serving.KEYS), serving.team(tmp_path), authorization="Bearer key-both"
    ) as client:
        for model, method, path, body in calls:
            answer = await client.request(method, path, json=body)
            assert answer.is_error == (model is ErrorResponse), answer.text
            checked(model, answer.json())


async def test_models_are_listed_with_their_versions_and_parents(tmp_path: Path) -> None:
    every, one, none = await ask(
        tmp_path, ("GET", "/v1/models", None), ("GET", "/v1/models/faq@0.9", None), ("GET", "/v1/models/faq@7", None)
    )
    listed = {model["id"]: model for model in every.json()["data"]}
    assert list(listed) == ["base", "auto", "faq", "faq@1.0", "faq@0.9", "home", "home@2.0", "home@0.9"]
    assert (listed["faq"]["root"], listed["faq"]["parent"]) == ("faq@1.0", "base")
    assert (listed["base"]["root"], listed["base"]["parent"]) == ("base@bbbbbbbbbbbb", None)
    assert one.json() == listed["faq@0.9"]
    assert (none.status_code, none.json()["error"]["param"]) == (404, "model")


async def test_health_tells_whoever_may_know_what_is_wrong(tmp_path: Path) -> None:
    (answer,) = await ask(
        tmp_path, ("GET", "/health", None), troubles=lambda: {"home@2.0": "its adapter does not load"}
    )
    assert (answer.json()["status"], answer.json()["troubles"]) == (
        "degraded",
        {"home@2.0": "its adapter does not load"},
    )
    assert answer.json()["agents"]["faq@1.0"]["why"] == "NaN"


@pytest.mark.parametrize(
    ("states", "breaker", "status", "code"),
    [
        (("ready", "ready"), "closed", "ok", 200),
        (("ready", "starting"), "closed", "degraded", 200),
        (("ready",), "quarantined", "degraded", 200),
        (("gone", "starting"), "closed", "unavailable", 503),
    ],
)
async def test_health(tmp_path: Path, states: tuple[str, ...], breaker: str, status: str, code: int) -> None:
    (answer,) = await ask(tmp_path, ("GET", "/health", None), workers=serving.Crew(states=states, breaker=breaker))
    assert (answer.status_code, answer.json()["status"]) == (code, status)
    assert "4242" not in answer.text


async def test_metrics_count_what_happened(tmp_path: Path) -> None:
    replies = serving.Replies()
    *_, page = await ask(
        tmp_path,
        ("POST", COMPLETIONS, chat(stream=True)),
        ("POST", COMPLETIONS, chat(model="no such")),
        ("POST", "/v1/feedback", {"receipt": "r1", "rating": -1}),
        ("GET", "/metrics", None),
        replies=replies,
        receipts_lost=lambda: 3,
    )
    lines = page.text.splitlines()
    for line in (
        'sartor_requests_total{agent="faq@1.0",route="/v1/chat/completions",status="200"} 1.0',
        'sartor_errors_total{agent="",kind="UnknownAgentError",route="/v1/chat/completions"} 1.0',
        'sartor_tokens_total{agent="faq@1.0",kind="reply"} 4.0',
        'sartor_first_token_seconds_count{agent="faq@1.0"} 1.0',
        'sartor_feedback_total{agent="faq@1.0",kind="rating"} 1.0',
        'sartor_workers{state="ready"} 2.0',
        'sartor_worker_restarts_total{worker="0"} 1.0',
        'sartor_breaker{agent="faq@1.0",state="closed"} 1.0',
        'sartor_queued{agent="faq@1.0"} 1.0',
        "sartor_receipts_lost_total 3.0",
    ):
        assert line in lines, line
    assert "no such" not in page.text


async def test_feedback_is_stored_with_its_reply_and_monitored(tmp_path: Path) -> None:
    """The monitors get the rating; an unknown receipt is 404, and feedback without content 400."""
    roster = serving.Roster()
    _, by_id, late, unknown, nothing = await ask(
        tmp_path,
        ("POST", COMPLETIONS, chat("sky?", stream=True)),
        ("POST", "/v1/feedback", {"receipt": "chatcmpl-r1", "rating": -1, "correction": "grey", "comment": "wrong"}),
        ("POST", "/v1/feedback", {"receipt": "r1", "comment": "again"}),
        ("POST", "/v1/feedback", {"receipt": "r9", "rating": 1}),
        ("POST", "/v1/feedback", {"receipt": "r1", "comment": ""}),
        agent_admin=roster,
    )
    assert by_id.json() == {"receipt": "r1", "agent": "faq@1.0", "learnable": True}
    assert [answer.status_code for answer in (late, unknown, nothing)] == [200, 404, 400]
    (file,) = (tmp_path / "inbox").iterdir()
    first, second = [Feedback.from_json(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    assert (first.receipt, first.rating, first.correction, first.comment) == ("r1", -1, "grey", "wrong")
    assert first.messages == ({"role": "user", "content": "sky?"},)
    assert first.reply == "the sky is blue "
    assert second.comment == "again"
    assert file.stat().st_mode & 0o077 == 0
    assert roster.heard == [("faq@1.0", -1.0)]


async def test_the_memory_forgets_the_oldest_and_feedback_says_so(tmp_path: Path) -> None:
    team = serving.team(tmp_path, limits={"remembered_bytes": 80})
    async with serving.client(serving.house(), team) as client:
        for text in ("first", "second"):
            await client.post(COMPLETIONS, json=chat(text))
        result = [await client.post("/v1/feedback", json={"receipt": name, "rating": 1}) for name in ("r1", "r2")]
    assert [answer.json()["learnable"] for answer in result] == [False, True]
    nothing = Memory(0)
    nothing.keep("r1", Exchange("faq@1.0", (), "a", "b"))
    assert nothing.find("r1") is None


def test_inbox_survives_a_torn_line_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line after a torn one is whole; a partial write is undone and raises."""
    inbox = FeedbackStore(tmp_path / "inbox")
    said = Feedback("r1", "faq@1.0", "2026-01-31T00:00:00Z", rating=1)
    inbox.add(said)
    (file,) = inbox.path.iterdir()
    with file.open("a") as stream:
        stream.write('{"schema": 1, "rec')
    inbox.add(said)
    lines = file.read_text().splitlines()
    assert [lines[0], lines[2]] == [json.dumps(said.as_json())] * 2
    before = file.read_bytes()

    def full(descriptor: int, data: bytes) -> int:
        file.write_bytes(before + bytes(data[:5]))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sartor.serving.feedback_store.os.write", full)
    with pytest.raises(Exception, match="No space left"):
        inbox.add(said)
    assert file.read_bytes() == before


async def test_receipts(tmp_path: Path) -> None:
    _, found, by_id, absent = await ask(
        tmp_path,
        ("POST", COMPLETIONS, chat()),
        ("GET", "/v1/receipts/r1", None),
        ("GET", "/v1/receipts/chatcmpl-r1", None),
        ("GET", "/v1/receipts/r2", None),
    )
    assert found.json() == by_id.json() == {"id": "r1", "agent": "faq@1.0"}
    assert (absent.status_code, absent.json()["error"]["code"]) == (404, "not_found")


async def test_errors_have_their_statuses(tmp_path: Path) -> None:
    for error, status in ((UnavailableError("no", "x"), 503), (DeadlineError("no", "x"), 504)):
        (answer,) = await ask(tmp_path, ("POST", COMPLETIONS, chat()), replies=serving.Replies(fail=error))
        assert (answer.status_code, answer.json()["error"]["remedy"]) == (status, "x")
    path, method = await ask(tmp_path, ("POST", "/v1/audio/songs", {}), ("DELETE", "/v1/models", None))
    assert (path.status_code, method.status_code) == (404, 405)
    assert method.json()["error"]["remedy"]
