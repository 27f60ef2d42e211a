"""A teacher by HTTP: what fails is asked again, what was answered never, the key is seen by nobody else."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import sartor
from endpoint_server import FAULTS, EndpointServer, serving
from sample_data import write_jsonl
from sartor.core.errors import BudgetError, BusyError, ConfigError, KeyRefusedError, UnavailableError
from sartor.core.records import Example
from sartor.inference.endpoint_client import Access, IncompleteResponseError, Patience, RequestThrottle, retry_after
from sartor.synthesize.openai_teacher import EndpointTeacher, read_body
from sartor.synthesize.teacher import TeacherQuestion

SEEDS = [
    {
        "messages": [
            {"role": "user", "content": f"what does parcel number {n} to {town} cost today"},
            {"role": "assistant", "content": f"{n} euros"},
        ]
    }
    for n in range(3)
    for town in ("Berlin", "Rome")
]


def recipe(folder: Path, url: str, **teacher: Any) -> dict[str, Any]:
    if not (folder / "seeds.jsonl").exists():
        write_jsonl(folder / "seeds.jsonl", SEEDS)
    settings = {"kind": "endpoint", "url": url, "model": "m", "pause_s": 0.01, "timeout_s": 0.3, "tries": 8, **teacher}
    ways = [{"vary": {"per_row": 2}}, {"extend": {}}, {"preference": {}}]
    return {"sources": [{"path": str(folder / "seeds.jsonl"), "licence": "MIT"}], "teacher": settings, "ways": ways}


def rows_of(made: Any) -> list[Example]:
    """The rows without who was asked: two servers have two addresses."""
    return list(made.examples())


def content(made: Any) -> list[Any]:
    return [(row.id, row.group, row.split, row.origins[0].parents, row.origins[0].locator) for row in made.examples()]


def test_the_rows_are_the_same_with_every_fault_injected(tmp_path: Path) -> None:
    with serving(EndpointServer()) as calm:
        without = sartor.synthesize(recipe(tmp_path, calm.url, timeout_s=5.0), tmp_path / "calm")

    def fault(body: str, times: int) -> str:
        place = int(hashlib.sha256(body.encode()).hexdigest()[:8], 16)
        return FAULTS[(place + times) % len(FAULTS)] if times <= 2 else ""

    with serving(EndpointServer(fault)) as broken:
        told: list[str] = []
        broken.silent_s = 7.0
        made = sartor.synthesize(
            recipe(tmp_path, broken.url, at_once=8, timeout_s=5.0), tmp_path / "broken", notice=told.append
        )
    assert content(made) == content(without)
    assert made.dropped == without.dropped
    assert set(FAULTS) <= set(broken.faults), "every fault was injected"
    assert set(broken.answered.values()) == {1}
    assert set(broken.asked.values()) == {3}
    assert made.as_json()["calls"] == without.as_json()["calls"] == len(SEEDS) * 4
    assert any("try 1 of 8" in line for line in told)


@pytest.mark.services
def test_a_killed_run_goes_on_and_pays_for_nothing_twice(tmp_path: Path) -> None:
    with serving(EndpointServer()) as server:
        server.answer_limit = (
            7  # all that was answered is on disk when the run dies, and three questions are under way
        )
        said = recipe(tmp_path, server.url, at_once=3, timeout_s=60)
        file = tmp_path / "r.yaml"
        file.write_text(json.dumps(said))
        command = [sys.executable, "-m", "sartor", "synthesize", str(file), "--out", str(tmp_path / "out"), "--json"]
        environment = {**os.environ, "PYTHONPATH": str(Path(sartor.__file__).parent.parent)}
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        answers = tmp_path / "out.synthesizing" / "answers"
        _wait(
            lambda: len(server.answered) == len(list(answers.glob("*/*.json"))) == 7 and server.asked.total() == 7 + 3,
            child,
        )
        child.send_signal(signal.SIGKILL)
        child.communicate()
        before = set(server.answered)
        under_way = set(server.asked) - before
        assert len(before) == 7 < len(SEEDS) * 4 and not (tmp_path / "out").exists()
        server.answer_limit = None
        server.release.set()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        out = json.loads(done.stdout.splitlines()[-1])
        assert out["cached"] == len(before) and out["calls"] == len(SEEDS) * 4 - len(before)
        assert {body for body, times in server.asked.items() if times > 1} <= under_way
        assert all(server.asked[body] == 1 for body in before)
        assert not (tmp_path / "out.synthesizing").exists()
        whole = sartor.synthesize(said, tmp_path / "whole")
        assert rows_of(whole) == list(sartor.read_examples(sartor.open(tmp_path / "out", "dataset")))
        assert whole.dataset.manifest["digest"] == out["digest"]
        again = sartor.synthesize(said, tmp_path / "whole", resume=True)
        assert again.found and again.as_json()["calls"] == 0


def _wait(until: Any, child: Any) -> None:
    end = time.monotonic() + 600
    while not until():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_cache_of_ones_own_serves_later_runs(tmp_path: Path) -> None:
    with serving(EndpointServer()) as server:
        said = {**recipe(tmp_path, server.url), "cache": str(tmp_path / "cache")}
        first = sartor.synthesize(said, tmp_path / "a")
        second = sartor.synthesize(said, tmp_path / "a", replace=True)
        damaged = next((tmp_path / "cache").glob("*/*.json"))
        damaged.write_text("{")
        third = sartor.synthesize(said, tmp_path / "a", replace=True)
    calls = len(SEEDS) * 4
    spent = [(one.as_json()["calls"], one.as_json()["cached"]) for one in (first, second, third)]
    assert spent == [(calls, 0), (0, calls), (1, calls - 1)]
    assert rows_of(first) == rows_of(second) == rows_of(third)
    assert oct((tmp_path / "cache").stat().st_mode)[-3:] == "700" and oct(damaged.stat().st_mode)[-3:] == "600"


@pytest.mark.parametrize("at_once", [1, 4])
def test_what_it_cost_is_said_and_a_limit_stops_it(tmp_path: Path, at_once: int) -> None:
    with serving(EndpointServer()) as server:
        price = {"input": 1.0, "output": 10.0}
        said = sartor.synthesize(recipe(tmp_path, server.url, price=price), tmp_path / "a").as_json()
        calls = len(SEEDS) * 4
        assert said["tokens"] == {"input": 100 * calls, "output": 10 * calls, "estimated_calls": 0}
        assert said["cost"] == pytest.approx(calls * 200 / 1e6)
        limited = recipe(tmp_path, server.url, at_once=at_once, price={**price, "most": 0.001})
        with pytest.raises(BudgetError, match=r"0\.0010 is spent, and price\.most is 0\.001"):
            sartor.synthesize(limited, tmp_path / "b")
        more = recipe(tmp_path, server.url, at_once=1, price={**price, "most": 1.0})
        assert sartor.synthesize(more, tmp_path / "b").as_json()["cached"] == 5


def test_the_key_is_in_the_environment_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-a-secret-of-somebody"
    with serving(EndpointServer()) as server:
        said = recipe(tmp_path, server.url, key_env="MY_KEY")
        with pytest.raises(KeyRefusedError, match="MY_KEY of teacher.key_env holds no key"):
            sartor.synthesize(said, tmp_path / "a")
        monkeypatch.setenv("MY_KEY", key)
        sartor.synthesize({**said, "cache": str(tmp_path / "cache")}, tmp_path / "a")
        assert {one["Authorization"] for one in server.headers} == {f"Bearer {key}"}
        for code, kind in (
            ("401", KeyRefusedError),
            ("400", ConfigError),
            ("302", ConfigError),
            ("503", BusyError),
            ("520", UnavailableError),
        ):
            server.fault = lambda body, times, code=code: code
            told: list[str] = []
            with pytest.raises(kind) as error:
                sartor.synthesize(
                    {**said, "teacher": {**said["teacher"], "tries": 2}}, tmp_path / "b", notice=told.append
                )
            assert key not in "".join([str(error.value), *told]) and (code == "302" or "***" in str(error.value))
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or key.encode() not in file.read_bytes(), file
    assert key not in repr(Access("http://127.0.0.1/v1", "m", key))


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("422", ""),
        ("413", ""),
        ("400", "context_length_exceeded"),
        ("400", "This model's maximum context length is 2048 tokens."),
        ("400", "exceed_context_size_error"),
        ("400", "The input (50 tokens) is longer than the model's context length (9 tokens)."),
        ("400", "content_filter"),
    ],
)
def test_a_refusal_of_one_question_alone_stops_nothing(tmp_path: Path, code: str, word: str) -> None:
    with serving(EndpointServer(lambda body, times: code)) as server:
        server.word = word
        told: list[str] = []
        teacher = EndpointTeacher(Access(server.url, "m"), RequestThrottle(), Patience(), 1, notice=told.append)
        answers = [teacher.answer(TeacherQuestion((("user", text),))) for text in "ab"]
    assert [answer.finish for answer in answers] == ["refused", "refused"] and server.asked.total() == 2
    (line,) = told  # the first alone
    assert "refuses a question" in line and f"says {code}" in line and word in line


def test_refused_question_is_dropped_and_lost_endpoint_stops(tmp_path: Path) -> None:
    """The error says that the same command continues the run."""
    with serving(EndpointServer(lambda body, times: "422" if "number 0" in body else "")) as server:
        made = sartor.synthesize(recipe(tmp_path, server.url), tmp_path / "a")
        assert made.dropped["teacher_refused"] == 8
        url = server.url
    with pytest.raises(UnavailableError, match="failed 2 times.*\n.*the same command goes on"):
        sartor.synthesize(recipe(tmp_path, url, tries=2), tmp_path / "b")


@pytest.mark.parametrize("url", ["ftp://x/v1", "http:///v1", "https://me:pw@host/v1"])
def test_an_address_that_cannot_be_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="teacher.url"):
        sartor.synthesize(recipe(tmp_path, url), tmp_path / "a")


def test_a_key_goes_nowhere_unencrypted() -> None:
    with pytest.raises(ConfigError, match=r"a key would go to example\.org unencrypted"):
        EndpointTeacher(Access("http://example.org/v1", "m", "k"), RequestThrottle(), Patience(), 1)


def test_pace_holds_requests_and_tokens_of_a_minute() -> None:
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    pace = RequestThrottle(requests=3, tokens=100, now=lambda: clock[0], sleep=sleep)
    went = []
    for tokens in (10, 10, 10, 10, 90, 500, 1):
        pace.wait(tokens)
        went.append(clock[0])
    # the fourth waits for the first to be a minute old; 90 beside three of 10 is over 100; 500 alone goes alone
    assert went == [0, 0, 0, 60, 60, 120, 180]
    pace.pause(7)
    pace.wait(1)
    assert clock[0] == 187


def test_retry_after_is_obeyed_by_all(tmp_path: Path) -> None:
    with serving(EndpointServer(lambda body, times: "429" if times == 1 else "")) as server:
        teacher = EndpointTeacher(Access(server.url, "m"), RequestThrottle(), Patience(3, 60.0, 60.0), 1)
        began = time.monotonic()
        teacher.answer(TeacherQuestion((("user", "a"),)))
        assert 0.05 <= time.monotonic() - began < 50, "as long as the endpoint says, not the pause of 60 s"


@pytest.mark.parametrize(
    ("value", "least", "most"), [("7", 7, 7), ("x", 0, 0), ("", 0, 0), ("-3", 0, 0), ("1e9", 600, 600)]
)
def test_retry_after_is_read(value: str, least: float, most: float) -> None:
    assert least <= retry_after(value) <= most


def test_retry_after_may_be_a_date() -> None:
    assert 0 < retry_after("Fri, 01 Jan 2100 00:00:00 GMT") <= 600
    assert retry_after("Fri, 01 Jan 2010 00:00:00 GMT") == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": "x"}}]}',
        b'{"error": "x"}',
        b"[" * 99999,
        b"x" * (9 << 20),
    ],
)
def test_a_body_that_is_no_answer_is_broken(body: bytes) -> None:
    with pytest.raises(IncompleteResponseError):
        read_body([body], "application/json")


def test_a_whole_body_is_read_too() -> None:
    body = {
        "choices": [{"message": {"content": "x"}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    }
    answer = read_body([json.dumps(body).encode()], "application/json")
    assert (answer.text, answer.finish, answer.tokens_in, answer.tokens_out) == ("x", "length", 3, 4)
