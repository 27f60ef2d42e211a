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

# Admission: takes the directory of a Release and the agent's name; returns the admitted version or raises. The
# version's `release` is the server's own copy, from which the adapter is loaded.
Admit = Callable[[Path, str], Awaitable[AgentVersion]]


class AdapterLeases:
    """Adapters that the workers of one server hold. Not thread-safe; use it in the event loop's thread.

    copies: directory of this machine's copies, each named by its Release's id. A registry shared by several machines
    may
    name a directory of another machine.
    directories: by Release id, the directory of each checked Release.
    troubles: by version name, the error of a version that could not be loaded.
    revoked_ids: Releases that were revoked; a version of one is not held, whatever is loaded.
    """

    def __init__(self, workers: WorkerBackend, admit: Admit, copies: Path) -> None:
        self._copies = copies
        self._workers = workers
        self._admit = admit
        self._loaded: set[str] = set()
        self._admitted: set[str] = set()
        # id of each checked Release -> its directory. Two Releases may share an adapter; each is checked itself.
        self.directories: dict[str, Path] = {}
        self._loading: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._wanted: set[str] = set()
        self._pinned: list[AgentVersion] = []
        self._leases: Counter[str] = Counter()
        # One load or unload at a time, since an adapter that is being unloaded may be requested again
        self._lock = asyncio.Lock()
        self._detaching: set[asyncio.Task[None]] = set()
        self.troubles: dict[str, SartorError] = {}
        self.revoked_ids: Collection[str] = ()

    def holds(self, version: AgentVersion) -> bool:
        """Return whether a call of this version can run now."""
        is_revoked = version.release_id in self.revoked_ids
        return version.adapter in self._loaded and version.release_id in self.directories and not is_revoked

    def was_admitted(self, version: AgentVersion) -> bool:
        """Return whether any server has admitted the version.

        It may be this server, an earlier one whose copy exists, or another one that registered the version.
        """
        has_copy = version.release_id in self._admitted or (self._copies / version.release_id).is_dir()
        return has_copy or "canary" in version.facts.get("checks", {})

    def check(self, version: AgentVersion) -> None:
        """Raise UnavailableError with the reason if a version is not held."""
        if not self.holds(version):
            trouble = self.troubles.get(version.name)
            reason = trouble.problem if trouble else "its adapter is being loaded"
            raise UnavailableError(
                f"{version.name} cannot answer: {reason}", trouble.remedy if trouble else "ask again"
            )

    @contextmanager
    def leased(self, adapter: str) -> Iterator[None]:
        """Keep an adapter loaded while the context is open. "" is the base, which is always loaded."""
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
        """Keep a version wanted while the context is open, because the registry does not name it yet."""
        self._pinned.append(version)
        try:
            yield
        finally:
            self._pinned.remove(version)

    async def hold(self, version: AgentVersion) -> None:
        """Check the Release again and load its adapter in every worker. A version that is held needs nothing.

        Raises the errors of admission, AdmissionError if the directory holds another Release now, ModelError,
        BudgetError.
        """
        self._wanted.add(version.adapter)
        if self.holds(version):
            return
        key = version.name, version.release_id  # personal versions of one agent have one name
        if key not in self._loading:

            def on_done(task: asyncio.Task[None]) -> None:
                del self._loading[key]
                if not task.cancelled():
                    task.exception()  # marks it as retrieved; the error is in `troubles`

            self._loading[key] = asyncio.ensure_future(self._load(version))
            self._loading[key].add_done_callback(on_done)
        await asyncio.shield(self._loading[key])  # other callers may wait for the same load

    async def _load(self, version: AgentVersion) -> None:
        try:
            # admit the version again: from the copy if there is a valid one, else from its registered directory
            admitted = None
            copy = self._copies / version.release_id
            if copy.is_dir():
                with suppress(SartorError):
                    admitted = await self._same(version, copy)
            if admitted is None:
                admitted = await self._same(version, Path(version.release))
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
        """Keep only these and the pinned versions; unload all other adapters as soon as no reply uses them."""
        versions = [*versions, *self._pinned]
        self._wanted = {version.adapter for version in versions}
        names, releases = {version.name for version in versions}, {version.release_id for version in versions}
        self.directories = {release: path for release, path in self.directories.items() if release in releases}
        self.troubles = {name: trouble for name, trouble in self.troubles.items() if name in names}
        for adapter in list(self._loaded):
            self._let_go(adapter)

    def drop(self, version: AgentVersion) -> None:
        """Unload the adapter of one version as soon as no reply uses it."""
        self._wanted.discard(version.adapter)
        self.directories.pop(version.release_id, None)
        self._admitted.discard(version.release_id)
        self.troubles.pop(version.name, None)
        self._let_go(version.adapter)

    @property
    def is_settled(self) -> bool:
        """Whether the workers hold no unwanted adapter, so that no reply with such an adapter runs."""
        return not self._detaching and self._loaded <= self._wanted

    async def settle(self) -> None:
        """Return when the unloads under way are done."""
        await asyncio.gather(*self._detaching)

    async def close(self) -> None:
        """Cancel all loads and finish the unloads under way."""
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
            if adapter not in self._loaded:  # otherwise it was loaded again while this waited for the lock
                with suppress(SartorError):  # a worker that is gone holds nothing
                    await self._workers.detach(adapter)
