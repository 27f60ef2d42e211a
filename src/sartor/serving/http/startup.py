"""Verb serve: builds all services from TEAM.yaml."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

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
# Told each stage of the opening, as Journal.say is: an event and its fields
Tell = Callable[..., object]


def serve(team: Team | Path | str, flags: Sequence[str] = (), *, ready: Ready = lambda said: None) -> None:
    """Serve a team until SIGTERM or Ctrl-C, which is raised again when running replies have ended.

    ready: told `address`, `base`, `engine`, `agents` and `keys` (whether any are set) once it answers. Raises ConfigError for
    what the file says and where it cannot listen, ExtraError, and what the first worker told; an agent that cannot be admitted
    is no error: /health names it.
    """
    asyncio.run(_serve(team if isinstance(team, Team) else load(Path(team), flags), ready))


async def _serve(team: Team, ready: Ready) -> None:
    journal = RequestLog(sys.stderr)
    try:
        await _open_and_serve(team, ready, journal)
    finally:
        journal.close()


async def _open_and_serve(team: Team, ready: Ready, journal: RequestLog) -> None:
    async with build_services(team, journal.say) as house:
        server = HttpServer(house, team, journal=journal)
        names = [agent.name for agent in await house.roster.listed() if agent.is_ready]
        about = house.crew.about
        facts = {"base": about.base, "engine": about.kind, "agents": names, "keys": asks_for_key(house.doors)}
        await server.serve(bind(team), lambda address: ready({"address": address, **facts}))


@asynccontextmanager
async def build_services(team: Team, tell: Tell = lambda event, **fields: None) -> AsyncIterator[Services]:
    """Registry, workers, agents. What cannot be is found before the workers, which take longest, are started."""
    async with AsyncExitStack() as stack:
        # digests of keys and receipts lie in it
        Path(team.state).mkdir(mode=0o700, parents=True, exist_ok=True)
        registry = await asyncio.to_thread(Registry.open, team.registry_url)
        stack.callback(registry.close)
        doors = ApiKeyStore(registry.database, state=Path(team.state))
        await asyncio.to_thread(check_bind, doors, team.http)
        bind(team).close()
        speech = SpeechService(team.speech)
        stack.push_async_callback(speech.close)
        tell("opening the base", base=team.base, engine=team.engine.kind, workers=team.workers.count)
        crew = Supervisor(team)
        await crew.start()
        stack.push_async_callback(crew.close)
        book = await asyncio.to_thread(ReceiptLog.of, team, lambda: crew.about)
        stack.callback(book.close)
        release_copies.sweep(Path(team.state))
        admit = _admission(team, crew)
        router = AutoRouter(crew, team.router, Path(team.state), crew.about.kind, crew.about.dtype)
        stack.push_async_callback(router.close)
        dispatch = Dispatcher(team, crew, registry, _told(admit, Path(team.state), tell), router=router, receipts=book)
        await dispatch.start()
        tell("agents open", served=[name for name in dispatch.served.agents if name not in dispatch.served.unadmitted])
        stack.push_async_callback(dispatch.close)
        box = ToolServers(team)
        stack.push_async_callback(box.close)
        await box.start()
        dispatch.offers = box.declared
        tooled = ToolCallingAgent(dispatch, box, team)
        plans = PlanDispatcher(
            team, tooled, PlanLog.of(team, lambda: crew.about), receipts=book, known=lambda: dispatch.served.agents
        )
        stack.push_async_callback(plans.close)
        yield Services(
            replies=plans,
            crew=crew,
            doors=doors,
            rates=RateLimiter(team.limits),
            roster=AgentAdmin(dispatch, crew, admit, team.rollout),
            receipts=book,
            troubles=lambda: {
                **doors.troubles(),
                **dispatch.health()["troubles"],
                **router.troubles,
                **plans.troubles,
                **box.troubles,
                **tooled.troubles,
            },
            receipts_lost=lambda: book.lost,
            speech=speech,
            people=UserDirectory(partial(user_digest, digest=team_digest(Path(team.state))), dispatch.persons.listeners),
            plans=plans.listed,
        )


def _admission(team: Team, crew: Supervisor) -> Admit:
    """Admission on the ground of this crew's engine, which is looked for when the first Release comes."""

    async def admit(release: Path, agent: str) -> AgentVersion:
        ground = await asyncio.to_thread(AdmissionContext.of, team, crew.about)
        if is_personal(release, ground.state):
            return await asyncio.to_thread(admit_personal, release, agent, ground)
        return version_of(await admission.admit(release, ground, crew.probe), agent)

    return admit


def _told(admit: Admit, state: Path, tell: Tell) -> Admit:
    """The same, which tells of each Release the first time: what is refused is tried again every few seconds."""
    known: set[tuple[Path, str]] = set()

    async def admitting(release: Path, agent: str) -> AgentVersion:
        if is_personal(release, state):  # nobody's name, and none of the team's agents
            return await admit(release, agent)
        if (release, agent) not in known:
            known.add((release, agent))
            tell("admitting", agent=agent)
        return await admit(release, agent)

    return admitting
