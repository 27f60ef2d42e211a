"""Requests that a candidate answers too, unseen: in the background, one at a time, only while the crew has room to spare."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

from sartor.agents.asking import Crew, Events
from sartor.agents.replying import Replying
from sartor.core.errors import SartorError
from sartor.inference.engine import Call, Done, Failed

MOST_WAITING = 16
ROOM_S = 0.05


@dataclass(frozen=True)
class Shadow:
    """A request that was answered, to be answered again. agent: the candidate's exact version. said: the live reply."""

    call: Call
    agent: str
    said: str


@dataclass(frozen=True)
class Outcome:
    """What came of a shadow: how it ended, and the reply."""

    shadow: Shadow
    end: Done | Failed
    text: str = ""
    tokens: int = 0
    took_s: float = 0.0


class Shadows:
    """Those of a team. What does not find room is left out, and counted: a live reply never waits for a shadow.

    has_room: whether the crew is idle enough. leased: keeps the candidate's adapter. report: what came of one.
    """

    def __init__(
        self,
        crew: Crew,
        has_room: Callable[[], bool],
        leased: Callable[[str], AbstractContextManager[None]],
        report: Callable[[Outcome], object],
        deadline_s: float,
    ) -> None:
        self._crew = crew
        self._has_room = has_room
        self._leased = leased
        self._report = report
        self._deadline_s = deadline_s
        self._waiting: deque[Shadow] = deque()
        self._news = asyncio.Event()
        self.answered = 0
        self.left_out = 0

    def offer(self, shadow: Shadow) -> None:
        """Answer this too, when there is room for it; the oldest that waits makes place."""
        if len(self._waiting) == MOST_WAITING:
            self._waiting.popleft()
            self.left_out += 1
        self._waiting.append(shadow)
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting:
                if self._has_room():
                    await self._answer(self._waiting.popleft())
                else:
                    await asyncio.sleep(ROOM_S)

    async def _answer(self, shadow: Shadow) -> None:
        with self._leased(shadow.call.adapter):
            began = time.monotonic()
            try:
                events = cast(Events, await self._crew.reply(shadow.call, shadow.agent, self._deadline_s))
            except SartorError as error:
                self._report(Outcome(shadow, Failed(shadow.call.id, error.kind, error.problem, error.remedy)))
                return
            reply = Replying(events, _free, _ended, time.monotonic() - began)
            try:
                await self._follow(shadow, reply)
            finally:
                await reply.aclose()

    async def _follow(self, shadow: Shadow, reply: Replying) -> None:
        async for event in reply:
            if isinstance(event, (Done, Failed)):
                self.answered += 1
                self._report(Outcome(shadow, event, reply.text, reply.tokens, reply.took_s))
            elif not self._has_room():
                self.left_out += 1
                return


def _free() -> None:
    """The lease lasts as long as the shadow."""


async def _ended(reply: Replying, event: Done | Failed) -> None:
    """Nobody waits for a shadow's last event."""
