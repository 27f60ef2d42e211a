"""A worker for one adapter that nobody trusts yet: loads it, makes a few calls, and ends. What happens there touches nobody."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sartor.agents.child import Child, GoneError, WorkerEnd
from sartor.agents.live import LiveCall
from sartor.core.errors import ModelError, UnavailableError
from sartor.inference.engine import Call, Event, event_from_json

# A few prompts need no more memory; and the workers that serve go first. Two threads that share a step wait for each other, and
# where those workers take the processors they wait in vain.
_MOST_ROWS, _CACHE_TOKENS = 16, 8192
_NICE = 5
_LOOK_S = 0.25
AGENT = "probation"


class Probation:
    """`command` and `opening` as of the workers that serve. One adapter at a time: each takes a base's memory."""

    def __init__(self, command: Sequence[str], opening: Mapping[str, Any], start_s: float) -> None:
        engine = dict(opening["engine"])
        engine["rows"] = min(_MOST_ROWS, engine["rows"])
        if "cache_tokens" in engine:
            engine["cache_tokens"] = min(_CACHE_TOKENS, engine["cache_tokens"])
        if "threads" in engine:
            engine["threads"] = 1
        self._command = command
        self._opening = {**opening, "engine": engine, "nice": _NICE}
        self._start_s = start_s
        self._turn = asyncio.Lock()

    async def events(self, adapter: str, path: Path, calls: Sequence[Call]) -> list[tuple[Event, ...]]:
        """What each call said, once the adapter in `path` is attached as `adapter`; calls of the base may be among them.

        Raises what attaching tells (ModelError, BudgetError), ModelError when the worker dies or says nothing for start_s, and
        what starting a worker raises.
        """
        async with self._turn:
            said: dict[str, list[Event]] = {call.id: [] for call in calls}
            ended = asyncio.Event()

            def heard(child: Child, told: Mapping[str, Any]) -> None:
                event = event_from_json(told)
                said[event.call].append(event)
                if told["event"] != "piece":
                    child.calls.pop(event.call, None)
                if not child.calls:
                    ended.set()

            child = Child(self._command, self._opening, heard)
            try:
                await self._start(child)
                async with self._watched(child):
                    await child.attach(adapter, path)
                    for number, call in enumerate(calls):
                        child.begin(LiveCall(call, AGENT, False, number), call.id)
                    if calls:
                        await self._all(child, ended)
            except GoneError as error:
                raise ModelError(f"a worker that tried the adapter in {path} ended: {error}", "tune it again") from None
            finally:
                child.kill(WorkerEnd.CLOSED)
                await child.gone()
            return [tuple(said[call.id]) for call in calls]

    async def _start(self, child: Child) -> None:
        try:
            await child.start(self._start_s)
        except GoneError as error:
            raise UnavailableError(f"a worker to try the adapter could not start: {error}", "see what the log says") from None

    @contextlib.asynccontextmanager
    async def _watched(self, child: Child) -> AsyncIterator[None]:
        """Kill it when it says nothing for too long: with little of the processor it may be slow, and is not hanging."""

        async def watch() -> None:
            while time.monotonic() - child.heard_at < self._start_s:
                await asyncio.sleep(_LOOK_S)
            child.kill(WorkerEnd.HUNG, f"said nothing for {self._start_s:g} s")

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()

    async def _all(self, child: Child, ended: asyncio.Event) -> None:
        """Return when all calls have ended. Raises GoneError when the worker does."""
        gone = asyncio.ensure_future(child.gone())
        done = asyncio.ensure_future(ended.wait())
        await asyncio.wait([gone, done], return_when=asyncio.FIRST_COMPLETED)
        for waiter in (gone, done):
            waiter.cancel()
        if child.calls:
            raise GoneError(child.why)
