"""llama.cpp behind the Protocol, on the real starter base: the starter's GGUF file, adapters with random factors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loras import write_lora
from replies import text_of
from sartor.core.errors import BusyError, ModelError, RequestError
from sartor.inference import openai_engine
from sartor.inference.engine import Event, GenerateCall, ReplyDone, ReplyFailed, Sampling, TextDelta
from sartor.inference.llamacpp_engine import LlamaCppEngine, open_engine

pytestmark = pytest.mark.circle
pytest.importorskip("xllamacpp", reason="pip install 'sartor[llamacpp]'")
SHORT = Sampling(max_tokens=8)
ASKED = ({"role": "user", "content": "What is the capital of France?"},)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, opened: LlamaCppEngine) -> dict[str, Path]:
    config, folder = opened._reader.config, tmp_path_factory.mktemp("loras")
    return {f"d{seed}": write_lora(folder / str(seed), config, rank=4, seed=seed, size=0.6) for seed in range(3)}


@pytest.fixture(scope="module")
def opened() -> Iterator[LlamaCppEngine]:
    """One thread: llama.cpp's threads wait for each other by spinning, and other tests have the other core."""
    engine = open_engine("starter", rows=2, waiting=9, threads=1)
    yield engine
    engine.close()


@pytest.fixture
def engine(opened: LlamaCppEngine) -> Iterator[LlamaCppEngine]:
    yield opened
    assert not opened.busy
    for adapter in list(opened._adapters):
        opened.detach(adapter)


def answer(
    engine: LlamaCppEngine, *calls: GenerateCall, also: Callable[[Event], None] = lambda event: None
) -> dict[str, list[Event]]:
    for call in calls:
        engine.submit(call)
    told: dict[str, list[Event]] = {call.id: [] for call in calls}
    while engine.busy:
        for event in engine.step():
            told[event.call].append(event)
            also(event)
    return told


def test_the_base_answers(engine: LlamaCppEngine) -> None:
    told = answer(
        engine, GenerateCall(id="a", messages=ASKED, sampling=Sampling(max_tokens=40, stop=("Marse",)), top_logprobs=2)
    )["a"]
    done = told[-1]
    assert (
        isinstance(done, ReplyDone)
        and done.finish == "stop"
        and done.prompt_tokens == 37
        and 0 < done.reply_tokens < 40
    )
    pieces = [event for event in told if isinstance(event, TextDelta) and event.logprobs]
    assert "Marse" not in text_of(told) and all(
        len(item.top) == 2 and item.logprob <= 0 for piece in pieces for item in piece.logprobs
    )
    assert (engine.about.dtype, engine.about.base, engine.about.context_tokens) == ("q4_1", "starter", 4096)


def test_adapters_reply_alike_alone_and_in_a_mixed_batch(engine: LlamaCppEngine, adapters: dict[str, Path]) -> None:
    """The base replies as it did before adapters were attached."""
    before = text_of(answer(engine, GenerateCall(id="a", messages=ASKED, sampling=SHORT))["a"])
    for name, path in adapters.items():
        assert engine.attach(name, path) == engine.attach(name, path) > 1_000_000
    alone = {
        name: text_of(answer(engine, GenerateCall(id="a", messages=ASKED, sampling=SHORT, adapter=name))["a"])
        for name in ("", *adapters)
    }
    calls = [
        GenerateCall(id=f"{name}/{turn}", messages=ASKED, sampling=SHORT, adapter=name)
        for turn in range(2)
        for name in alone
    ]
    mixed = {call: text_of(events) for call, events in answer(engine, *calls).items()}
    assert mixed == {f"{name}/{turn}": text for name, text in alone.items() for turn in range(2)}
    assert alone[""] == before and len(set(alone.values())) == 4


def test_late_adapter_is_loaded_after_running_replies(engine: LlamaCppEngine, adapters: dict[str, Path]) -> None:
    """It is attached while another reply is running, and that reply ends first."""
    ended: list[str] = []

    def attach(event: Event) -> None:
        if isinstance(event, TextDelta) and event.call == "long" and "late" not in engine._adapters:
            engine.attach("late", adapters["d0"])
            engine.submit(GenerateCall(id="new", messages=ASKED, sampling=SHORT, adapter="late"))
        if isinstance(event, ReplyDone):
            ended.append(event.call)

    engine.submit(GenerateCall(id="long", messages=ASKED, sampling=SHORT))
    while engine.busy:
        for event in engine.step():
            attach(event)
    assert ended == ["long", "new"]


def test_what_does_not_fit_is_refused_before_the_server_sees_it(engine: LlamaCppEngine, tmp_path: Path) -> None:
    narrow = write_lora(tmp_path / "narrow", {**engine._reader.config, "intermediate_size": 64}, rank=2)
    with pytest.raises(ModelError, match="has the axes"):
        engine.attach("narrow", narrow)
    with pytest.raises(ModelError, match="attached"):
        engine.submit(GenerateCall(id="a", text="x", adapter="narrow"))


def test_adapter_that_the_server_rejects_fails_only_its_calls(
    engine: LlamaCppEngine, adapters: dict[str, Path]
) -> None:
    """The server does not start with a damaged file; the base still replies."""
    engine.attach("good", adapters["d0"])
    engine.attach("bad", adapters["d1"])
    engine._adapters["bad"].write_bytes(b"GGUF, and then nothing")
    told = answer(
        engine, *(GenerateCall(id=name, messages=ASKED, sampling=SHORT, adapter=name) for name in ("bad", ""))
    )
    (failed,) = told["bad"]
    assert isinstance(failed, ReplyFailed) and failed.kind == "ModelError" and text_of(told[""])


def test_a_taken_away_adapter_fails_its_calls(engine: LlamaCppEngine, adapters: dict[str, Path]) -> None:
    engine.attach("d0", adapters["d0"])

    def detach(event: Event) -> None:
        if isinstance(event, TextDelta) and event.call == "a":
            engine.detach("d0")

    long = Sampling(max_tokens=200)
    told = answer(
        engine,
        GenerateCall(id="a", messages=ASKED, sampling=long, adapter="d0"),
        GenerateCall(id="b", messages=ASKED, sampling=SHORT),
        also=detach,
    )
    assert isinstance(told["a"][-1], ReplyFailed) and isinstance(told["b"][-1], ReplyDone)


def test_cancelled_calls_end(engine: LlamaCppEngine) -> None:
    def cancel(event: Event) -> None:
        if isinstance(event, TextDelta):
            engine.cancel(event.call)

    (*_, done) = answer(engine, GenerateCall(id="a", messages=ASKED, sampling=Sampling(max_tokens=500)), also=cancel)[
        "a"
    ]
    assert isinstance(done, ReplyDone) and done.finish == "cancelled" and done.reply_tokens < 400


def test_a_schema_is_obeyed(engine: LlamaCppEngine) -> None:
    schema = json.dumps(
        {
            "type": "object",
            "properties": {"city": {"enum": ["Paris 🎉", "日本語"]}},
            "required": ["city"],
            "additionalProperties": False,
        }
    )
    told = answer(engine, GenerateCall(id="a", messages=ASKED, sampling=Sampling(max_tokens=40), schema=schema))["a"]
    assert json.loads(text_of(told))["city"] in ("Paris 🎉", "日本語")
    find = {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {"n": {"const": 3}},
                "required": ["n"],
                "additionalProperties": False,
            },
        },
    }
    done = answer(
        engine, GenerateCall(id="b", messages=ASKED, sampling=Sampling(max_tokens=60), tools=(find,), must_call="*")
    )["b"][-1]
    assert isinstance(done, ReplyDone) and [call["function"]["arguments"] for call in done.tool_calls] == ['{"n": 3}']
    with pytest.raises(RequestError, match="uniqueItems"):
        engine.submit(GenerateCall(id="c", messages=ASKED, schema='{"type":"array","uniqueItems":true}'))


def test_embeddings(engine: LlamaCppEngine) -> None:
    cat, dog, invoice = (
        vector.values
        for vector in engine.embed(["the cat sleeps", "the dog sleeps", "the invoice was paid on Tuesday"])
        if vector
    )

    def product(left: list[float], right: list[float]) -> float:
        return sum(a * b for a, b in zip(left, right, strict=True))

    assert product(cat, cat) == pytest.approx(1, abs=1e-4) and product(cat, dog) > product(cat, invoice)


def test_more_than_may_wait_is_refused(engine: LlamaCppEngine) -> None:
    for number in range(9):
        engine.submit(GenerateCall(id=str(number), text="x"))
    with pytest.raises(BusyError):
        engine.submit(GenerateCall(id="more", text="x"))
    for number in range(9):
        engine.cancel(str(number))
    assert len([event for event in engine.step() if isinstance(event, ReplyDone)]) == 9


def test_a_file_of_another_base_is_refused(tiny_base: Path, engine: LlamaCppEngine) -> None:
    with pytest.raises(ModelError, match="block_count"):
        open_engine(str(tiny_base), gguf=str(engine._base.path))
    with pytest.raises(ModelError, match="gguf"):
        open_engine("starter", gguf="/nowhere/base.gguf")


def test_the_engine_over_http_reads_llama_cpps_own_server(
    engine: LlamaCppEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = engine._inner
    assert inner is not None
    monkeypatch.setenv("INNER_KEY", inner.headers["Authorization"].removeprefix("Bearer "))
    over = openai_engine.open_engine("starter", url=inner.address + "/v1", key_env="INNER_KEY", rows=2)
    call = GenerateCall(id="a", messages=ASKED, sampling=SHORT, top_logprobs=1)
    over.submit(call)
    told = [event for _ in iter(lambda: over.busy, False) for event in over.step()]
    schema = '{"type":"object","properties":{"n":{"const":7}},"required":["n"],"additionalProperties":false}'
    over.submit(GenerateCall(id="b", messages=ASKED, sampling=Sampling(max_tokens=40), schema=schema))
    obeyed = [event for _ in iter(lambda: over.busy, False) for event in over.step()]
    over.close()
    assert json.loads(text_of(obeyed)) == {"n": 7}
    assert (
        text_of(told) == text_of(answer(engine, call)["a"])
        and isinstance(told[-1], ReplyDone)
        and told[-1].reply_tokens == 8
    )
    assert (
        over.about.device == "llamacpp"
        and sum(len(event.logprobs) for event in told if isinstance(event, TextDelta)) == 8
    )


def test_a_base_without_a_gguf_file_is_given_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny

    monkeypatch.setenv("SARTOR_HOME", str(tmp_path / "home"))
    base = tiny.write_base(tmp_path / "tiny")
    engine = open_engine(str(base), rows=1, threads=1)
    config = engine._reader.config
    engine.attach("d", write_lora(tmp_path / "lora", config, rank=2, size=3.0))
    told = answer(
        engine, *(GenerateCall(id=name or "base", text="the sky", sampling=SHORT, adapter=name) for name in ("", "d"))
    )
    engine.close()
    assert engine.about.dtype == "f16" and text_of(told["base"]) != text_of(told["d"])
    assert [file.name.rpartition("-")[2] for file in (tmp_path / "home" / "bases").glob("*.gguf")] == [
        f"{engine.about.base_digest[:12]}.f16.gguf"
    ]
