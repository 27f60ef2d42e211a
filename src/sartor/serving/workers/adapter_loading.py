"""The adapters that every worker is to hold: brought to all, taken from all, and brought to each new one before it answers."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from sartor.agents.child import Child, GoneError, WorkerEnd
from sartor.core.errors import ModelError, SartorError

# Workers that die while they load an adapter, in a row, before it is what is blamed: one may be killed from outside just then,
# or die of a call that it makes.
_MOST_DEATHS, _MOST_DOUBTFUL = 2, 5


class Shelf:
    """`ready`: the workers that are ready. `to_try`: waits for one for what may kill it."""

    def __init__(self, ready: Callable[[], list[Child]], to_try: Callable[[], Awaitable[Child]]) -> None:
        self._ready = ready
        self._to_try = to_try
        self._deaths: Counter[str] = Counter()
        self._doubtful: Counter[str] = Counter()
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
            self._forgive(adapter)
            for child in self._ready():
                child.refused.pop(adapter, None)
            await self._bring(adapter, path)

    async def detach(self, adapter: str, since: int) -> None:
        """Take it from every worker, unless it was attached after `since`."""
        async with self._turn:
            if self.attached.get(adapter, 0) == since:
                self.attached.pop(adapter, None)
                await self._take(adapter)

    async def _bring(self, adapter: str, path: Path) -> None:
        is_served = adapter in self.paths
        while adapter not in self.paths:
            await self._try(await self._to_try(), adapter, path)
        self.paths[adapter] = path
        while lacking := [child for child in self._ready() if not child.knows(adapter)]:
            try:
                await self._try(lacking[0], adapter, path)
            except SartorError as error:
                if not is_served:
                    await self._take(adapter)
                    raise
                lacking[0].refused[adapter] = error  # calls of it go to the workers that have it

    async def _try(self, child: Child, adapter: str, path: Path) -> None:
        """Raises ModelError when workers died of it often enough; one death is no answer."""
        try:
            await child.attach(adapter, path)
        except GoneError as error:
            self._died(adapter, child)
            if self._is_deadly(adapter):
                problem = f"workers died while they loaded the adapter {adapter[:12]}: {error}"
                raise ModelError(problem, "tune it again, or verify the release that it is from") from None
            return
        self._forgive(adapter)
        self.paths[adapter] = path  # from here on new workers load it, too

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
            problem = f"workers died while they loaded the adapter {adapter[:12]}"
            child.refused[adapter] = ModelError(problem, "promote or roll back the agent that has it")
            return
        try:
            await child.attach(adapter, path)
            self._forgive(adapter)
        except GoneError:
            self._died(adapter, child)
            raise
        except SartorError as error:
            child.refused[adapter] = error

    def _died(self, adapter: str, child: Child) -> None:
        doubtful = child.died_serving or child.end is WorkerEnd.KILLED
        (self._doubtful if doubtful else self._deaths)[adapter] += 1

    def _is_deadly(self, adapter: str) -> bool:
        return self._deaths[adapter] >= _MOST_DEATHS or self._doubtful[adapter] >= _MOST_DOUBTFUL

    def _forgive(self, adapter: str) -> None:
        self._deaths.pop(adapter, None)
        self._doubtful.pop(adapter, None)
