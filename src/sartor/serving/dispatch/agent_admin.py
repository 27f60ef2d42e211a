"""Admin operations on running agents."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from sartor.core.errors import ArtifactError, SartorError, UnavailableError
from sartor.serving.dispatch.adapter_leases import Admit
from sartor.serving.dispatch.dispatcher import Dispatcher
from sartor.serving.registry.registry import ChangeCause
from sartor.serving.registry.registry_schema import Agent, AgentVersion
from sartor.serving.team_config import Rollout
from sartor.serving.types import AgentListing, WorkerBackend

ADMIN = ChangeCause("admin", "over HTTP")


class AgentAdmin:
    """Listing and administration of the agents of a running dispatcher.

    A change has taken effect in this server when its method returns.
    """

    def __init__(self, dispatcher: Dispatcher, workers: WorkerBackend, admit: Admit, rules: Rollout) -> None:
        self._dispatcher = dispatcher
        self._served = dispatcher.served
        self._workers = workers
        self._admit = admit
        self._rules = rules

    async def listed(self) -> Sequence[AgentListing]:
        """Return every agent."""
        health, unadmitted = self._served.health()["agents"], self._served.unadmitted
        listings = []
        for name, agent in self._served.agents.items():
            listing = AgentListing(
                name,
                live=agent.live,
                versions=agent.versions,
                state={**health[name], "note": agent.note},
                is_ready=name not in unadmitted,
                reads={version: self._served.reads(f"{name}@{version}") for version in agent.versions},
            )
            listings.append(listing)
        return listings

    async def promote(self, name: str, release: str, version: str, expected: str | None) -> Mapping[str, Any]:
        """Make a Release or a registered version live, or put it on trial if TEAM.yaml demands that.

        A version that is already on trial becomes live. Its adapter is loaded before the change is made.
        release: directory; "" if `version` is given. expected: version that must be live now; None for any.
        Raises ConflictError, AdmissionError, UnknownAgentError, ModelError.
        """
        registry = self._served.registry
        if release:
            admitted = await self._admitted(Path(release), name)
            await _change_registry(registry.add, admitted, cause=ADMIN)
            version = admitted.version
            await self._served.reload()  # makes the version known here
        rules, leases = self._rules, self._dispatcher.leases
        bring_in = partial(registry.bring_in, canary=rules.canary_fraction, shadow=rules.shadow_fraction)
        with ExitStack() as stack:
            if target := self._served.versions.get(f"{name}@{version}"):
                stack.enter_context(leases.pinned(target))
                await leases.hold(target)
            return await self._applied(await _change_registry(bring_in, name, version, expected=expected, cause=ADMIN))

    async def rollback(self, name: str, expected: str | None) -> Mapping[str, Any]:
        """End a trial, or else make the previous version live again. Raises ConflictError, UnknownAgentError."""
        return await self._applied(
            await _change_registry(self._served.registry.rollback, name, expected=expected, cause=ADMIN)
        )

    async def drain(self, name: str) -> Mapping[str, Any]:
        """Take an agent out of service: running replies end, new requests are refused. Raises UnknownAgentError."""
        return await self._applied(await _change_registry(self._served.registry.drain, name, cause=ADMIN))

    async def release(self, name: str) -> Mapping[str, Any]:
        """Return an agent to service after quarantine or drain. Raises UnknownAgentError."""
        registry = self._served.registry
        agent = self._served.agents.get(name)
        if agent is None or agent.state == "draining":
            live = agent.live if agent else ""
            agent = await _change_registry(registry.promote, name, live, expected=live, cause=ADMIN)
        for version in agent.versions:
            self._workers.release(f"{name}@{version}")
        return await self._applied(agent)

    async def hear(self, agent: str, rating: float, key: str = "") -> None:
        """Pass a user's rating of a reply by this exact version to the monitors: -1 bad to 1 good.

        key: id of the API key that rates.
        """
        self._dispatcher.hear(agent, rating, key)

    async def _admitted(self, release: Path, name: str) -> AgentVersion:
        """Admit a Release whose path a client sent. Every path without one gets the same answer.

        So nobody learns by it which other files this machine has. Raises what the admission raises.
        """
        try:
            return await self._admit(release, name)
        except SartorError:
            if await asyncio.to_thread(os.path.isfile, release / "release.json"):
                raise
            raise ArtifactError(
                f"there is no Release at {str(release)[:200]!a} that this server can read",
                "the path of a directory with release.json on the server's machine; or name a registered version",
            ) from None

    async def _applied(self, agent: Agent) -> Mapping[str, Any]:
        await self._served.reload()
        return agent.as_json()


async def _change_registry(change: Callable[..., Agent], *arguments: Any, **options: Any) -> Agent:
    """Change the registry in a thread.

    Raises UnavailableError for a damaged row or file of the registry, since the named Release is not at fault.
    """
    try:
        return await asyncio.to_thread(change, *arguments, **options)
    except ArtifactError as error:
        raise UnavailableError(f"nothing was changed: {error.problem}", error.remedy) from None
