"""Conversation partner for `sartor chat TEAM.yaml`: a team with its own worker, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any, cast

from sartor.core.artifacts import Artifact
from sartor.core.ipc import error_of
from sartor.inference.engine import ReplyDone, ReplyFailed, TextDelta
from sartor.serving.commands.ask_team import without_http
from sartor.serving.http.startup import build_services
from sartor.serving.team_config import load
from sartor.serving.types import AgentRequest

Notice = Callable[[str], object]


class TeamPartner:
    """Team of a YAML file, with its own worker."""

    artifact: Artifact | None = None

    def __init__(self, file: Path, agent: str, sampling: Mapping[str, Any], notice: Notice) -> None:
        self.name, self._agent, self._sampling = agent, agent, sampling
        self._loop, self._stack = asyncio.new_event_loop(), AsyncExitStack()
        notice(f"opening the team of {file}")
        self._services: Any = self._loop.run_until_complete(
            self._stack.enter_async_context(build_services(without_http(load(file))))
        )

    def reply(self, messages: list[dict[str, Any]], *, by_base: bool = False) -> Iterator[str]:
        """Yield the reply to a conversation, piece by piece."""
        request = AgentRequest("base" if by_base else self._agent, tuple(messages), sampling=self._sampling)
        pieces = self._pieces(request)
        while True:
            try:
                yield self._loop.run_until_complete(anext(pieces))
            except StopAsyncIteration:
                return

    async def _pieces(self, request: Any) -> AsyncIterator[str]:
        """Yield the reply's text as it arrives. Raises the error of a failed reply."""
        answer = await self._services.replies.open(request)
        self.name = answer.agent
        async with aclosing(cast(Any, answer.events)) as events:
            async for event in cast(AsyncIterator[TextDelta | ReplyDone | ReplyFailed], events):
                if isinstance(event, TextDelta):
                    yield event.text
                elif isinstance(event, ReplyFailed):
                    raise error_of(event.kind, event.problem, event.remedy)

    def close(self) -> None:
        """Stop the team's services."""
        self._loop.run_until_complete(self._stack.aclose())
        self._loop.close()
