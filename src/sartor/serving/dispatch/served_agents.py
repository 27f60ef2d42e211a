"""Agents of a running server, kept up to date with the registry.

A change takes effect when the adapters that it needs are held. Until then, and if they never are, the former versions
are served. The same holds if a row or the whole registry cannot be read. Each such problem is in `troubles`, which
/health shows.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from sartor.core.errors import InputError, RefusedError, SartorError, UnavailableError
from sartor.core.model_refs import Modality
from sartor.serving.dispatch.adapter_leases import AdapterLeases, Admit
from sartor.serving.dispatch.model_selection import BASE_AGENT
from sartor.serving.dispatch.rollout import Rollouts
from sartor.serving.registry.registry import ChangeCause, Registry, Snapshot
from sartor.serving.registry.registry_schema import Agent, AgentVersion
from sartor.serving.registry.user_versions import SUFFIX
from sartor.serving.team_config import AgentOptions
from sartor.serving.types import Router, WorkerBackend

POLL_S = 1.0
# Interval of a full read: rows may be damaged without a change of generation, and failed loads are tried again
SCRUB_S = 10.0
# Longest wait before a refused version is tried again. The wait doubles each time, since a trial costs a process; a
# change of the registry ends it.
MOST_WAIT_S = 3600.0
# What an admin may do about a frozen trial or watch
FREEZE_REMEDY = "decide: sartor agents promote {name} VERSION, or sartor agents rollback {name}"


class ServedAgents:
    """Agents of a running server.

    agents, versions: state by which requests are answered at this moment.
    troubles: problems by agent or version. generation: of the registry, as last read.
    frozen: version whose trial or watch waits for an admin, by agent.
    """

    def __init__(
        self,
        registry: Registry,
        workers: WorkerBackend,
        leases: AdapterLeases,
        rollouts: Rollouts,
        router: Router | None,
        revoked_ids: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self.registry = registry
        self.agents: dict[str, Agent] = {}
        self.versions: dict[str, AgentVersion] = {}
        # agents without any admitted version: the base does not answer in their names
        self.unadmitted: set[str] = set()
        self.troubles: dict[str, str] = {}
        self.generation = -1
        self.frozen: dict[str, str] = {}
        self._workers = workers
        self._leases = leases
        self._rollouts = rollouts
        self._router = router
        self._reloading = asyncio.Lock()
        self._registry_changed = asyncio.Event()
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._background_tasks: set[asyncio.Task[None]] = set()
        self._learning = asyncio.Lock()
        # None until the router was taught for the first time, also that no agent is live
        self._routed_releases: dict[str, Path] | None = None
        self._router_trouble = ""
        self._refused: dict[str, str] = {}
        # refused version -> (generation, monotonic time of the next try, length of the wait in s)
        self._retries: dict[str, tuple[int, float, float]] = {}
        self._registry_trouble = ""
        # returns the ids of revoked Releases, as this machine knows them now
        self._revoked_ids = revoked_ids
        self._revocation_trouble = ""
        self._read_at = 0.0
        # called after each read of the registry; `settle` waits for them
        self.followers: list[Callable[[], Coroutine[Any, Any, None]]] = []

    async def register(self, members: Mapping[str, AgentOptions], admit: Admit) -> None:
        """Register the agents of TEAM.yaml that are new to the registry.

        An agent that is not admitted becomes a trouble; no error is raised.
        """
        snapshot = await asyncio.to_thread(self.registry.read)
        for name, member in members.items():
            if name in snapshot.damaged or (name in snapshot.agents and not snapshot.agents[name].is_blank):
                continue
            try:
                version = await admit(Path(member.release), name)
                cause = ChangeCause("TEAM.yaml", "not in the registry yet")
                await asyncio.to_thread(self.registry.add, version, fallback=member.fallback, cause=cause)
            except SartorError as error:
                reason = _refusal(error)
                self._refused[name] = reason
                self.agents[name] = Agent(name, "", fallback=member.fallback, note=reason)
                with suppress(SartorError):  # an unwritable registry is reported as a trouble of its own
                    await asyncio.to_thread(self.registry.refuse, name, reason, fallback=member.fallback)

    async def reload(self) -> None:
        """Read the registry and serve the versions whose adapters are held. Missing adapters are fetched in the
        background.

        It never waits for an adapter, so that an admission does not delay a rollback. It raises no error for the
        registry's state.
        """
        async with self._reloading:
            try:
                snapshot = await asyncio.to_thread(self.registry.read)
            except SartorError as error:
                self._registry_trouble = f"{error.problem}; what was read last is served"
                return
            self._registry_trouble, self._read_at = "", time.monotonic()
            await self._drop_revoked(snapshot)
            self._take(snapshot)
            for follower in self.followers:
                self._spawn(follower())

    async def _drop_revoked(self, snapshot: Snapshot) -> None:
        """Let go of the versions whose Releases were revoked since they were admitted; a new load is refused.

        If a list cannot be believed, nothing new is admitted; what is served stays, and /health says so.
        """
        try:
            revoked_ids = await asyncio.to_thread(self._revoked_ids)
        except SartorError as error:
            self._revocation_trouble = f"{error.problem}; nothing is admitted until then"
            return
        self._revocation_trouble = ""
        for version in {**self.versions, **snapshot.versions}.values():
            if version.release_id in revoked_ids and self._leases.holds(version):
                self._leases.drop(version)
        self._leases.revoked_ids = revoked_ids

    async def settle(self) -> None:
        """Return when every fetch has succeeded or failed, and all background tasks are done."""
        while tasks := [*self._fetching.values(), *self._background_tasks]:
            await asyncio.gather(*tasks)

    async def close(self) -> None:
        """Cancel all fetches and background tasks."""
        for task in (tasks := [*self._fetching.values(), *self._background_tasks]):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def keep_fresh(self) -> None:
        """Reload whenever the registry has changed, until cancelled."""
        loop = asyncio.get_running_loop()
        with self.registry.subscribed(lambda: loop.call_soon_threadsafe(self._registry_changed.set)):
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):  # wait_for may lose a cancellation (Python before 3.12)
                        await self._registry_changed.wait()
                self._registry_changed.clear()
                if await self._is_stale():
                    await self.reload()

    def version(self, name: str) -> AgentVersion | None:
        """Return the version with an exact name; None for the base.

        Raises UnavailableError if it cannot answer now.
        """
        if name == BASE_AGENT:
            return None
        version = self.versions.get(name)
        if version is None:
            raise UnavailableError(
                f"{name} cannot answer: its row in the registry is hurt", "sartor agents add RELEASE"
            )
        self._leases.check(version)
        return version

    def reads(self, name: str) -> tuple[Modality, ...]:
        """Return those of `image` and `audio` that an exact version supports; empty for the base."""
        version = self.versions.get(name)
        return tuple(version.facts.get("reads", ())) if version else ()

    def health(self) -> dict[str, Any]:
        """Return the generation, the agents and the troubles, for /health."""
        own_troubles = {
            "registry": self._registry_trouble,
            "router": self._router_trouble,
            "revocations": self._revocation_trouble,
        }
        troubles = {**self.troubles, **{name: problem for name, problem in own_troubles.items() if problem}}
        # troubles of personal versions are private, so they are left out
        troubles |= {name: error.problem for name, error in self._leases.troubles.items() if not name.endswith(SUFFIX)}
        agents = {
            name: {
                "live": agent.live,
                "previous": agent.previous,
                "state": agent.state,
                "rollout": self._rollouts.status(name),
            }
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
        """Serve the registry's agents and fetch the versions that they lack."""
        self.frozen = {name: freeze.version for name, freeze in snapshot.frozen.items()}
        self._rollouts.keep_frozen({name: freeze.reason for name, freeze in snapshot.frozen.items()})
        troubles = dict(snapshot.damaged)
        for name, freeze in snapshot.frozen.items():
            troubles[f"{name}@{freeze.version}"] = f"frozen: {freeze.reason}; {FREEZE_REMEDY.format(name=name)}"
        for name in set(self.agents) - set(snapshot.agents) - set(snapshot.damaged):
            troubles[name] = self._refused.get(name, "its row is gone from the registry")
        # a version whose row is damaged keeps its former content
        self.versions = {
            **{name: self.versions[name] for name in snapshot.damaged if name in self.versions},
            **snapshot.versions,
        }
        for agent in snapshot.agents.values():
            self._refused.pop(agent.name, None)
            if agent.state == "removed":
                self.agents.pop(agent.name, None)
                self._rollouts.forget(agent.name)
            else:
                self._serve(agent)
        for name in snapshot.damaged:
            if "@" not in name and name not in self.agents:
                self.agents[name] = Agent(name, "", note=snapshot.damaged[name])
        admitted = {version.agent for version in self.versions.values() if self._leases.was_admitted(version)}
        self.unadmitted = set(self.agents) - admitted
        for name in self.unadmitted:
            self.agents[name] = replace(self.agents[name], fallback=())
            if self.agents[name].note:
                troubles.setdefault(name, self.agents[name].note)
        self.troubles, self.generation = troubles, snapshot.generation
        present_agents = [agent for agent in snapshot.agents.values() if agent.state != "removed"]
        needed = {version.name: version for version in self._needed([*present_agents, *self.agents.values()])}
        self._leases.want(list(needed.values()))
        for name, version in needed.items():
            if not (self._leases.holds(version) or name in self._fetching or self._is_for_later(name)):
                self._fetching[name] = asyncio.ensure_future(self._fetch(version))
        self._teach()

    def _serve(self, agent: Agent) -> None:
        """Serve an agent as in the registry. While its live version is not held, the former live version is kept."""
        previous = self.agents.get(agent.name)
        live = self.versions.get(f"{agent.name}@{agent.live}")
        if previous is not None and previous.live and (live is None or not self._leases.holds(live)):
            # the other changes take effect
            agent = replace(agent, live=previous.live, earlier=previous.earlier)
        self.agents[agent.name] = agent
        if previous is None or agent.generation != previous.generation or agent.live != previous.live:
            self._rollouts.follow(agent, previous)
            if previous is not None and agent.candidate == previous.candidate:
                self._workers.release(f"{agent.name}@{agent.live}")  # promoted or rolled back, perhaps to itself

    async def _fetch(self, version: AgentVersion) -> None:
        """Hold a version, then serve the agents that wait for it. Errors are in the troubles of `AdapterLeases`."""
        is_held = False
        try:
            await self._leases.hold(version)
            is_held = True
            self._retries.pop(version.name, None)
            if version.agent in self.unadmitted:
                await self._note(version.agent, "")
        except (RefusedError, InputError) as error:
            wait_s = min(MOST_WAIT_S, 2 * self._retries.get(version.name, (0, 0.0, SCRUB_S))[2])
            self._retries[version.name] = (self.generation, time.monotonic() + wait_s, wait_s)
            if version.agent in self.unadmitted:
                await self._note(version.agent, _refusal(error))
        except SartorError:
            pass  # in the troubles of `AdapterLeases`; tried again later
        finally:
            self._fetching.pop(version.name, None)
        if is_held:
            await self.reload()
        else:
            self._teach()

    def _is_for_later(self, name: str) -> bool:
        generation, retry_at, _ = self._retries.get(name, (-1, 0.0, 0.0))
        return generation == self.generation and time.monotonic() < retry_at

    async def _note(self, name: str, reason: str) -> None:
        """Record why an agent was not admitted, for `sartor agents list`."""
        if self.agents[name].note != reason:
            with suppress(SartorError):
                await asyncio.to_thread(self.registry.note, name, reason, cause=ChangeCause("server", "admission"))

    def _needed(self, agents: Iterable[Agent]) -> Iterator[AgentVersion]:
        for agent in agents:
            for version in agent.versions:
                if agent_version := self.versions.get(f"{agent.name}@{version}"):
                    yield agent_version

    def _teach(self) -> None:
        """Teach the router the live Releases if they have changed.

        It waits until no version is being fetched, since a fit takes seconds and a team starts with several agents.
        One
        fit runs at a time, with the newest Releases last.
        """
        if self._fetching:
            return
        live = {name: self.versions.get(f"{name}@{agent.live}") for name, agent in self.agents.items()}
        releases = {
            name: self._leases.directories[version.release_id]
            for name, version in live.items()
            if version and self._leases.holds(version)
        }
        if self._router is not None and releases != self._routed_releases:
            self._routed_releases = releases
            self._spawn(self._learn(self._router, releases))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background_tasks.add(task)
        task.add_done_callback(self._background_tasks.discard)

    async def _learn(self, router: Router, releases: Mapping[str, Path]) -> None:
        async with self._learning:
            if releases is self._routed_releases:
                try:
                    await router.learn(releases)
                    self._router_trouble = ""
                except SartorError as error:
                    self._router_trouble = error.problem


def _refusal(error: SartorError) -> str:
    return f"not admitted: {error.problem}; try: {error.remedy}"
