"""Verb `serve`: builds all services from TEAM.yaml."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from sartor.serving.admission import admission, release_copies
from sartor.serving.admission.admission import AdmissionContext, admit_personal, version_of
from sartor.serving.api_keys import ApiKeyStore
from sartor.serving.dispatch.adapter_leases import Admit
from sartor.serving.dispatch.agent_admin import AgentAdmin
from sartor.serving.dispatch.dispatcher import Dispatcher
from sartor.serving.http.request_log import RequestLog
from sartor.serving.http.server import HttpServer, asks_for_key, bind, check_bind
from sartor.serving.http.services import Services, UserDirectory
from sartor.serving.http.speech_service import SpeechService
from sartor.serving.plans.plan_dispatch import PlanDispatcher
from sartor.serving.plans.plan_log import PlanLog
from sartor.serving.rate_limits import RateLimiter
from sartor.serving.receipts import ReceiptLog, team_digest
from sartor.serving.registry.registry import Registry
from sartor.serving.registry.registry_schema import AgentVersion
from sartor.serving.registry.user_versions import is_personal, user_digest
from sartor.serving.routing.router import AutoRouter
from sartor.serving.team_config import Team, load
from sartor.serving.tool_loop import ToolCallingAgent, ToolServers
from sartor.serving.workers.supervisor import Supervisor

Ready = Callable[[Mapping[str, Any]], object]
# Called for each stage of the start with an event and its fields, like `RequestLog.say`
Tell = Callable[..., object]


def serve(
    team: Team | Path | str,
    flags: Sequence[str] = (),
    *,
    mounts: Mapping[str, ASGIApp] | None = None,
    ready: Ready = lambda facts: None,
) -> None:
    """Serve a team until SIGTERM or Ctrl-C.

    The signal is raised again when the running replies have ended. An agent that cannot be admitted is no error;
    /health
    names it.
    mounts: applications by the path below which they answer, such as the studio's; each guards itself.
    ready: called with `address`, `base`, `engine`, `agents` and `keys` (whether requests need a key) once the server
    answers.
    Raises ConfigError for the team's file and an address that cannot be bound, ExtraError, and the error of a worker
    that cannot start.
    """
    asyncio.run(_serve(team if isinstance(team, Team) else load(Path(team), flags), mounts, ready))


async def _serve(team: Team, mounts: Mapping[str, ASGIApp] | None, ready: Ready) -> None:
    with closing(RequestLog(sys.stderr)) as log:
        async with build_services(team, log.say) as services:
            server = HttpServer(services, team, log=log, mounts=mounts)
            names = [agent.name for agent in await services.agent_admin.listed() if agent.is_ready]
            about = services.workers.about
            facts = {
                "base": about.base,
                "engine": about.kind,
                "agents": names,
                "keys": asks_for_key(services.authenticator),
            }
            await server.serve(bind(team), lambda address: ready({"address": address, **facts}))


@asynccontextmanager
async def build_services(team: Team, tell: Tell = lambda event, **fields: None) -> AsyncIterator[Services]:
    """Open the registry, the workers and the agents, and close them with the context.

    Most configuration errors are raised before the workers start, which takes longest.
    """
    async with AsyncExitStack() as stack:
        # private mode: the directory holds digests of keys, and receipts
        Path(team.state).mkdir(mode=0o700, parents=True, exist_ok=True)
        registry = await asyncio.to_thread(Registry.of, team)
        stack.callback(registry.close)
        authenticator = ApiKeyStore(registry.database, state=Path(team.state))
        await asyncio.to_thread(check_bind, authenticator, team.http)
        bind(team).close()
        speech = SpeechService(team.speech)
        stack.push_async_callback(speech.close)
        tell("opening the base", base=team.base, engine=team.engine.kind, workers=team.workers.count)
        workers = Supervisor(team)
        await workers.start()
        stack.push_async_callback(workers.close)
        receipts = await asyncio.to_thread(ReceiptLog.of, team, lambda: workers.about)
        stack.callback(receipts.close)
        release_copies.sweep(Path(team.state))
        admit = _admission(team, workers)
        router = AutoRouter(
            workers, team.router, state=Path(team.state), engine=workers.about.kind, dtype=workers.about.dtype
        )
        stack.push_async_callback(router.close)
        dispatcher = Dispatcher(
            team, workers, registry, _announced(admit, Path(team.state), tell), router=router, receipts=receipts
        )
        await dispatcher.start()
        tell(
            "agents open",
            served=[name for name in dispatcher.served.agents if name not in dispatcher.served.unadmitted],
        )
        stack.push_async_callback(dispatcher.close)
        tool_servers = ToolServers(team)
        stack.push_async_callback(tool_servers.close)
        await tool_servers.start()
        dispatcher.team_tools = tool_servers.declared
        tool_agent = ToolCallingAgent(dispatcher, tool_servers, team)
        plan_log = PlanLog.of(team, lambda: workers.about)
        dispatcher.user_versions.listeners += [receipts.erased.add, plan_log.erased.add]
        plans = PlanDispatcher(
            team,
            tool_agent,
            plan_log,
            receipts=receipts,
            known=lambda: dispatcher.served.agents,
        )
        stack.push_async_callback(plans.close)
        yield Services(
            replies=plans,
            workers=workers,
            authenticator=authenticator,
            rates=RateLimiter(team.limits),
            agent_admin=AgentAdmin(dispatcher, workers, admit, team.rollout),
            receipts=receipts,
            troubles=lambda: {
                **authenticator.troubles(),
                **dispatcher.health()["troubles"],
                **router.troubles,
                **plans.troubles,
                **tool_servers.troubles,
                **tool_agent.troubles,
            },
            receipts_lost=lambda: receipts.lost,
            speech=speech,
            people=UserDirectory(
                partial(user_digest, digest=team_digest(Path(team.state))), dispatcher.user_versions.listeners
            ),
            plans=plans.listed,
            frozen_rollouts=lambda: dispatcher.served.frozen,
        )


def _admission(team: Team, workers: Supervisor) -> Admit:
    """Return the admission function for the engine of these workers.

    The context of the admission is read when the first Release arrives.
    """

    async def admit(release: Path, agent: str) -> AgentVersion:
        context = await asyncio.to_thread(AdmissionContext.of, team, workers.about)
        if is_personal(release, context.state):
            return await asyncio.to_thread(admit_personal, release, agent, context)
        return version_of(await admission.admit(release, context, workers.probe, agent), agent)

    return admit


def _announced(admit: Admit, state: Path, tell: Tell) -> Admit:
    """Return `admit` with a log line for the first attempt of each Release.

    A refused Release is retried every few seconds.
    """
    announced: set[tuple[Path, str]] = set()

    async def admitting(release: Path, agent: str) -> AgentVersion:
        if is_personal(release, state):  # the log names no user, and these are not agents of the team
            return await admit(release, agent)
        if (release, agent) not in announced:
            announced.add((release, agent))
            tell("admitting", agent=agent)
        return await admit(release, agent)

    return admitting
