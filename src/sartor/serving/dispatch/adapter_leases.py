"""Adapters held by workers, released when unused."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sartor.core.errors import AdmissionError, SartorError, UnavailableError
from sartor.serving.registry.registry_schema import AgentVersion
from sartor.serving.types import WorkerBackend

# What `serving.admission` is asked for: the Release in a directory as a version of an agent of that name, or what it
# raises.
# `release` of the version is where the adapter is loaded from: the server's own copy.
Admit = Callable[[Path, str], Awaitable[AgentVersion]]


class AdapterLeases:
    """The adapters of one crew. Not thread-safe: the event loop's own.

    copies: where admission keeps this machine's copies, each under its Release's id: a registry that several machines
    share names a directory that may be another one's.
    """

    def __init__(self, workers: WorkerBackend, admit: Admit, copies: Path) -> None:
        self._copies = copies
        self._workers = workers
        self._admit = admit
        self._loaded: set[str] = set()
        self._admitted: set[str] = set()
        # id of each Release that was checked -> its directory. Two may have the same adapter: each is checked for
        # itself
        self.directories: dict[str, Path] = {}
        self._loading: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._wanted: set[str] = set()
        self._pinned: list[AgentVersion] = []
        self._leases: Counter[str] = Counter()
        # one load or unload at a time: what is being unloaded may be asked for again
        self._lock = asyncio.Lock()
        self._detaching: set[asyncio.Task[None]] = set()
        self.troubles: dict[str, SartorError] = {}

    def holds(self, version: AgentVersion) -> bool:
        """Whether a call of this version can be made now."""
        return version.adapter in self._loaded and version.release_id in self.directories

    def was_admitted(self, version: AgentVersion) -> bool:
        """Whether a server ever let it in: this one, one before it, whose copy stands, or another one that registered
        it.
        """
        has_copy = version.release_id in self._admitted or (self._copies / version.release_id).is_dir()
        return has_copy or "canary" in version.facts.get("checks", {})

    def check(self, version: AgentVersion) -> None:
        """Raise UnavailableError, saying why, for a version that is not held."""
        if not self.holds(version):
            trouble = self.troubles.get(version.name)
            reason = trouble.problem if trouble else "its adapter is being loaded"
            raise UnavailableError(
                f"{version.name} cannot answer: {reason}", trouble.remedy if trouble else "ask again"
            )

    @contextmanager
    def leased(self, adapter: str) -> Iterator[None]:
        """As long as this lasts, the adapter stays. "" is the base, which always does."""
        self._leases[adapter] += 1
        try:
            yield
        finally:
            self._leases[adapter] -= 1
            if not self._leases[adapter]:
                del self._leases[adapter]
                self._let_go(adapter)

    @contextmanager
    def pinned(self, version: AgentVersion) -> Iterator[None]:
        """As long as this lasts, the version is wanted: it is about to be asked for, and the registry does not say so
        yet.
        """
        self._pinned.append(version)
        try:
            yield
        finally:
            self._pinned.remove(version)

    async def hold(self, version: AgentVersion) -> None:
        """Check the Release anew and load its adapter in every worker; nothing to do for one that is held.

        Raises what admission raises, AdmissionError when another Release lies there now, ModelError, BudgetError.
        """
        self._wanted.add(version.adapter)
        if self.holds(version):
            return
        key = version.name, version.release_id  # personal versions of one agent have one name
        if key not in self._loading:
            task = self._loading[key] = asyncio.ensure_future(self._load(version))
            task.add_done_callback(lambda done: self._loading_done(key, done))
        await asyncio.shield(self._loading[key])  # others may wait for it too

    def _loading_done(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._loading[key]
        if not task.cancelled():
            task.exception()  # it is among the troubles, also where nobody waits for it any more

    async def _load(self, version: AgentVersion) -> None:
        try:
            admitted = await self._recheck(version)
            async with self._lock:
                if version.adapter not in self._loaded:
                    await self._workers.attach(version.adapter, Path(admitted.release))
                    self._loaded.add(version.adapter)
                self.directories[version.release_id] = Path(admitted.release)
                self._admitted.add(version.release_id)
        except SartorError as error:
            self.troubles[version.name] = error
            raise
        self.troubles.pop(version.name, None)

    async def _recheck(self, version: AgentVersion) -> AgentVersion:
        """The version as admission finds it, in the copy if there is one that is whole, else where it was
        registered.
        """
        copy = self._copies / version.release_id
        if copy.is_dir():
            with suppress(SartorError):
                return await self._same(version, copy)
        return await self._same(version, Path(version.release))

    async def _same(self, version: AgentVersion, path: Path) -> AgentVersion:
        result = await self._admit(path, version.agent)
        if (result.release_id, result.adapter) != (version.release_id, version.adapter):
            raise AdmissionError(
                f"{path} is the Release {result.release_id[:16]}, not {version.release_id[:16]} any more",
                f"bring back the Release of {version.name}, or promote another version",
                "release",
            )
        return result

    def want(self, versions: Collection[AgentVersion]) -> None:
        """Let go of everything but these, each as soon as no reply of it lives."""
        versions = [*versions, *self._pinned]
        self._wanted = {version.adapter for version in versions}
        names, releases = {version.name for version in versions}, {version.release_id for version in versions}
        self.directories = {release: path for release, path in self.directories.items() if release in releases}
        self.troubles = {name: trouble for name, trouble in self.troubles.items() if name in names}
        for adapter in list(self._loaded):
            self._let_go(adapter)

    def drop(self, version: AgentVersion) -> None:
        """Let go of one, as soon as no reply of it lives."""
        self._wanted.discard(version.adapter)
        self.directories.pop(version.release_id, None)
        self._admitted.discard(version.release_id)
        self.troubles.pop(version.name, None)
        self._let_go(version.adapter)

    @property
    def is_settled(self) -> bool:
        """Whether the workers hold nothing that nobody wants: no reply of such a one lives any more."""
        return not self._detaching and self._loaded <= self._wanted

    async def settle(self) -> None:
        """Wait for what is being let go of."""
        await asyncio.gather(*self._detaching)

    async def close(self) -> None:
        """Load nothing more."""
        for task in (loading := [*self._loading.values()]):
            task.cancel()
        await asyncio.gather(*loading, *self._detaching, return_exceptions=True)

    def _let_go(self, adapter: str) -> None:
        if adapter in self._loaded and adapter not in self._wanted and not self._leases[adapter]:
            self._loaded.discard(adapter)
            task = asyncio.ensure_future(self._detach(adapter))
            self._detaching.add(task)
            task.add_done_callback(self._detaching.discard)

    async def _detach(self, adapter: str) -> None:
        async with self._lock:
            if adapter not in self._loaded:  # else it was asked for again while this waited
                with suppress(SartorError):  # a worker that is gone holds nothing
                    await self._workers.detach(adapter)
