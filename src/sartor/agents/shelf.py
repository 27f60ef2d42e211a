"""The adapters that every worker is to hold: brought to all, taken from all, and brought to each new one before it answers."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from sartor.agents.child import Child, GoneError
from sartor.core.errors import ModelError, SartorError

# Workers that die while they load an adapter, in a row, before it is what is blamed: one may be killed from outside just then.
_MOST_DEATHS = 2


class Shelf:
    """`ready`: the workers that are ready, spares first. `some_ready`: waits until there is one."""

    def __init__(self, ready: Callable[[], list[Child]], some_ready: Callable[[], Awaitable[None]]) -> None:
        self._ready = ready
        self._some_ready = some_ready
        self._deaths: Counter[str] = Counter()
        self._turn = asyncio.Lock()
        self.paths: dict[str, Path] = {}
        self._numbers = itertools.count(1)
        self.attached: dict[str, int] = {}  # when last, so that a detach that waited knows whether it is still wanted

    async def attach(self, adapter: str, path: Path) -> None:
        """Load it in every worker, a spare first: nobody waits for what a spare does, or dies with it.

        Raises ModelError or BudgetError; then no worker holds it.
        """
        self.attached[adapter] = next(self._numbers)
        async with self._turn:
            self._deaths.pop(adapter, None)
            for child in self._ready():
                child.refused.pop(adapter, None)
            await self._some_ready()
            await self._bring(adapter, path)

    async def detach(self, adapter: str, since: int) -> None:
        """Take it from every worker, unless it was attached after `since`."""
        async with self._turn:
            if self.attached.get(adapter, 0) == since:
                self.attached.pop(adapter, None)
                await self._take(adapter)

    async def _bring(self, adapter: str, path: Path) -> None:
        is_served = adapter in self.paths
        while lacking := [child for child in self._ready() if not child.knows(adapter)]:
            try:
                await lacking[0].attach(adapter, path)
            except GoneError as error:
                self._died(adapter)
                if self._is_deadly(adapter):
                    await self._take(adapter)
                    raise ModelError(
                        f"{self._deaths[adapter]} workers died while they loaded the adapter {adapter[:12]}: {error}",
                        "tune it again, or verify the release that it is from",
                    ) from None
                await self._some_ready()
            except SartorError as error:
                if not is_served:
                    await self._take(adapter)
                    raise
                lacking[0].refused[adapter] = error  # calls of it go to the workers that have it
            else:
                self._deaths.pop(adapter, None)
                self.paths[adapter] = path  # from here on new workers load it, too
        self.paths[adapter] = path

    async def _take(self, adapter: str) -> None:
        self.paths.pop(adapter, None)
        for child in self._ready():
            await child.detach(adapter)

    async def equip(self, child: Child) -> None:
        """Load all of them in a new worker; it remembers what it could not load, and why. Raises GoneError when it dies."""
        while lacking := [name for name in self.paths if not child.knows(name)]:
            for adapter in lacking:
                await self._equip(child, adapter)

    async def _equip(self, child: Child, adapter: str) -> None:
        path = self.paths.get(adapter)
        if path is None:  # taken away meanwhile
            return
        if self._is_deadly(adapter):
            problem = f"{self._deaths[adapter]} workers died while they loaded the adapter {adapter[:12]}"
            child.refused[adapter] = ModelError(problem, "promote or roll back the agent that has it")
            return
        try:
            await child.attach(adapter, path)
            self._deaths.pop(adapter, None)
        except GoneError:
            self._died(adapter)
            raise
        except SartorError as error:
            child.refused[adapter] = error

    def _died(self, adapter: str) -> None:
        self._deaths[adapter] += 1

    def _is_deadly(self, adapter: str) -> bool:
        return self._deaths[adapter] >= _MOST_DEATHS
