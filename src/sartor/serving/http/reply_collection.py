"""Collects or streams the answers of one request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from sartor.inference.engine import Event, Logprob, ReplyDone, ReplyFailed, TextDelta
from sartor.serving.http.http_errors import CutError, error_of
from sartor.serving.http.request_log import RequestRecord
from sartor.serving.http.services import Replier
from sartor.serving.http.shutdown import ServerLifetime
from sartor.serving.types import AgentReply, AgentRequest

T = TypeVar("T")
# What dispatch may still say of a deadline in its own words before this front does
GRACE_S = 2.0
MOST_WAITING_EVENTS = 64


@dataclass
class CollectedReply:
    """One whole reply."""

    text: str
    done: ReplyDone
    logprobs: list[Logprob] = field(default_factory=list)


@dataclass(frozen=True)
class ReplyTerms:
    """What holds for the Answers to one HTTP request.

    per_prompt: how many Answers each prompt has. keep: told of each reply that is whole.
    """

    entry: RequestRecord
    shift: ServerLifetime
    per_prompt: int = 1
    keep: Callable[[AgentReply, AgentRequest, str], object] = lambda answer, request, reply: None


class ReplyGroup:
    """The Answers to the requests that one HTTP request makes, all by the same agent; they end by `at` of the loop's clock."""

    def __init__(self, answers: Sequence[AgentReply], requests: Sequence[AgentRequest], terms: ReplyTerms, at: float) -> None:
        self.answers = answers
        self._requests = requests
        self._terms = terms
        self._at = at
        self._events = [cast(AsyncGenerator[Event, None], answer.events) for answer in answers]

    @property
    def first(self) -> AgentReply:
        """The Answer that stands for all: agent, reason."""
        return self.answers[0]

    @property
    def receipts(self) -> str:
        """The receipts of all, as one header has them."""
        return ", ".join(answer.receipt for answer in self.answers)

    async def events(self, place: int) -> AsyncGenerator[TextDelta | ReplyDone, None]:
        """The events of one Answer. Raises what a Failed tells, DeadlineError, CutError."""
        texts: list[str] = []
        async with aclosing(self._events[place]) as source:
            while True:
                event = await self._terms.shift.within(anext(source, None), self._at)
                if event is None:
                    raise CutError("the reply stopped before its end", "ask again")
                if isinstance(event, ReplyFailed):
                    raise error_of(event)
                self._terms.entry.hear(event, place % self._terms.per_prompt == 0)
                if isinstance(event, TextDelta):
                    texts.append(event.text)
                    yield event
                    continue
                if event.finish == "cancelled":
                    raise CutError("the reply was ended by the server", "ask again")
                self._terms.keep(self.answers[place], self._requests[place], "".join(texts))
                yield event
                return

    async def whole(self) -> list[CollectedReply]:
        """All replies, each to its end. When one fails the others are closed, and its error is raised."""
        return await gather_or_cancel([self._collect(place) for place in range(len(self.answers))])

    async def _collect(self, place: int) -> CollectedReply:
        events = [event async for event in self.events(place)]
        pieces = [event for event in events if isinstance(event, TextDelta)]
        logprobs = [logprob for piece in pieces for logprob in piece.logprobs]
        return CollectedReply("".join(piece.text for piece in pieces), cast(ReplyDone, events[-1]), logprobs)

    async def merged(self) -> AsyncGenerator[tuple[int, TextDelta | ReplyDone], None]:
        """The events of all Answers as they come, each with the Answer's place."""
        if len(self.answers) == 1:
            async for event in self.events(0):
                yield 0, event
            return
        waiting: asyncio.Queue[tuple[int, TextDelta | ReplyDone] | Exception] = asyncio.Queue(MOST_WAITING_EVENTS)
        tasks = [asyncio.ensure_future(self._pump(place, waiting)) for place in range(len(self.answers))]
        left = len(tasks)
        try:
            while left:
                item = await waiting.get()
                if isinstance(item, Exception):
                    raise item
                left -= isinstance(item[1], ReplyDone)
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, place: int, waiting: asyncio.Queue[tuple[int, TextDelta | ReplyDone] | Exception]) -> None:
        try:
            async for event in self.events(place):
                await waiting.put((place, event))
        except Exception as error:  # it is raised where the events are read
            await waiting.put(error)

    async def within(self, work: Awaitable[T]) -> T:
        """The result of what is still to be done for the replies, by the time that holds for them."""
        return await self._terms.shift.within(work, self._at)

    async def close(self) -> None:
        """Cancel what still runs."""
        for events in self._events:
            await events.aclose()


async def gather_or_cancel(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order; when one fails the others are cancelled, and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def open_answers(replies: Replier, requests: Sequence[AgentRequest], terms: ReplyTerms) -> ReplyGroup:
    """Begin all replies; the first decides which agent, and the version of it, makes the others too.

    Raises what `Replies.open` raises; then no Answer is left open.
    """
    entry, deadline_s = terms.entry, requests[0].deadline_s
    at = asyncio.get_running_loop().time() + deadline_s - entry.elapsed_s + GRACE_S
    places: dict[int, AgentReply] = {}

    def opened() -> ReplyGroup:
        done = sorted(places)
        return ReplyGroup([places[place] for place in done], [requests[place] for place in done], terms, at)

    async def begin(place: int, request: AgentRequest) -> None:
        left_s = max(deadline_s - entry.elapsed_s, 0.001)
        places[place] = await terms.shift.within(replies.open(replace(request, deadline_s=left_s)), at)

    try:
        await begin(0, requests[0])
        entry.agent, entry.receipt = places[0].agent, places[0].receipt
        # `base@` and its digest is a name that replies carry and nobody asks for
        same = "base" if entry.agent.startswith("base@") else entry.agent
        await gather_or_cancel([begin(place, replace(request, model=same)) for place, request in enumerate(requests[1:], 1)])
    except BaseException:
        await opened().close()
        raise
    return opened()
