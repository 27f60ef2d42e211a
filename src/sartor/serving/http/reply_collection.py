"""Replies to one HTTP request, collected or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from sartor.core.ipc import error_of
from sartor.core.remedies import REQUEST_AGAIN
from sartor.inference.engine import Event, Logprob, ReplyDone, ReplyFailed, TextDelta
from sartor.serving.http.http_errors import CutError
from sartor.serving.http.request_log import RequestRecord
from sartor.serving.http.response_models import ChatCompletionAudio
from sartor.serving.http.shutdown import ServerLifetime
from sartor.serving.types import AgentReply, AgentRequest, Replier

T = TypeVar("T")
# Seconds after the deadline in which `dispatch` may report it with its own error before this module does
GRACE_S = 2.0
MOST_WAITING_EVENTS = 64


@dataclass
class CollectedReply:
    """One complete reply.

    audio: the reply as speech, if it was requested and has words.
    """

    text: str
    done: ReplyDone
    logprobs: list[Logprob] = field(default_factory=list)
    audio: ChatCompletionAudio | None = None


@dataclass(frozen=True)
class ReplyTerms:
    """Settings shared by the replies to one HTTP request.

    per_prompt: number of replies for each prompt.
    keep: called with each complete reply and its request.
    """

    record: RequestRecord
    lifetime: ServerLifetime
    per_prompt: int = 1
    keep: Callable[[AgentReply, AgentRequest, str], object] = lambda answer, request, reply: None


class ReplyGroup:
    """Replies of one agent version to one HTTP request.

    requests: one for each answer. deadline: on the event loop's clock, in seconds.
    """

    def __init__(
        self, answers: Sequence[AgentReply], requests: Sequence[AgentRequest], terms: ReplyTerms, deadline: float
    ) -> None:
        self.answers = answers
        self._requests = requests
        self._terms = terms
        self._deadline = deadline
        self._events = [cast(AsyncGenerator[Event, None], answer.events) for answer in answers]

    @property
    def first(self) -> AgentReply:
        """First reply; its agent and reason hold for all."""
        return self.answers[0]

    @property
    def receipts(self) -> str:
        """Ids of all receipts, joined by ", " for one header."""
        return ", ".join(answer.receipt for answer in self.answers)

    async def events(self, index: int) -> AsyncGenerator[TextDelta | ReplyDone, None]:
        """Yield the events of one reply.

        Raises the error of a ReplyFailed event; DeadlineError; CutError if the reply stops without its last event.
        """
        texts: list[str] = []
        async with aclosing(self._events[index]) as source:
            while True:
                event = await self._terms.lifetime.within(anext(source, None), self._deadline)
                if event is None:
                    raise CutError("the reply stopped before its end", REQUEST_AGAIN)
                if isinstance(event, ReplyFailed):
                    raise error_of(event.kind, event.problem, event.remedy)
                self._terms.record.count_event(event, index % self._terms.per_prompt == 0)
                if isinstance(event, TextDelta):
                    texts.append(event.text)
                    yield event
                    continue
                if event.finish == "cancelled":
                    raise CutError("the reply was ended by the server", REQUEST_AGAIN)
                self._terms.keep(self.answers[index], self._requests[index], "".join(texts))
                yield event
                return

    async def whole(self) -> list[CollectedReply]:
        """Return all complete replies. If one fails, the others are cancelled and its error is raised."""
        return await gather_or_cancel([self._collect(index) for index in range(len(self.answers))])

    async def _collect(self, index: int) -> CollectedReply:
        events = [event async for event in self.events(index)]
        deltas = [event for event in events if isinstance(event, TextDelta)]
        logprobs = [logprob for delta in deltas for logprob in delta.logprobs]
        return CollectedReply("".join(delta.text for delta in deltas), cast(ReplyDone, events[-1]), logprobs)

    async def merged(self) -> AsyncGenerator[tuple[int, TextDelta | ReplyDone], None]:
        """Yield (index of the reply, event) of all replies, in order of arrival."""
        if len(self.answers) == 1:
            async for event in self.events(0):
                yield 0, event
            return
        queue: asyncio.Queue[tuple[int, TextDelta | ReplyDone] | Exception] = asyncio.Queue(MOST_WAITING_EVENTS)
        tasks = [asyncio.ensure_future(self._pump(index, queue)) for index in range(len(self.answers))]
        unfinished = len(tasks)
        try:
            while unfinished:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                unfinished -= isinstance(item[1], ReplyDone)
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, queue: asyncio.Queue[tuple[int, TextDelta | ReplyDone] | Exception]) -> None:
        try:
            async for event in self.events(index):
                await queue.put((index, event))
        except Exception as error:  # `merged` raises it
            await queue.put(error)

    async def within(self, work: Awaitable[T]) -> T:
        """Return the result of further work for the replies, bounded by their deadline.

        Raises DeadlineError, CutError.
        """
        return await self._terms.lifetime.within(work, self._deadline)

    async def close(self) -> None:
        """Close all event streams; replies that still run are cancelled."""
        for events in self._events:
            await events.aclose()


async def gather_or_cancel(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results of all coroutines in order.

    If one fails, the others are cancelled and its error is raised.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(item) for item in work]
    except BaseExceptionGroup as error_group:
        raise error_group.exceptions[0] from None
    return [task.result() for task in tasks]


async def open_answers(replies: Replier, requests: Sequence[AgentRequest], terms: ReplyTerms) -> ReplyGroup:
    """Open all replies. The first decides the exact agent version for the others.

    Raises what `Replier.open` raises, DeadlineError and CutError. No reply is left open then.
    """
    record, deadline_s = terms.record, requests[0].deadline_s
    deadline = asyncio.get_running_loop().time() + deadline_s - record.elapsed_s + GRACE_S
    answers: dict[int, AgentReply] = {}

    def opened() -> ReplyGroup:
        indexes = sorted(answers)
        return ReplyGroup(
            [answers[index] for index in indexes], [requests[index] for index in indexes], terms, deadline
        )

    async def begin(index: int, request: AgentRequest) -> None:
        remaining_s = max(deadline_s - record.elapsed_s, 0.001)
        answers[index] = await terms.lifetime.within(replies.open(replace(request, deadline_s=remaining_s)), deadline)

    try:
        await begin(0, requests[0])
        record.agent, record.receipt = answers[0].agent, answers[0].receipt
        # a reply of the base is named `base@DIGEST`, but requests name it `base`
        model = "base" if record.agent.startswith("base@") else record.agent
        await gather_or_cancel(
            [begin(index, replace(request, model=model)) for index, request in enumerate(requests[1:], 1)]
        )
    except BaseException:
        await opened().close()
        raise
    return opened()
