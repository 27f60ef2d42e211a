"""Personal versions in front of a live version.

If a personal version cannot be used, the live version answers, and the reason says so. A personal version that was
tuned on another version than the live one is not used, since its effect was measured on that version.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from sartor.core.errors import SartorError, UnavailableError
from sartor.core.remedies import REQUEST_AGAIN
from sartor.serving.dispatch.adapter_leases import AdapterLeases
from sartor.serving.dispatch.model_selection import Candidate, CandidateList, Reason, ReasonKind
from sartor.serving.registry.registry_schema import Agent, AgentVersion
from sartor.serving.registry.server_presence import ServerPresence
from sartor.serving.registry.user_versions import SUFFIX, People, UserVersion, UserVersionStore
from sartor.serving.types import AgentRequest, WorkerBackend

WHY = "the user's own version"
_LOOK_S = 0.05


class UserVersionSelector:
    """Personal versions of a running server. Not thread-safe; use it in the event loop's thread.

    Call `follow` after each change of the registry.
    max_loaded: number of personal adapters that workers hold at once.
    listeners: called with the id of each user whose data are to be erased.
    """

    def __init__(
        self, store: UserVersionStore, leases: AdapterLeases, workers: WorkerBackend, state: Path, max_loaded: int
    ) -> None:
        self._store, self._leases, self._workers, self._state, self._max_loaded = (
            store,
            leases,
            workers,
            state,
            max_loaded,
        )
        self._people = People(-1, {})
        # adapter -> its versions and the context that pins it; least recently used first
        self._loaded: OrderedDict[str, tuple[UserVersion, AgentVersion, ExitStack]] = OrderedDict()
        self._presence: ServerPresence | None = None
        self._presence_task: asyncio.Task[None] | None = None
        self._following = asyncio.Lock()
        self._renews = False  # workers may still hold content of an erased user in memory
        self.listeners: list[Callable[[str], object]] = []

    @property
    def loaded_count(self) -> int:
        """Number of personal adapters that the workers hold or are loading."""
        return len(self._loaded)

    def public_request(self, request: AgentRequest) -> AgentRequest:
        """Return the request without a personal suffix in its model name."""
        if request.person and request.model.endswith(SUFFIX):
            return replace(request, model=request.model.removesuffix(SUFFIX))
        return request

    async def select(
        self,
        selection: CandidateList,
        request: AgentRequest,
        agents: Mapping[str, Agent],
        versions: Mapping[str, AgentVersion],
    ) -> CandidateList:
        """Return the candidates with the user's personal version in place of those before its live version.

        It is used if it was tuned on the live version and can be loaded now. A request for an exact version is not
        changed. A personal version also replaces a version on trial.
        """
        agent = agents.get(selection.candidates[0].agent.partition("@")[0])
        is_exact = "@" in request.model and not request.model.endswith(SUFFIX)
        if agent is None or is_exact or not request.person:
            return selection
        user_version = self._people.versions.get((request.person, agent.name))
        name = f"{agent.name}@{agent.live}"
        position = next(
            (index for index, candidate in enumerate(selection.candidates) if candidate.agent == name), None
        )
        if user_version is None or not user_version.adapter or position is None:
            return selection
        live = versions.get(name)
        if live is None or live.release_id != user_version.release_id:
            return _without(
                selection, f"{WHY} was tuned on {user_version.version}, and is not used until it is tuned again"
            )
        if live.release_id in self._leases.revoked_ids:
            return selection  # the live version says why it does not answer
        version = user_version.on(live)
        try:
            await self._hold(user_version, version)
        except SartorError as error:
            return _without(selection, f"{WHY} could not be loaded ({error.kind})")
        # the personal version replaces the version on trial, so the canary reason does not hold
        reasons = [reason for reason in selection.candidates[0].reasons if reason.kind is not ReasonKind.CANARY]
        candidate = Candidate(user_version.name, (*reasons, Reason(ReasonKind.PERSONAL, WHY)), version)
        return replace(selection, candidates=[candidate, *selection.candidates[position:]])

    async def follow(self) -> None:
        """Apply the registry's current personal versions.

        Removed versions are unloaded, and the listeners are told which users to erase.
        """
        async with self._following:
            await self._follow()

    async def _follow(self) -> None:
        try:
            previous_generation = self._people.generation
            people = await asyncio.to_thread(self._store.read)
            forgotten = []
            if previous_generation >= 0:
                forgotten = await asyncio.to_thread(self._store.forgotten_since, previous_generation)
        except SartorError:  # `ServedAgents` reports the troubles of the registry
            return
        self._people = people
        artifacts = {version.artifact for version in people.versions.values()}
        for adapter, (user_version, _, _) in list(self._loaded.items()):
            if user_version.artifact not in artifacts:
                self._let_go(adapter)
        if people.generation != previous_generation:
            for name in {version.name for version in people.versions.values()}:
                self._workers.release(name)
        for person in forgotten:
            for listener in self.listeners:
                listener(person)
        self._renews |= bool(forgotten)
        await self._announce_presence()

    async def close(self) -> None:
        """Unload all personal versions and end the presence of this server."""
        if self._presence_task is not None:
            self._presence_task.cancel()
            await asyncio.gather(self._presence_task, return_exceptions=True)
        for adapter in list(self._loaded):
            self._let_go(adapter)
        if self._presence is not None:
            self._presence.close()

    async def _hold(self, user_version: UserVersion, version: AgentVersion) -> None:
        if version.adapter not in self._loaded:
            stack = ExitStack()
            stack.enter_context(self._leases.pinned(version))
            self._loaded[version.adapter] = user_version, version, stack
        self._loaded.move_to_end(version.adapter)
        while len(self._loaded) > self._max_loaded:
            self._let_go(next(iter(self._loaded)))
        try:
            await self._leases.hold(version)
        except BaseException:
            self._let_go(version.adapter)
            raise
        if version.adapter not in self._loaded:  # erased or evicted while it was being loaded
            self._leases.drop(version)
            raise UnavailableError(f"{user_version.name} was let go of while it was loaded", REQUEST_AGAIN)

    def _let_go(self, adapter: str) -> None:
        if adapter in self._loaded:
            _, version, stack = self._loaded.pop(adapter)
            stack.close()
            self._leases.drop(version)

    async def _announce_presence(self) -> None:
        """Publish the generation that this server has applied, once no worker holds anything that was removed."""
        if self._presence is None:
            try:
                self._presence = await asyncio.to_thread(ServerPresence, self._state)
            except OSError:  # unwritable disk: the erasure then reports that this server has not confirmed it
                return
        if self._presence_task is None or self._presence_task.done():
            self._presence_task = asyncio.ensure_future(self._tell(self._presence))

    async def _tell(self, presence: ServerPresence) -> None:
        while presence.generation != self._people.generation:
            generation, renews = self._people.generation, self._renews
            self._renews = False
            while not self._leases.is_settled:
                await asyncio.sleep(_LOOK_S)
            if renews:
                await self._workers.renew()
            await asyncio.to_thread(presence.write_generation, generation)


def _without(selection: CandidateList, detail: str) -> CandidateList:
    """Return the candidates without a personal version, with the reason why it does not answer."""
    candidate = selection.candidates[0]
    reasons = (*candidate.reasons, Reason(ReasonKind.PERSONAL_UNUSED, detail))
    return replace(selection, candidates=[replace(candidate, reasons=reasons), *selection.candidates[1:]])
