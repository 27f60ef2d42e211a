"""The wire: frames cut anywhere, lines that are none, errors that arrive whole; and the worker's loop at its other end."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scripted
from sartor.core import ipc
from sartor.core.errors import BusyError, ModelError, SartorError
from sartor.core.ipc import Channel, Frames, MalformedFrame, frame
from sartor.inference.engine import GenerateCall, Sampling
from sartor.media import audio
from sartor.serving.team_config import MediaLimits
from sartor.serving.workers import worker_main, worker_process
from sartor.serving.workers.supervisor import Supervisor

JSON = st.recursive(
    st.none() | st.integers() | st.text() | st.booleans(), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), max_size=4), st.integers(1, 9))
def test_frames_arrive_however_they_are_cut(said: list[dict[str, Any]], cut: int) -> None:
    whole = b"".join(frame(item) for item in said)
    frames = Frames()
    assert [item for at in range(0, len(whole), cut) for item in frames.feed(whole[at : at + cut])] == said


def test_half_a_surrogate_travels() -> None:
    """A client's JSON may hold one; a worker must neither die of it nor get another text."""
    assert list(Frames().feed(frame({"text": "a\ud800b"}))) == [{"text": "a\ud800b"}]


@pytest.mark.parametrize("line", [b"{", b"[1]", b"12", b"\xff\xfe", b"", b"[" * 100_000, b'{"a":' * 100_000])
def test_a_line_that_is_no_frame_is_named_and_passed(line: bytes) -> None:
    first, second = Frames().feed(line + b'\n{"a":1}\n')
    assert isinstance(first, MalformedFrame) and second == {"a": 1}


def test_a_line_without_an_end_is_not_held() -> None:
    frames = Frames(most_bytes=100)
    found = [item for _ in range(50) for item in frames.feed(b"x" * 60)]
    assert len(found) == 1 and isinstance(found[0], MalformedFrame) and len(frames._rest) <= 160
    assert list(frames.feed(b'y\n{"a":1}\n')) == [{"a": 1}]
    assert [type(item) for item in frames.feed(b"z" * 101 + b"\n")] == [MalformedFrame]


@pytest.mark.parametrize("error", [ModelError("p", "r"), BusyError("p", "r"), SartorError("p", "r")])
def test_errors_arrive_whole(error: SartorError) -> None:
    there = ipc.error_from_json(json.loads(json.dumps(ipc.error_as_json(error))))
    assert (type(there), there.problem, there.remedy) == (type(error), "p", "r")


@pytest.mark.parametrize("kind", ["", "Foreign", "need", "Any"])
def test_an_unknown_error_is_plain(kind: str) -> None:
    assert type(ipc.error_of(kind, "p", "r")) is SartorError
    assert type(ipc.error_of(kind, "p", "r", ModelError)) is ModelError


class Parent:
    """The supervisor's end of a worker that runs in a thread."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.frames = Frames()
        self.kept: list[Any] = []

    def say(self, *said: dict[str, Any]) -> None:
        self.end.sendall(b"".join(frame(item) for item in said))

    def until(self, key: str, value: Any = None) -> list[Any]:
        """All frames up to the first that has `key`."""
        found: list[Any] = []
        while True:
            for at, said in enumerate(self.kept):
                found.append(said)
                if key in said and value in (None, said[key]):
                    del self.kept[: at + 1]
                    return found
            self.kept = list(self.frames.feed(self.end.recv(1 << 16)))


def unchecked(path: Path, adapter: str) -> None:
    """A scripted engine's adapters are files of words, with no digest."""


@pytest.fixture
def parent() -> Iterator[Parent]:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    thread = threading.Thread(target=worker_main.run, args=(scripted.Scripted(), Channel(theirs), unchecked))
    thread.start()
    yield Parent(ours)
    ours.close()
    thread.join(60)
    theirs.close()
    assert not thread.is_alive(), "the end of the connection ends the worker"


def call(prompt: str, tokens: int = 3, name: str = "c") -> dict[str, Any]:
    return {"op": "call", "call": GenerateCall(name, text=prompt, sampling=Sampling(max_tokens=tokens)).as_json()}


def test_a_worker_answers_calls_and_asks(parent: Parent) -> None:
    parent.say(call("hello"), {"op": "ping", "ask": 1}, {"op": "embed", "texts": ["ab"], "encoder": "base", "ask": 2})
    said = parent.until("event", "done")
    text = "".join(item["text"] for item in said if item.get("event") == "piece")
    assert text == scripted.reply_of(GenerateCall("c", text="hello", sampling=Sampling(max_tokens=3)))
    assert {"answer": 1} in said and {"answer": 2, "vectors": [[1.0, 2.0]], "tokens": 2, "cut": []} in said
    assert any(item.get("op") == "alive" and item["memory_bytes"] > 0 for item in said)


def test_replies_go_on_while_texts_are_embedded(parent: Parent) -> None:
    """And a few texts do not wait for many."""
    many = {"op": "embed", "texts": ["SLOW" * 200] * 4, "encoder": "base", "ask": 1}
    parent.say(many, call("hello", tokens=20), {"op": "embed", "texts": ["ab"], "encoder": "base", "ask": 2})
    said = parent.until("event", "done")
    assert {"answer": 2, "vectors": [[1.0, 2.0]], "tokens": 2, "cut": []} in said
    assert not any(item.get("answer") == 1 for item in said)
    assert parent.until("answer", 1)[-1]["tokens"] == 4 * 800


def test_nothing_that_is_said_kills_a_worker(parent: Parent) -> None:
    """Frames without fields, of wrong types, of unknown ops; calls that the engine refuses or trips over; files that are not there."""
    parent.end.sendall(b"no json\n[]\n{}\n")
    parent.say(
        {"op": "call"},
        {"op": "call", "call": 3},
        {"op": "call", "call": {"id": "x"}},
        {"op": "cancel"},
        {"op": []},
        {"op": "attach", "ask": "one"},
        {"op": "cancel", "call": "unknown"},
        {"op": "detach", "adapter": "unknown", "ask": 7},
        {"op": "attach", "adapter": "a", "path": "/nowhere", "ask": 8},
        {"op": "attach", "ask": 9},
        {"op": "embed", "texts": ["a"], "encoder": "no such encoder", "ask": 10},
        call("REFUSED", name="refused"),
        call("BUG", name="bug"),
        call("hello"),
    )
    said = parent.until("event", "done")
    failed = {item["call"]: item["kind"] for item in said if item.get("event") == "failed"}
    assert failed == {"x": "SartorError", "refused": "InputError", "bug": "SartorError"}
    assert sum(item.get("op") == "malformed" for item in said) == 8
    parent.say({"op": "ping", "ask": 11})
    kinds = {
        item["answer"]: item.get("error", {}).get("kind")
        for item in [*said, *parent.until("answer", 11)]
        if "answer" in item
    }
    assert kinds == {7: None, 8: "ModelError", 9: "ModelError", 10: "ConfigError", 11: None}


def test_a_cancelled_call_ends(parent: Parent) -> None:
    parent.say(call("hello", tokens=100_000))
    parent.until("event", "piece")
    parent.say({"op": "cancel", "call": "c"})
    assert parent.until("event", "done")[-1]["finish"] == "cancelled"


def test_a_parent_that_does_not_read_stops_the_engine(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unsent is bounded, and nothing is lost."""
    monkeypatch.setattr(ipc, "MOST_UNREAD_BYTES", 10_000)
    sizes: list[int] = []
    told = Channel.send
    monkeypatch.setattr(Channel, "send", lambda self, said: (told(self, said), sizes.append(len(self._unsent))))
    tokens = 6_000
    parent.say(call("hello", tokens=tokens))
    while max(sizes, default=0) < 10_000:
        time.sleep(0.001)
    done = parent.until("event", "done")
    assert sum(item.get("event") == "piece" for item in done) == tokens
    assert max(sizes) < 11_000


def test_an_engine_whose_step_fails_ends_the_worker() -> None:
    ours, theirs = socket.socketpair()
    engine = scripted.Scripted()
    engine.step = lambda: 1 / 0  # type: ignore[method-assign]
    with ours, theirs:
        ours.sendall(frame(call("hello")))
        with pytest.raises(ZeroDivisionError):
            worker_main.run(engine, Channel(theirs), unchecked)


def test_worker_environment_limits_openmp_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's GOMP_SPINCOUNT, KMP_BLOCKTIME or OMP_WAIT_POLICY takes precedence."""
    for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert worker_process.environment()["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert (worker_process.environment()["GOMP_SPINCOUNT"], worker_process.environment()["KMP_BLOCKTIME"]) == (
        "7",
        "1",
    )
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert "GOMP_SPINCOUNT" not in worker_process.environment()


def test_open_frame_limits_the_recordings_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(audio._longest, "seconds", audio.MOST_SECONDS)
    for name in ("end_with_parent", "die_first"):  # of a process of its own
        monkeypatch.setattr(worker_main.resource_limits, name, lambda: None)
    opening = Supervisor(scripted.team(media=MediaLimits(seconds=7.0)), scripted.COMMAND).opening()
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    thread = threading.Thread(target=worker_main.serve, args=(theirs, lambda said: scripted.Scripted(), unchecked))
    with ours, theirs:
        thread.start()
        Parent(ours).say({"op": "open", **opening})
        Parent(ours).until("op", "ready")
        ours.close()
        thread.join(60)
    assert audio._longest["seconds"] == 7.0
