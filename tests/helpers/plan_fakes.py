"""Members of plans that say what the test has written: by agent, in turn, or as a function of what they are asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sartor.core import config
from sartor.core.errors import SartorError
from sartor.inference.engine import Event, ReplyDone, ReplyFailed, TextDelta
from sartor.serving.plans.plan_dispatch import PlanDispatcher
from sartor.serving.plans.plan_log import PlanLog
from sartor.serving.receipts import digest_by
from sartor.serving.team_config import Team
from sartor.serving.types import AgentReply, AgentRequest

DIGEST = digest_by(b"k" * 32)
# A reply; an error that opening raises; a Failed after the first word; seconds that nothing is said for
Script = str | SartorError | ReplyFailed | float
Said = Script | Sequence[Script] | Callable[[AgentRequest], Script]


class FakeEvents:
    def __init__(self, replies: FakeReplies, agent: str, said: Script) -> None:
        self._replies, self._agent = replies, agent
        text = said if isinstance(said, str) else "half a "
        words = [TextDelta("c", word, 1) for word in text.replace(" ", " |").split("|") if word]
        self._events: list[Event] = [
            *words,
            said if isinstance(said, ReplyFailed) else ReplyDone("c", "stop", 10, len(words), 2),
        ]
        self._wait_s = said if isinstance(said, float) else 0.0
        replies.live += 1

    def __aiter__(self) -> FakeEvents:
        return self

    async def __anext__(self) -> Event:
        await asyncio.sleep(self._wait_s)
        if not self._events:
            raise StopAsyncIteration
        if len(self._events) == 1:
            self._replies.live -= 1
        return self._events.pop(0)

    async def aclose(self) -> None:
        if self._events:
            self._replies.live -= 1
        self._events = []


class FakeReplies:
    """`script`: agent -> what it says each time, one after the other, or by the request. asked: every Request."""

    def __init__(self, **script: Said) -> None:
        self.script: dict[str, Any] = {name: said for name, said in script.items()}
        self.asked: list[AgentRequest] = []
        self.live = 0

    def of(self, agent: str) -> list[AgentRequest]:
        return [request for request in self.asked if request.model.partition("@")[0] == agent]

    async def open(self, request: AgentRequest) -> AgentReply:
        self.asked.append(request)
        await asyncio.sleep(0)
        name = request.model.partition("@")[0]
        said = self.script[name]
        if callable(said):
            said = said(request)
        elif isinstance(said, list):
            said = said.pop(0)
        if isinstance(said, SartorError):
            raise said
        version = f"base@{'b' * 12}" if name == "base" else f"{name}@1"
        return AgentReply(version, "asked by name", f"r{len(self.asked)}", FakeEvents(self, name, said))


def planned(tmp_path: Path, *plans: dict[str, Any], **rest: Any) -> Team:
    """A team with these plans, read as from a file."""
    state = str(tmp_path / "state")
    return config.load(Team, {"base": "tiny", "state": state, "plans": list(plans), **rest})


def opened(team: Team, replies: FakeReplies, **options: Any) -> PlanDispatcher:
    return PlanDispatcher(team, replies, PlanLog(Path(team.state) / "plans", DIGEST), **options)


def asked(model: str, text: str = "light in the hall", **options: Any) -> AgentRequest:
    return AgentRequest(model, ({"role": "user", "content": text},), **options)


class Told:
    """An answer to its end."""

    def __init__(self, answer: AgentReply, events: list[Event]) -> None:
        self.agent, self.reason, self.receipt = answer.agent, answer.reason, answer.receipt
        self.pieces = [event for event in events if isinstance(event, TextDelta)]
        self.text = "".join(piece.text for piece in self.pieces)
        self.end: Any = events[-1]


async def told(plans: PlanDispatcher, request: AgentRequest) -> Told:
    answer = await plans.open(request)
    return Told(answer, [event async for event in answer.events])


async def ask(team: Team, replies: FakeReplies, request: AgentRequest, **options: Any) -> Told:
    """One answer, and nobody is left waiting."""
    plans = opened(team, replies, **options)
    said = await told(plans, request)
    await plans.close()
    assert replies.live == 0, "a reply was left open"
    return said
