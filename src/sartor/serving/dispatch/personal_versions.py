"""Personal versions in front of a live version.

Whatever is wrong with it, the live version answers, and the reason says that it does. What was tuned on another version than
the live one is not used: what it changes was measured on that one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from sartor.core.errors import SartorError, UnavailableError
from sartor.serving.dispatch.adapter_leases import AdapterLeases
from sartor.serving.dispatch.model_selection import Candidate, CandidateList, Reason, ReasonKind
from sartor.serving.registry.registry_schema import Agent, AgentVersion
from sartor.serving.registry.server_presence import ServerPresence
from sartor.serving.registry.user_versions import SUFFIX, People, UserVersion, UserVersionStore
from sartor.serving.types import AgentRequest, WorkerBackend

WHY = "the user's own version"
_LOOK_S = 0.05


class UserVersionSelector:
    """The personal versions of a running server. Not thread-safe: the event loop's own. `follow` after each change.

    most: adapters of persons that workers hold at once. listeners: told each person who is to be forgotten.
    """

    def __init__(self, book: UserVersionStore, holdings: AdapterLeases, crew: WorkerBackend, state: Path, most: int) -> None:
        self._book, self._holdings, self._crew, self._state, self._most = book, holdings, crew, state, most
        self._people = People(-1, {})
        # adapter -> what keeps it, that which was asked for longest ago first
        self._held: OrderedDict[str, tuple[UserVersion, AgentVersion, ExitStack]] = OrderedDict()
        self._presence: ServerPresence | None = None
        self._telling: asyncio.Task[None] | None = None
        self._following = asyncio.Lock()
        self._renews = False  # workers still hold what somebody who was forgotten has said
        self.listeners: list[Callable[[str], object]] = []

    @property
    def held(self) -> int:
        """How many of them the workers hold, or are to hold."""
        return len(self._held)

    def plain(self, request: AgentRequest) -> AgentRequest:
        """The request as it is for everybody: a personal version that was named is asked for by what it stands on."""
        if request.person and request.model.endswith(SUFFIX):
            return replace(request, model=request.model.removesuffix(SUFFIX))
        return request

    async def own(
        self, plan: CandidateList, request: AgentRequest, agents: Mapping[str, Agent], versions: Mapping[str, AgentVersion]
    ) -> CandidateList:
        """The plan with the person's own version in front of the live one that it stands on, if it can answer now.

        Who names an exact version gets that one; nobody tries a candidate instead of what is their own.
        """
        agent = agents.get(plan.choices[0].agent.partition("@")[0])
        is_exact = "@" in request.model and not request.model.endswith(SUFFIX)
        if agent is None or is_exact or not request.person:
            return plan
        personal = self._people.known.get((request.person, agent.name))
        name = f"{agent.name}@{agent.live}"
        place = next((place for place, choice in enumerate(plan.choices) if choice.agent == name), None)
        if personal is None or not personal.adapter or place is None:
            return plan
        live = versions.get(name)
        if live is None or live.release_id != personal.release_id:
            return _without(plan, f"{WHY} was tuned on {personal.version}, and is not used until it is tuned again")
        version = personal.on(live)
        try:
            await self._hold(personal, version)
        except SartorError as error:
            return _without(plan, f"{WHY} could not be loaded ({error.kind})")
        # it answers in place of a candidate, which is no reason any more
        reasons = [reason for reason in plan.choices[0].reasons if reason.kind is not ReasonKind.CANARY]
        own = Candidate(personal.name, (*reasons, Reason(ReasonKind.PERSONAL, WHY)), version)
        return replace(plan, choices=[own, *plan.choices[place:]])

    async def follow(self) -> None:
        """Take the registry's rows as they are now; let go of what they do not name any more, and forget whom they say."""
        async with self._following:
            await self._follow()

    async def _follow(self) -> None:
        try:
            before = self._people.generation
            now = await asyncio.to_thread(self._book.read)
            gone = await asyncio.to_thread(self._book.forgotten_since, before) if before >= 0 else []
        except SartorError:  # the registry's troubles are told by who reads the agents
            return
        self._people = now
        artifacts = {one.artifact for one in now.known.values()}
        for adapter, (personal, _, _) in list(self._held.items()):
            if personal.artifact not in artifacts:
                self._let_go(adapter)
        if now.generation != before:
            for name in {one.name for one in now.known.values()}:
                self._crew.release(name)
        for person in gone:
            for listener in self.listeners:
                listener(person)
        self._renews |= bool(gone)
        await self._told()

    async def close(self) -> None:
        """Let go of all, and be no server any more."""
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.gather(self._telling, return_exceptions=True)
        for adapter in list(self._held):
            self._let_go(adapter)
        if self._presence is not None:
            self._presence.close()

    async def _hold(self, personal: UserVersion, version: AgentVersion) -> None:
        if version.adapter not in self._held:
            stack = ExitStack()
            stack.enter_context(self._holdings.kept(version))
            self._held[version.adapter] = personal, version, stack
        self._held.move_to_end(version.adapter)
        while len(self._held) > self._most:
            self._let_go(next(iter(self._held)))
        try:
            await self._holdings.hold(version)
        except BaseException:
            self._let_go(version.adapter)
            raise
        if version.adapter not in self._held:  # forgotten, or the longest unused, while it was being loaded
            self._holdings.drop(version)
            raise UnavailableError(f"{personal.name} was let go of while it was loaded", "ask again")

    def _let_go(self, adapter: str) -> None:
        if adapter in self._held:
            _, version, stack = self._held.pop(adapter)
            stack.close()
            self._holdings.drop(version)

    async def _told(self) -> None:
        """Say up to where this server has heard, once nothing that was removed is held by any worker."""
        if self._presence is None:
            try:
                self._presence = await asyncio.to_thread(ServerPresence, self._state)
            except OSError:  # a disk that takes nothing: who forgets somebody is told that nobody has confirmed it
                return
        if self._telling is None or self._telling.done():
            self._telling = asyncio.ensure_future(self._tell(self._presence))

    async def _tell(self, presence: ServerPresence) -> None:
        while presence.generation != self._people.generation:
            generation, renews = self._people.generation, self._renews
            self._renews = False
            while not self._holdings.is_settled:
                await asyncio.sleep(_LOOK_S)
            if renews:
                await self._crew.renew()
            await asyncio.to_thread(presence.hear, generation)


def _without(plan: CandidateList, detail: str) -> CandidateList:
    """Return the plan as it is for everybody, with why the user's own version does not answer."""
    first = plan.choices[0]
    reasons = (*first.reasons, Reason(ReasonKind.PERSONAL_UNUSED, detail))
    return replace(plan, choices=[replace(first, reasons=reasons), *plan.choices[1:]])
