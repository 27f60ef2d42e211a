"""A crew that computes nothing: replies name the adapter that made them, and what goes wrong is set by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sartor.core import database
from sartor.core.errors import AdmissionError, ModelError, SartorError, UnavailableError
from sartor.inference.engine import EngineInfo, Event, GenerateCall, ReplyDone, ReplyFailed, TextDelta
from sartor.serving.dispatch.dispatcher import Dispatcher
from sartor.serving.registry.registry import Registry
from sartor.serving.registry.registry_schema import AgentVersion
from sartor.serving.team_config import Team
from sartor.serving.types import AgentRequest, EmbeddingResult, FinishedReply, RoutingDecision


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries of tests are not kept for a power cut. A module that imports this has it for each of its tests."""
    monkeypatch.setattr(database, "SYNCHRONOUS", "off")


class FakeEvents:
    """Three pieces and the end; `slow` lets other tasks run before each."""

    def __init__(self, crew: FakeCrew, call: GenerateCall, said: str, finish: Event) -> None:
        self._crew, self._call = crew, call
        self._events: list[Event] = [
            *(TextDelta(call.id, part, 1) for part in (said[:2], said[2:4], said[4:]) if part),
            finish,
        ]
        self.closed = False

    def __aiter__(self) -> FakeEvents:
        return self

    async def __anext__(self) -> Event:
        for _ in range(self._crew.slow):
            await asyncio.sleep(0)
        if self.closed or not self._events:
            raise StopAsyncIteration
        if self._call.adapter and self._call.adapter not in self._crew.attached:
            self._crew.lost.append(self._call.adapter)
        if len(self._events) == 1:
            self._crew.live[self._call.adapter] -= 1
        return self._events.pop(0)

    async def aclose(self) -> None:
        if not self.closed and self._events:
            self._crew.live[self._call.adapter] -= 1
            self._crew.cancelled.append(self._call.id)
        self.closed = True


class FakeCrew:
    """`faults`: adapter -> what its calls raise, or the Failed kind after the first piece. `replies`: adapter -> text."""

    def __init__(self) -> None:
        self.attached: dict[str, Path] = {}
        self.unloadable: set[str] = set()
        self.faults: dict[str, SartorError | str] = {}
        self.replies: dict[str, str] = {}
        self.calls: list[GenerateCall] = []
        self.cancelled: list[str] = []
        self.lost: list[str] = []
        self.live: dict[str, int] = {}
        self.released: list[str] = []
        self.renewals = 0
        self.breakers: dict[str, str] = {}
        self.slow = 0
        self.rows = 16

    @property
    def about(self) -> EngineInfo:
        return EngineInfo("fake", "tiny", "b" * 64, "t" * 64, 512, self.rows)

    async def attach(self, adapter: str, path: Path) -> None:
        await asyncio.sleep(0)
        if adapter in self.unloadable:
            raise ModelError(f"{adapter} does not fit", "another one")
        self.attached[adapter] = path

    async def detach(self, adapter: str) -> None:
        assert not self.live.get(adapter), f"{adapter} was detached while {self.live[adapter]} replies lived"
        await asyncio.sleep(0)
        self.attached.pop(adapter, None)

    async def reply(self, call: GenerateCall, agent: str, deadline_s: float) -> AsyncIterator[Event]:
        self.calls.append(call)
        await asyncio.sleep(0)
        if self.breakers.get(agent):
            raise UnavailableError(f"{agent} is out of service", "ask later")
        if call.adapter and call.adapter not in self.attached:
            self.lost.append(call.adapter)
            raise UnavailableError(f"{call.adapter} is not loaded", "load it")
        fault = self.faults.get(call.adapter)
        if isinstance(fault, SartorError):
            raise fault
        self.live[call.adapter] = self.live.get(call.adapter, 0) + 1
        end = ReplyFailed(call.id, fault, "broke", "mend") if fault else ReplyDone(call.id, "stop", 5, 3)
        return FakeEvents(self, call, self.replies.get(call.adapter, f"by {call.adapter or 'base'}"), end)

    async def embed(self, texts: Sequence[str], encoder: str) -> EmbeddingResult:
        return EmbeddingResult([[1.0] for _ in texts])

    async def renew(self) -> None:
        await asyncio.sleep(0)
        self.renewals += 1

    def blame(self, agent: str, reason: str) -> None:
        pass

    def release(self, agent: str) -> None:
        self.released.append(agent)
        self.breakers.pop(agent, None)

    def health(self) -> Mapping[str, Any]:
        return {"agents": {agent: {"breaker": state} for agent, state in self.breakers.items()}}


class FakeRouter:
    def __init__(self, chosen: str = "faq", error: SartorError | None = None) -> None:
        self.chosen, self.error, self.reason = chosen, error, ""
        self.learnt: list[Mapping[str, Path]] = []

    async def learn(self, releases: Mapping[str, Path]) -> None:
        self.learnt.append(dict(releases))

    async def route(self, messages: Sequence[Mapping[str, Any]], openable: Any) -> RoutingDecision:
        if self.error:
            raise self.error
        return RoutingDecision(self.chosen, self.reason or f"nearest to {self.chosen}", {self.chosen: 0.9})


class FakeReceipts:
    def __init__(self, error: Exception | None = None) -> None:
        self.kept: list[FinishedReply] = []
        self.error = error

    def write(self, given: FinishedReply) -> None:
        if self.error:
            raise self.error
        self.kept.append(given)


def version(agent: str, number: str, **facts: Any) -> AgentVersion:
    """The version that `admit` finds at `/releases/AGENT-NUMBER`."""
    return AgentVersion(
        agent, number, f"/releases/{agent}-{number}", f"id-{agent}-{number}", f"{agent}-{number}", facts
    )


async def admit(path: Path, name: str) -> AgentVersion:
    """By the path's last part; `bad-...` is refused."""
    agent, _, number = path.name.rpartition("-")
    if agent.startswith("bad") or number == "bad":
        raise AdmissionError(f"{path.name} holds NaN", "tune again", "finite")
    return version(name or agent, number)


def team(tmp_path: Path, **parts: Any) -> Team:
    return Team(base="tiny", state=str(tmp_path / "state"), **parts)


def sqlite_url(state: Path) -> str:
    return Team(base="tiny", state=str(state)).registry_url


def registry(tmp_path: Path, *versions: AgentVersion) -> Registry:
    """A registry that has these; the first version of each agent is live."""
    opened = Registry.open(team(tmp_path).registry_url)
    for one in versions:
        opened.add(one)
    return opened


@asynccontextmanager
async def dispatching(made: Team, crew: FakeCrew, of: Registry, **options: Any) -> Any:
    dispatch = Dispatcher(made, crew, of, options.pop("admit", admit), **options)
    await dispatch.start()
    try:
        yield dispatch
    finally:
        await dispatch.close()
        of.close()


def asked(model: str, text: str = "hello", **options: Any) -> AgentRequest:
    return AgentRequest(model, ({"role": "user", "content": text},), **options)


async def said(dispatch: Dispatcher, request: AgentRequest) -> tuple[str, str, Event]:
    """(agent, text, last event) of a reply."""
    answer = await dispatch.open(request)
    text = ""
    async for event in answer.events:
        if isinstance(event, TextDelta):
            text += event.text
    return answer.agent, text, event


async def until(holds: Callable[[], Any]) -> None:
    """Wait, as briefly as can be, for what other tasks and threads do."""
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.001)


async def admitted(path: Path, name: str) -> AgentVersion:
    if path.parent.name == "people":
        return AgentVersion(name, "", str(path), f"art-{path.name}", path.name)
    return await admit(path, name)
