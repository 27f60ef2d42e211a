"""A version without weights whose answers are those of the test, and prompts to check it by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sartor.core.artifacts import write_artifact
from sartor.core.resource_limits import ResourceLimits, ResourceUsage
from sartor.edge.runtime import device_runtime
from sartor.inference.engine import Event, GenerateCall, ReplyDone, ReplyFailed, TextDelta

CANARIES = [
    {"messages": [{"role": "user", "content": "turn on the light"}], "reply": '{"intent":"HassTurnOn"}'},
    {"messages": [{"role": "user", "content": "what colour is the sky"}], "reply": "the sky is blue"},
]


def version(folder: Path, **facts: Any) -> Path:
    """A Release without weights: what answers is a function of the test."""
    facts = {"name": "home", "version": "1.0", "system_prompt": "Be brief.", **facts}
    return write_artifact(folder / "release", "release", lambda part: facts).path


def lines(folder: Path, *rows: object) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return file


class Fake:
    """Answers by prompt, in place of the process."""

    def __init__(self, answers: dict[str, str | ReplyFailed]) -> None:
        self.answers, self.asked = answers, list[GenerateCall]()

    def __call__(self, release: Path, calls: Sequence[GenerateCall], limits: ResourceLimits, base: str) -> Any:
        self.asked += calls
        return [self.events(call) for call in calls], ResourceUsage("nothing", 0, 123, 0.1, 0.1, 0, "")

    def events(self, call: GenerateCall) -> list[Event]:
        said = self.answers[str(call.messages[-1]["content"])]
        return (
            [said]
            if isinstance(said, ReplyFailed | ReplyDone)
            else [TextDelta(call.id, said, 3), ReplyDone(call.id, "stop", 5, 3)]
        )


GOOD: dict[str, str | ReplyFailed] = {
    "turn on the light": '{"intent":"HassTurnOn"}',
    "what colour is the sky": "the sky is blue",
    "hello": " Hello! ",
    "where": "in the hall, by the door",
    "off": '{"intent": "HassTurnOff", "slots": {"area": "kitchen", "level": 3}}',
}

ROWS: list[dict[str, Any]] = [
    {"prompt": "hello", "expected": {"exact": "Hello!"}},
    {"prompt": "where", "expected": {"contains": "by the door"}},
    {
        "messages": [{"role": "user", "content": "off"}],
        "expected": {"json": {"intent": "HassTurnOff", "slots.area": "kitchen", "slots.level": 3}},
    },
]


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(**changes: str | ReplyFailed) -> Fake:
        fake = Fake({**GOOD, **{key.replace("_", " "): value for key, value in changes.items()}})
        monkeypatch.setattr(device_runtime, "ask_in_process", fake)
        return fake

    return use
