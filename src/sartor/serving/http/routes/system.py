"""Health, metrics, MCP mount and A2A card.

A card only: no task of A2A's own bindings is taken here, and `supportedInterfaces` names none of them. Its
`protocolBinding` is an open text by that specification.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from sartor.serving.http.app import JsonResponse, StrictJsonRoute, body_of
from sartor.serving.http.app_state import agent_of, get_record, get_state
from sartor.serving.http.mcp_server import ABOUT_AUTO, McpServer, ToolDescription, abilities, abouts
from sartor.serving.http.request_body import parse
from sartor.serving.http.response_models import HealthAnswer
from sartor.serving.http.services import ANYBODY
from sartor.serving.team_config import Team

router = APIRouter(route_class=StrictJsonRoute)
READY = "ready"
_UNHEALTHY: dict[int | str, dict[str, Any]] = {
    200: {"model": HealthAnswer, "description": "Requests can be answered"},
    503: {"model": HealthAnswer, "description": "Nobody can be answered"},
}


@router.get("/health", responses=_UNHEALTHY)
async def health(request: Request) -> JsonResponse:
    """200 while any agent can be answered. Needs no key; with one, it also tells of the agents that the key opens.

    503 too where the server had keys and they are gone, or its registry has been lost for a minute: `troubles` says
    so.
    """
    principal = get_record(request).principal
    worker_health = get_state(request).services.workers.health()
    workers = [
        {name: worker[name] for name in ("state", "role", "memory_bytes", "restarts")}
        for worker in worker_health["workers"]
    ]
    ready = sum(worker["state"] == READY for worker in workers)
    agents = {
        name: {key: agent[key] for key in ("breaker", "why", "queued", "live")}
        for name, agent in worker_health["agents"].items()
        if principal.opens(agent_of(name))
    }
    all_troubles = get_state(request).services.troubles()
    troubles = {name: problem for name, problem in all_troubles.items() if principal.opens(agent_of(name))}
    all_well = (
        not all_troubles
        and ready == len(workers)
        and all(agent["breaker"] == "closed" for agent in worker_health["agents"].values())
    )
    if (lockout := request.scope["state"].get("shut")) is not None:
        troubles["API keys"] = f"{lockout.problem}; try: {lockout.remedy}"
    can_answer = ready > 0 and lockout is None
    status = "unavailable" if not can_answer else "ok" if all_well else "degraded"
    body = {"status": status, "workers": workers, "agents": agents, "troubles": troubles}
    return JsonResponse(body, 200 if can_answer else 503)


@router.get(
    "/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Numbers"}}
)
async def metrics(request: Request) -> Response:
    """All numbers in Prometheus' text format. With keys set it takes the admin's, or one that opens every agent."""
    return Response(get_state(request).metrics.page(), media_type=CONTENT_TYPE_LATEST)


TEXT = ["text/plain"]
A2A_VERSION = "1.0"


def agent_card_router(team: Team) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=StrictJsonRoute, include_in_schema=False)
    about_texts = abouts(team)

    @router.get("/.well-known/agent-card.json")
    async def card(request: Request) -> JsonResponse:
        """The card; its skills are the agents that the key opens, and without one the team alone."""
        state, principal = get_state(request), get_record(request).principal
        descriptions = await abilities(state, principal, about_texts)
        url = (team.a2a.url or str(request.base_url)).rstrip("/")
        return JsonResponse(_card(team, url, state.fingerprint(), descriptions, needs_key=principal != ANYBODY))

    return router


def _card(
    team: Team, url: str, version: str, descriptions: list[ToolDescription], *, needs_key: bool
) -> dict[str, Any]:
    bindings = [("MCP", "/mcp")] if team.mcp.serve else []
    paths = [*bindings, ("OPENAI", "/v1/chat/completions")]
    card: dict[str, Any] = {
        "name": "Sartor",
        "description": "A team of agents on one base model.",
        "version": version,
        "supportedInterfaces": [
            {"url": url + path, "protocolBinding": binding, "protocolVersion": A2A_VERSION} for binding, path in paths
        ],
        "capabilities": {"streaming": True, "pushNotifications": False, "extendedAgentCard": False},
        "defaultInputModes": TEXT,
        "defaultOutputModes": TEXT,
        "skills": [_skill(description) for description in (ToolDescription("auto", "", ABOUT_AUTO), *descriptions)],
    }
    if needs_key:
        card["securitySchemes"] = {"key": {"httpAuthSecurityScheme": {"scheme": "Bearer"}}}
        card["securityRequirements"] = [{"schemes": {"key": {"list": []}}}]
    return card


def _skill(description: ToolDescription) -> dict[str, Any]:
    return {
        "id": description.name,
        "name": description.name,
        "description": description.about,
        "tags": [description.name],
    }


def mcp_router(tools: McpServer) -> APIRouter:
    """The two routes. Not in the OpenAPI: MCP says itself what it takes."""
    router = APIRouter(route_class=StrictJsonRoute, include_in_schema=False)

    @router.post("/mcp")
    async def team(request: Request) -> Response:
        """All that the key opens."""
        body = bytes(await body_of(request))
        parse(body)
        return tools.response_to(body)

    @router.post("/mcp/{agent}")
    async def alone(agent: str, request: Request) -> Response:
        """One agent alone."""
        await get_state(request).check_model(agent, get_record(request).principal)
        return await team(request)

    return router
