"""Media in the serving engine: what an adapter sees is what the model itself sees, beside rows that see nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from sartor.core.errors import ModelError, RequestError
from sartor.inference.engine import Event, GenerateCall, ReplyDone, ReplyFailed, Sampling, TextDelta
from sartor.inference.generate import generate
from sartor.inference.local.local_engine import LocalEngine
from sartor.models import adapters, composed_model
from sartor.models.base import open_base
from seeing import Fake, picture, said

CPU = torch.device("cpu")
LIMIT = Sampling(8)


class Slow(Fake):
    """A tower that looks for as long as it is told."""

    gate = threading.Event()

    def features(self, content: bytes) -> torch.Tensor:
        assert self.gate.wait(120)
        return super().features(content)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters that see, with unlike projectors, and one that reads text."""
    root = tmp_path_factory.mktemp("made")
    tiny.write_base(root / "base")
    for place, name in enumerate(("one", "two", "text")):
        base = open_base(str(root / "base"), bits=32, device=CPU)
        if name != "text":
            base = composed_model.compose_base(base, {"image": Fake(), "audio": Fake("audio", stack=4)}, seed=place)
        model = adapters.inject_lora(base.model, rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=place)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.3)
        (root / name).mkdir()
        adapters.write_adapter(model, root / name, "tiny")
    return root


@pytest.fixture
def tower(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Fake]]:
    def opened(name: str, kind: str, *_: Any, **__: Any) -> Fake:
        return Slow("image") if kind == "image" else Fake("audio", stack=4)

    monkeypatch.setattr(composed_model, "open_tower", opened)
    Slow.gate.set()
    yield Slow
    Slow.gate.set()


def engine_of(made: Path, *names: str, **options: Any) -> LocalEngine:
    engine = LocalEngine(open_base(str(made / "base"), bits=32, device=CPU), **options)
    for name in names:
        assert engine.attach(name, made / name) > 0
    return engine


def call(id: str, adapter: str, *parts: Any) -> GenerateCall:
    content = [part.plain() if not isinstance(part, str) else {"type": "text", "text": part} for part in parts]
    return GenerateCall(id, adapter, ({"role": "user", "content": content},), sampling=LIMIT)


def alone(made: Path, name: str, *parts: Any) -> str:
    """What the model itself says."""
    base = open_base(str(made / "base"), bits=32, device=CPU)
    if composed_model.read_towers(made / name):
        base = composed_model.compose_base(base, {"image": Fake(), "audio": Fake("audio", stack=4)})
    model = adapters.open_adapter(base.model, made / name)
    prompt = base.chat.prompt_ids(said(*parts).prompt)
    found = generate(model, [prompt], stop=base.chat.stops, pad=base.chat.pad, sampling=LIMIT)[0]
    return base.chat.decode(found.ids)


def run(engine: LocalEngine, *calls: GenerateCall) -> dict[str, str]:
    for one in calls:
        engine.submit(one)
    return collect(engine)


def collect(engine: LocalEngine) -> dict[str, str]:
    texts: dict[str, str] = {}
    while engine.busy:
        for event in engine.step():
            assert not isinstance(event, ReplyFailed), event
            if isinstance(event, TextDelta):
                texts[event.call] = texts.get(event.call, "") + event.text
    return texts


def test_mixed_media_and_text_rows_reply_as_alone(made: Path, tower: type[Fake]) -> None:
    """Rows differ in adapter, projector and media."""
    asked: dict[str, tuple[str, tuple[Any, ...]]] = {
        "a": ("one", (picture(9), "what colour is the sky")),
        "b": ("two", (picture(9), "what colour is the sky")),
        "c": ("text", ("what colour is the sky",)),
        "d": ("one", ("turn", picture(70, "long", "audio"), "on", picture(5, "z"))),
        "e": ("one", (picture(8, "other"), "what colour is the sky")),
        "f": ("two", ("no picture",)),
    }
    engine = engine_of(made, "one", "two", "text", rows=4)
    found = run(engine, *(call(id, name, *parts) for id, (name, parts) in asked.items()))
    wanted = {id: alone(made, name, *parts) for id, (name, parts) in asked.items()}
    assert found == wanted
    assert len({wanted["a"], wanted["b"], wanted["e"]}) == 3  # projectors and pictures matter


def test_the_same_picture_is_read_from_the_cache(made: Path, tower: type[Fake]) -> None:
    engine = engine_of(made, "one")
    parts = (picture(100), "what colour is the sky")
    first = run(engine, call("a", "one", *parts))["a"]
    engine.submit(call("b", "one", *parts))
    done = [event for _ in iter(lambda: engine.busy, False) for event in engine.step()]
    assert "".join(event.text for event in done if isinstance(event, TextDelta)) == first
    assert [event.cached_tokens for event in done if isinstance(event, ReplyDone)] == [64]
    media = engine._media_adapters._media["one"].features
    assert [part.media for part, *_ in media._origins.values()] == [""], "the bytes of a request stay in memory"
    other = run(engine, call("c", "one", picture(100, "other"), "what colour is the sky"))["c"]
    assert other == alone(made, "one", picture(100, "other"), "what colour is the sky")


def test_others_go_on_while_a_tower_looks(made: Path, tower: type[Fake]) -> None:
    engine = engine_of(made, "one", "text")
    tower.gate.clear()  # type: ignore[attr-defined]
    engine.submit(call("slow", "one", picture(9), "what"))
    engine.submit(call("fast", "text", "what colour is the sky"))
    events: list[Event] = []
    while not any(isinstance(event, ReplyDone) and event.call == "fast" for event in events):
        events += engine.step()
    assert {event.call for event in events} == {"fast"} and engine.busy
    tower.gate.set()  # type: ignore[attr-defined]
    assert collect(engine)["slow"] == alone(made, "one", picture(9), "what")


def test_cancel_and_detach_work_while_a_tower_encodes(made: Path, tower: type[Fake]) -> None:
    """The cancelled call ends, that of the detached adapter fails, and an id in use is refused."""
    engine = engine_of(made, "one", "two")
    tower.gate.clear()  # type: ignore[attr-defined]
    engine.submit(call("a", "one", picture(9)))
    engine.submit(call("b", "two", picture(9)))
    with pytest.raises(RequestError, match="own id"):
        engine.submit(call("b", "two", picture(9)))
    engine.cancel("a")
    engine.detach("two")
    tower.gate.set()  # type: ignore[attr-defined]
    events = [event for _ in iter(lambda: engine.busy, False) for event in engine.step()]
    assert [(event.call, type(event)) for event in events] == [("a", ReplyDone), ("b", ReplyFailed)]
    assert "detached" in events[1].problem  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("adapter", "part", "problem"),
    [
        ("text", picture(9), "reads text alone"),
        ("", picture(9), "reads text alone"),
        ("one", {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "nothing is fetched"),
        ("one", {"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}, "not base64"),
        ("one", {"type": "video", "video": "x"}, "part of type 'video'"),
        ("one", {"type": "input_audio", "input_audio": {"data": "AA", "format": 3}}, "not base64"),
    ],
)
def test_media_that_cannot_be_read_fail_alone(
    made: Path, tower: type[Fake], adapter: str, part: Any, problem: str
) -> None:
    engine = engine_of(made, "one", "text")
    plain = part if isinstance(part, dict) else part.plain()
    asked = GenerateCall("bad", adapter, ({"role": "user", "content": [plain]},), sampling=LIMIT)
    failed: list[str] = []
    engine.submit(call("good", "text", "what"))
    try:
        engine.submit(asked)
    except RequestError as error:
        failed.append(error.problem)
    while engine.busy:
        failed += [event.problem for event in engine.step() if isinstance(event, ReplyFailed)]
    assert len(failed) == 1 and problem in failed[0]


@pytest.mark.parametrize(("raised", "kind"), [(MemoryError(), "BudgetError"), (RuntimeError("a"), "RequestError")])
def test_a_tower_that_breaks_fails_its_call_alone(
    made: Path, tower: type[Fake], monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: str
) -> None:
    def broken(self: Fake, content: bytes) -> torch.Tensor:
        raise raised

    engine = engine_of(made, "one", "text")
    monkeypatch.setattr(tower, "features", broken)
    engine.submit(call("bad", "one", picture(9)))
    engine.submit(call("good", "text", "what"))
    events = [event for _ in iter(lambda: engine.busy, False) for event in engine.step()]
    assert [(event.call, event.kind) for event in events if isinstance(event, ReplyFailed)] == [("bad", kind)]
    assert any(isinstance(event, ReplyDone) and event.call == "good" for event in events)


def test_an_adapter_of_another_tower_is_not_attached(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed_model, "open_tower", lambda name, kind, *_, **__: Fake(kind, version=2))
    with pytest.raises(ModelError, match="is another"):
        engine_of(made, "one")
