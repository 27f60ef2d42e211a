"""Agents of a running server, kept fresh.

A change takes effect when the adapters that it needs are held; until then, and if they never are, what was served goes on.
The same holds where a row, or the whole registry, cannot be read. Each such thing is in `troubles`, which /health shows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sartor.core.errors import InputError, RefusedError, SartorError, UnavailableError
from sartor.serving.dispatch.adapter_leases import AdapterLeases, Admit
from sartor.serving.dispatch.model_selection import BASE_AGENT
from sartor.serving.dispatch.rollout import Rollouts
from sartor.serving.registry.registry import ChangeCause, Registry, Snapshot
from sartor.serving.registry.registry_schema import Agent, AgentVersion
from sartor.serving.registry.user_versions import SUFFIX
from sartor.serving.team_config import AgentOptions
from sartor.serving.types import Router, WorkerBackend

POLL_S = 1.0
# Rows may be hurt without a change, and what could not be loaded may be there now
SCRUB_S = 10.0
# What was refused is tried again after a change, and else ever more rarely: each time costs a process of its own
MOST_WAIT_S = 3600.0


class ServedAgents:
    """The agents of a running server. `agents` and `versions` are what requests are answered by, at this moment."""

    def __init__(
        self, registry: Registry, crew: WorkerBackend, holdings: AdapterLeases, rollouts: Rollouts, router: Router | None
    ) -> None:
        self.registry = registry
        self.agents: dict[str, Agent] = {}
        self.versions: dict[str, AgentVersion] = {}
        # agents of which no version ever was admitted: the base does not answer in their names
        self.unadmitted: set[str] = set()
        self.troubles: dict[str, str] = {}
        self.generation = -1
        self._crew = crew
        self._holdings = holdings
        self._rollouts = rollouts
        self._router = router
        self._reloading = asyncio.Lock()
        self._news = asyncio.Event()
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._teaching: set[asyncio.Task[None]] = set()
        self._learning = asyncio.Lock()
        self._routed: dict[str, Path] = {}
        self._untaught = ""
        self._refused: dict[str, str] = {}
        # version that was refused -> in which generation, when it is tried again, after how long a wait
        self._later: dict[str, tuple[int, float, float]] = {}
        self._unread = ""
        self._read_at = 0.0
        # told after each reading of the registry; `settle` waits for them
        self.followers: list[Callable[[], Coroutine[Any, Any, None]]] = []

    async def register(self, members: Mapping[str, AgentOptions], admit: Admit) -> None:
        """Register the members of TEAM.yaml that are new to the registry. One that is not admitted is a trouble, no error."""
        known = await asyncio.to_thread(self.registry.read)
        for name, member in members.items():
            if name in known.hurt or (name in known.agents and not known.agents[name].is_blank):
                continue
            try:
                version = await admit(Path(member.release), name)
                cause = ChangeCause("TEAM.yaml", "not in the registry yet")
                await asyncio.to_thread(self.registry.add, version, fallback=member.fallback, cause=cause)
            except SartorError as error:
                why = _refusal(error)
                self._refused[name] = why
                self.agents[name] = Agent(name, "", fallback=member.fallback, note=why)
                with suppress(SartorError):  # a registry that cannot be written to is a trouble of its own
                    await asyncio.to_thread(self.registry.refuse, name, why, fallback=member.fallback)

    async def reload(self) -> None:
        """Serve what the registry has now, as far as its adapters are held; the others are fetched, and served then.

        Never waits for an adapter, so that a rollback is not kept up by an admission. Never raises for what it finds.
        """
        async with self._reloading:
            try:
                snapshot = await asyncio.to_thread(self.registry.read)
            except SartorError as error:
                self._unread = f"{error.problem}; what was read last is served"
                return
            self._unread, self._read_at = "", time.monotonic()
            self._take(snapshot)
            for follower in self.followers:
                self._spawn(follower())

    async def settle(self) -> None:
        """Wait until everything is fetched, or found not to be had, and is served."""
        while tasks := [*self._fetching.values(), *self._teaching]:
            await asyncio.gather(*tasks)

    async def close(self) -> None:
        """Fetch and teach nothing more."""
        for task in (tasks := [*self._fetching.values(), *self._teaching]):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def keep_fresh(self) -> None:
        """Reload whenever the registry has changed, until cancelled."""
        loop = asyncio.get_running_loop()
        with self.registry.heard(lambda: loop.call_soon_threadsafe(self._news.set)):
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):  # wait_for may lose a cancellation (Python before 3.12)
                        await self._news.wait()
                self._news.clear()
                if await self._is_stale():
                    await self.reload()

    def version(self, name: str) -> AgentVersion | None:
        """The version of an exact name, None for the base. Raises UnavailableError where it cannot answer now."""
        if name == BASE_AGENT:
            return None
        version = self.versions.get(name)
        if version is None:
            raise UnavailableError(f"{name} cannot answer: its row in the registry is hurt", "sartor agents add RELEASE")
        self._holdings.check(version)
        return version

    def reads(self, name: str) -> tuple[str, ...]:
        """Of `image` and `audio`, those that an exact version reads beside text; the base reads text alone."""
        version = self.versions.get(name)
        return tuple(version.facts.get("reads", ())) if version else ()

    def health(self) -> dict[str, Any]:
        """For /health: the generation that is served, agents, and what is wrong."""
        own = {"registry": self._unread, "router": self._untaught}
        troubles = {**self.troubles, **{name: why for name, why in own.items() if why}}
        # what is wrong with a person's own is that person's to hear
        troubles |= {name: error.problem for name, error in self._holdings.troubles.items() if not name.endswith(SUFFIX)}
        agents = {
            name: {"live": agent.live, "previous": agent.previous, "state": agent.state, "rollout": self._rollouts.status(name)}
            for name, agent in self.agents.items()
        }
        return {"generation": self.generation, "agents": agents, "troubles": troubles}

    async def _is_stale(self) -> bool:
        if time.monotonic() - self._read_at > SCRUB_S:
            return True
        try:
            return await asyncio.to_thread(self.registry.generation) != self.generation
        except SartorError:
            return True

    def _take(self, snapshot: Snapshot) -> None:
        """Serve the registry's agents, and fetch what they lack."""
        troubles = dict(snapshot.hurt)
        for name in set(self.agents) - set(snapshot.agents) - set(snapshot.hurt):
            troubles[name] = self._refused.get(name, "its row is gone from the registry")
        # a version whose row is hurt keeps the meaning that it had
        self.versions = {**{name: self.versions[name] for name in snapshot.hurt if name in self.versions}, **snapshot.versions}
        for agent in snapshot.agents.values():
            self._refused.pop(agent.name, None)
            if agent.state == "removed":
                self.agents.pop(agent.name, None)
                self._rollouts.forget(agent.name)
            else:
                self._serve(agent)
        for name in snapshot.hurt:
            if "@" not in name and name not in self.agents:
                self.agents[name] = Agent(name, "", note=snapshot.hurt[name])
        admitted = {version.agent for version in self.versions.values() if self._holdings.was_admitted(version)}
        self.unadmitted = set(self.agents) - admitted
        for name in self.unadmitted:
            self.agents[name] = replace(self.agents[name], fallback=())
            if self.agents[name].note:
                troubles.setdefault(name, self.agents[name].note)
        self.troubles, self.generation = troubles, snapshot.generation
        asked = [agent for agent in snapshot.agents.values() if agent.state != "removed"]
        needed = {version.name: version for version in self._needed([*asked, *self.agents.values()])}
        self._holdings.want(list(needed.values()))
        for name, version in needed.items():
            if not (self._holdings.holds(version) or name in self._fetching or self._is_for_later(name)):
                self._fetching[name] = asyncio.ensure_future(self._fetch(version))
        self._teach()

    def _serve(self, agent: Agent) -> None:
        """Serve an agent as the registry has it; while its live version is not held, the one that answered goes on."""
        was = self.agents.get(agent.name)
        live = self.versions.get(f"{agent.name}@{agent.live}")
        if was is not None and was.live and (live is None or not self._holdings.holds(live)):
            # what else has changed, holds
            agent = replace(agent, live=was.live, earlier=was.earlier)
        self.agents[agent.name] = agent
        if was is None or agent.generation != was.generation or agent.live != was.live:
            self._rollouts.follow(agent, was)
            if was is not None and agent.candidate == was.candidate:
                self._crew.release(f"{agent.name}@{agent.live}")  # promoted or rolled back, perhaps to itself

    async def _fetch(self, version: AgentVersion) -> None:
        """Hold a version, and serve whoever waited for it. What keeps it from that is among the troubles of holdings."""
        is_held = False
        try:
            await self._holdings.hold(version)
            is_held = True
            self._later.pop(version.name, None)
            if version.agent in self.unadmitted:
                await self._note(version.agent, "")
        except (RefusedError, InputError) as error:
            wait_s = min(MOST_WAIT_S, 2 * self._later.get(version.name, (0, 0.0, SCRUB_S))[2])
            self._later[version.name] = (self.generation, time.monotonic() + wait_s, wait_s)
            if version.agent in self.unadmitted:
                await self._note(version.agent, _refusal(error))
        except SartorError:
            pass  # among the troubles, and tried again
        finally:
            self._fetching.pop(version.name, None)
        if is_held:
            await self.reload()
        else:
            self._teach()

    def _is_for_later(self, name: str) -> bool:
        generation, at, _ = self._later.get(name, (-1, 0.0, 0.0))
        return generation == self.generation and time.monotonic() < at

    async def _note(self, name: str, why: str) -> None:
        """Keep beside an agent why it was not admitted, for `sartor agents list`."""
        if self.agents[name].note != why:
            with suppress(SartorError):
                await asyncio.to_thread(self.registry.note, name, why, cause=ChangeCause("server", "admission"))

    def _needed(self, agents: Iterable[Agent]) -> Iterator[AgentVersion]:
        for agent in agents:
            for version in agent.versions:
                if found := self.versions.get(f"{agent.name}@{version}"):
                    yield found

    def _teach(self) -> None:
        """Tell the router which Releases are live, when that has changed: once at a time, the newest last.

        While versions are being fetched it waits for the last of them: a fit takes seconds, and a team starts with several.
        """
        if self._fetching:
            return
        live = {name: self.versions.get(f"{name}@{agent.live}") for name, agent in self.agents.items()}
        releases = {
            name: self._holdings.places[version.release_id]
            for name, version in live.items()
            if version and self._holdings.holds(version)
        }
        if self._router is not None and releases != self._routed:
            self._routed = releases
            self._spawn(self._learn(self._router, releases))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._teaching.add(task)
        task.add_done_callback(self._teaching.discard)

    async def _learn(self, router: Router, releases: Mapping[str, Path]) -> None:
        async with self._learning:
            if releases is self._routed:
                try:
                    await router.learn(releases)
                    self._untaught = ""
                except SartorError as error:
                    self._untaught = error.problem


def _refusal(error: SartorError) -> str:
    return f"not admitted: {error.problem}; try: {error.remedy}"
