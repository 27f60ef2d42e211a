"""What admission needs: a maker of Releases, the ground to admit on, and a probation process that says what it is told to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from bad_adapters import Maker

from sartor.inference.engine import BASE, EngineInfo, Event, GenerateCall, ReplyDone, TextDelta
from sartor.serving.admission.admission import AdmissionContext
from sartor.serving.workers.worker_main import check_digest

Says = Callable[[GenerateCall], Sequence[Event]]


@pytest.fixture(scope="session")
def maker(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker.on(tiny_base, tmp_path_factory.mktemp("corpus") / "keys")


@pytest.fixture
def ground(maker: Maker, tmp_path: Path) -> AdmissionContext:
    about = EngineInfo("local", "tiny", maker.facts["digest"], maker.facts["template_digest"], 512, 4)
    return AdmissionContext(about, maker.base, tmp_path / "state", maker.public)


def saying(text: str) -> Says:
    return lambda call: [TextDelta(call.id, text, 1), ReplyDone(call.id, "stop", 3, 5)]


class Fake:
    """A probation process that says what it is told to. path: where it found the adapter."""

    def __init__(self, says: Says = saying("It is blue."), of_base: Says = saying("Hello there.")) -> None:
        self.says, self.of_base = says, of_base
        self.calls: list[GenerateCall] = []

    def __call__(self, adapter: str, path: Path, calls: Sequence[GenerateCall]) -> list[Sequence[Event]]:
        check_digest(path, adapter)
        self.path = path
        self.calls += calls
        return [(self.of_base if call.adapter == BASE else self.says)(call) for call in calls]
