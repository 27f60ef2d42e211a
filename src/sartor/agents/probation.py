"""A worker for one adapter that nobody trusts yet: loads it, makes a few calls, and ends. What happens there touches nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sartor.agents.child import Child, GoneError
from sartor.agents.live import LiveCall
from sartor.core.errors import ModelError, UnavailableError
from sartor.models.engine.contract import Call, Event, event_from_json

# A few prompts need no more, and the workers that serve need the rest.
_ROWS, _CACHE_TOKENS = 2, 8192
_NICE = 10
AGENT = "probation"


class Probation:
    """`command` and `opening` as of the workers that serve. One adapter at a time: each takes a base's memory."""

    def __init__(self, command: Sequence[str], opening: Mapping[str, Any], start_s: float) -> None:
        engine = dict(opening["engine"])
        engine["rows"] = min(_ROWS, engine["rows"])
        if "cache_tokens" in engine:
            engine["cache_tokens"] = min(_CACHE_TOKENS, engine["cache_tokens"])
        self._command = command
        self._opening = {**opening, "engine": engine, "nice": _NICE}
        self._start_s = start_s
        self._turn = asyncio.Lock()

    async def events(self, adapter: str, path: Path, calls: Sequence[Call], within_s: float) -> list[tuple[Event, ...]]:
        """What each call said, once the adapter in `path` is attached as `adapter`; calls of the base may be among them.

        Raises what attaching tells (ModelError, BudgetError), ModelError when the worker dies or is not done in time, and
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
                async with asyncio.timeout(within_s):
                    await child.attach(adapter, path)
                    for number, call in enumerate(calls):
                        child.begin(LiveCall(call, AGENT, False, number), call.id)
                    await self._first(child, ended)
            except GoneError as error:
                raise ModelError(f"a worker that tried the adapter in {path} died: {error}", "tune it again") from None
            except TimeoutError:
                raise ModelError(f"a worker that tried the adapter in {path} was not done in {within_s:g} s",
                                 "tune it again, or raise workers.start_s") from None  # fmt: skip
            finally:
                child.kill("closed")
                await child.gone()
            return [tuple(said[call.id]) for call in calls]

    async def _start(self, child: Child) -> None:
        try:
            await child.start(self._start_s)
        except GoneError as error:
            raise UnavailableError(f"a worker to try the adapter could not start: {error}", "see what the log says") from None

    async def _first(self, child: Child, ended: asyncio.Event) -> None:
        """Return when all calls have ended. Raises GoneError when the worker does."""
        gone = asyncio.ensure_future(child.gone())
        done = asyncio.ensure_future(ended.wait())
        try:
            if child.calls:
                await asyncio.wait([gone, done], return_when=asyncio.FIRST_COMPLETED)
            if child.calls:
                raise GoneError(child.why)
        finally:
            for waiter in (gone, done):
                waiter.cancel()
