"""The engine over HTTP, against a small server with vLLM's routes. Real vLLM was not run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openai_fake import Fake, serving
from replies import text_of
from sartor.core.errors import BusyError, ConfigError, ModelError, RequestError, UnavailableError
from sartor.inference import openai_engine
from sartor.inference.engine import Event, GenerateCall, ReplyDone, ReplyFailed, Sampling, TextDelta
from sartor.inference.openai_engine import RemoteEngine, open_engine

pytestmark = pytest.mark.services
ASKED = ({"role": "user", "content": "what colour is the sky"},)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serving(Fake()) as started:
        yield started


@pytest.fixture
def engine(fake: Fake, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteEngine]:
    monkeypatch.setattr(openai_engine, "BACKOFF_S", 0.01)
    opened = open_engine(str(tiny_base), url=fake.url, loads_adapters=True, rows=4, waiting=3)
    yield opened
    opened.close()


def answer(engine: RemoteEngine, *calls: GenerateCall) -> dict[str, list[Event]]:
    """Every call's events."""
    for call in calls:
        engine.submit(call)
    told: dict[str, list[Event]] = {call.id: [] for call in calls}
    while engine.busy:
        for event in engine.step():
            told[event.call].append(event)
    return told


def test_a_reply_is_streamed(engine: RemoteEngine, fake: Fake) -> None:
    sampling = Sampling(
        max_tokens=9, temperature=0.5, top_p=0.9, seed=3, stop=("\n",), frequency_penalty=1, presence_penalty=-1
    )
    events = answer(engine, GenerateCall(id="a", messages=ASKED, sampling=sampling))["a"]
    assert [event.text for event in events if isinstance(event, TextDelta)] == ["the sky", " is", " blue"]
    (body,) = fake.of("/v1/completions")
    ids = body.pop("prompt")
    assert events[-1] == ReplyDone("a", "stop", len(ids), 7, 4) and all(isinstance(token, int) for token in ids)
    assert body == {
        "model": "tiny",
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["\n"],
        "frequency_penalty": 1,
        "presence_penalty": -1,
        "stop_token_ids": [2],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert (engine.about.kind, engine.about.device, engine.about.context_tokens) == ("openai", "vllm", 400)


def test_text_that_has_line_separators_of_unicode_arrives_whole(engine: RemoteEngine, fake: Fake) -> None:
    fake.replies["tiny"] = ["a\u2028b", "\x85c\u2029", "é🎉"]
    assert text_of(answer(engine, GenerateCall(id="a", text="x"))["a"]) == "a\u2028b\x85c\u2029é🎉"


def test_an_adapter_is_loaded_under_its_digest_and_unloaded(engine: RemoteEngine, fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"12345")
    assert engine.attach("d1", tmp_path) == 5 and engine.attach("d1", tmp_path) == 5
    assert fake.of("/v1/load_lora_adapter") == [{"lora_name": "d1", "lora_path": str(tmp_path)}]
    told = answer(engine, GenerateCall(id="a", text="x", adapter="d1"), GenerateCall(id="b", text="x"))
    assert text_of(told["a"]) == "loaded" and text_of(told["b"]) == "the sky is blue"
    engine.detach("d1")
    engine.detach("d1")
    assert fake.of("/v1/unload_lora_adapter") == [{"lora_name": "d1"}]
    with pytest.raises(ModelError, match="no adapter"):
        engine.submit(GenerateCall(id="c", text="x", adapter="d1"))


def test_an_adapter_that_the_server_refuses_is_refused(engine: RemoteEngine, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    with pytest.raises(ModelError, match="cannot load adapter"):
        engine.attach("d1", tmp_path / "broken")
    with pytest.raises(ModelError, match="no adapter"):
        engine.submit(GenerateCall(id="c", text="x", adapter="d1"))


def test_without_runtime_loading_only_listed_adapters_are_served(fake: Fake, tiny_base: Path, tmp_path: Path) -> None:
    """An adapter is matched by its name or its path, and is not unloaded."""
    fake.roots |= {"faq": str(tmp_path / "faq"), "d2": "/elsewhere"}
    fake.replies |= {"faq": ["from faq"], "d2": ["from d2"]}
    engine = open_engine(str(tiny_base), url=fake.url)
    engine.attach("d1", tmp_path / "faq")
    engine.attach("d2", tmp_path / "other")
    with pytest.raises(ModelError, match="does not serve"):
        engine.attach("d3", tmp_path / "other")
    told = answer(engine, GenerateCall(id="a", text="x", adapter="d1"), GenerateCall(id="b", text="x", adapter="d2"))
    engine.detach("d1")
    assert (text_of(told["a"]), text_of(told["b"])) == ("from faq", "from d2") and not fake.of(
        "/v1/unload_lora_adapter"
    )
    engine.close()


def test_an_adapter_that_vanished_from_the_server_is_no_base(engine: RemoteEngine, fake: Fake, tmp_path: Path) -> None:
    engine.attach("d1", tmp_path)
    del fake.replies["d1"]
    (failed,) = answer(engine, GenerateCall(id="a", text="x", adapter="d1"))["a"]
    assert isinstance(failed, ReplyFailed) and failed.kind == "ModelError"


@pytest.mark.parametrize("fault", [503, 500, 429])
def test_what_fails_before_the_first_token_is_asked_again(engine: RemoteEngine, fake: Fake, fault: int) -> None:
    fake.faults = [fault, fault]
    assert (
        text_of(answer(engine, GenerateCall(id="a", text="x"))["a"]) == "the sky is blue"
        and len(fake.of("/v1/completions")) == 3
    )


@pytest.mark.parametrize(
    ("fault", "kind", "asked"),
    [
        (503, "UnavailableError", 3),
        (429, "BusyError", 3),
        (400, "RequestError", 1),
        (422, "RequestError", 1),
        (401, "UnavailableError", 3),
        (404, "ModelError", 1),
    ],
)
def test_errors_are_typed(engine: RemoteEngine, fake: Fake, fault: int, kind: str, asked: int) -> None:
    fake.faults = [fault] * 9
    (failed,) = answer(engine, GenerateCall(id="a", text="x"))["a"]
    assert (
        isinstance(failed, ReplyFailed)
        and (failed.kind, len(fake.of("/v1/completions"))) == (kind, asked)
        and failed.remedy
    )


def test_reply_cut_after_its_first_token_is_not_retried(engine: RemoteEngine, fake: Fake) -> None:
    fake.cut_after = 1
    first, failed = answer(engine, GenerateCall(id="a", text="x"))["a"]
    assert isinstance(first, TextDelta) and isinstance(failed, ReplyFailed) and failed.kind == "UnavailableError"
    assert len(fake.of("/v1/completions")) == 1


@pytest.mark.parametrize(
    "sent", ["{}", "[]", "{", '{"choices":[{}]}', '{"choices":3}', '{"error":{"message":"boom"}}', '{"usage":3}']
)
def test_events_of_another_form_fail_their_own_reply(
    engine: RemoteEngine, fake: Fake, sent: str, monkeypatch: Any
) -> None:
    import openai_fake

    whole = openai_fake._Answers._event
    monkeypatch.setattr(
        openai_fake._Answers, "_event", lambda self, said: whole(self, sent if "usage" not in said else said)
    )
    fake.faults = []
    *_, failed = answer(engine, GenerateCall(id="a", text="x"))["a"]
    assert isinstance(failed, ReplyFailed) and failed.kind == "UnavailableError"


def test_a_cancelled_reply_ends_and_leaves_the_server(engine: RemoteEngine, fake: Fake) -> None:
    fake.hold = threading.Event()
    fake.replies["tiny"] = ["a"] + ["b" * 70_000] * 40
    engine.submit(GenerateCall(id="a", text="x"))
    told: list[Event] = []
    while not told:
        told += engine.step()
    engine.cancel("a")
    engine.cancel("nobody")
    told += engine.step()
    fake.hold.set()
    assert (
        [type(event) for event in told] == [TextDelta, ReplyDone]
        and isinstance(told[1], ReplyDone)
        and told[1].finish == "cancelled"
    )
    assert not engine.busy


def test_full_queue_refuses_and_a_waiting_call_can_be_cancelled(engine: RemoteEngine) -> None:
    for number in range(3):
        engine.submit(GenerateCall(id=f"c{number}", text="x"))
    with pytest.raises(BusyError, match="at most 3"):
        engine.submit(GenerateCall(id="d", text="x"))
    engine.cancel("c1")
    ended = {
        event.call: event
        for _ in iter(lambda: engine.busy, False)
        for event in engine.step()
        if not isinstance(event, TextDelta)
    }
    assert {name: event.finish for name, event in ended.items() if isinstance(event, ReplyDone)} == {
        "c0": "stop",
        "c1": "cancelled",
        "c2": "stop",
    }


def test_a_schema_is_sent_and_its_reply_checked(engine: RemoteEngine, fake: Fake) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    call = GenerateCall(id="a", text="x", schema=json.dumps(schema))
    fake.replies["tiny"] = ['{\n\n  "n"', ": 4", "}"]
    assert json.loads(text_of(answer(engine, call)["a"])) == {"n": 4}
    assert fake.of("/v1/completions")[0]["response_format"]["json_schema"]["schema"] == schema
    fake.replies["tiny"] = ['{"n"', ": true}"]
    *_, failed = answer(engine, call)["a"]
    assert isinstance(failed, ReplyFailed) and "left its schema" in failed.problem


def test_tools_are_called(engine: RemoteEngine, fake: Fake) -> None:
    find = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
    fake.replies["tiny"] = ["I look.", "<tool_", 'call>{"name": "find", ', '"arguments": {}}</tool_call>']
    events = answer(engine, GenerateCall(id="a", messages=ASKED, tools=(find,)))["a"]
    done = events[-1]
    assert (
        text_of(events) == "I look."
        and isinstance(done, ReplyDone)
        and done.tool_calls[0]["function"]["name"] == "find"
    )


@pytest.mark.parametrize(
    "said",
    [
        {"tokens": ["the"], "token_logprobs": [-0.5], "top_logprobs": [{"the": -0.5, "a": -1.0}], "text_offset": [0]},
        {
            "content": [
                {
                    "token": "the",
                    "logprob": -0.5,
                    "top_logprobs": [{"token": "the", "logprob": -0.5}, {"token": "a", "logprob": -1}],
                }
            ]
        },
    ],
)
def test_logprobs_of_both_forms(engine: RemoteEngine, fake: Fake, said: Any) -> None:
    fake.replies["tiny"], fake.extra = ["the"], {"0": {"logprobs": said}, "finish": "length"}
    piece, done = answer(engine, GenerateCall(id="a", text="x", top_logprobs=2))["a"]
    assert isinstance(piece, TextDelta) and isinstance(done, ReplyDone) and done.finish == "length"
    (logprob,) = piece.logprobs
    assert (logprob.token, logprob.logprob, logprob.top) == ("the", -0.5, (("the", -0.5), ("a", -1.0)))


def test_the_key_is_sent_and_never_said(fake: Fake, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = "secret-7"
    with pytest.raises(ConfigError, match="TINY_KEY"):
        open_engine(str(tiny_base), url=fake.url, key_env="TINY_KEY")
    with pytest.raises((UnavailableError, ModelError)):
        open_engine(str(tiny_base), url=fake.url)
    monkeypatch.setenv("TINY_KEY", "secret-7")
    engine = open_engine(str(tiny_base), url=fake.url, key_env="TINY_KEY")
    assert text_of(
        answer(engine, GenerateCall(id="a", text="x"))["a"]
    ) == "the sky is blue" and "secret-7" not in repr(engine.about)
    engine.close()


def test_a_server_whose_ids_mean_something_else_is_refused(tiny_base: Path) -> None:
    with serving(Fake(reads_ids="Qwertz")) as fake, pytest.raises(ModelError, match="Qwertz"):
        open_engine(str(tiny_base), url=fake.url)


@pytest.mark.parametrize(
    ("url", "error"),
    [("ftp://a/v1", ConfigError), ("http://127.0.0.1:9/v1", UnavailableError), ("http://[bad", UnavailableError)],
)
def test_an_address_that_is_none_is_refused(tiny_base: Path, url: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        open_engine(str(tiny_base), url=url)


def test_embeddings_have_unit_length_or_are_refused(engine: RemoteEngine, fake: Fake) -> None:
    with pytest.raises(UnavailableError, match="embeddings"):
        list(engine.embed(["a"]))
    fake.extra["vectors"] = [{"index": 1, "embedding": [0, 2]}, {"index": 0, "embedding": [3, 4]}]
    assert [vector.values for vector in engine.embed(["a", "b"]) if vector] == [[0.6, 0.8], [0, 1]]


def test_a_prompt_that_leaves_no_room_is_refused(engine: RemoteEngine) -> None:
    with pytest.raises(RequestError, match="400"):
        engine.submit(GenerateCall(id="a", text="x y " * 300))
