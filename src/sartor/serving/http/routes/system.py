"""Health, metrics, MCP mount and A2A card.

Only the card of A2A is offered. The server takes no tasks of A2A's own bindings, and `supportedInterfaces` names none
of them. A2A's specification leaves `protocolBinding` an open string.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from sartor.serving.http.app import JsonResponse, StrictJsonRoute, body_of
from sartor.serving.http.app_state import agent_of, get_record, get_state
from sartor.serving.http.mcp_server import ABOUT_AUTO, McpServer, ToolDescription, abilities, abouts
from sartor.serving.http.request_body import parse
from sartor.serving.http.response_models import AgentHealth, ServerHealth, WorkerHealth
from sartor.serving.http.services import ANYBODY
from sartor.serving.team_config import Team

router = APIRouter(route_class=StrictJsonRoute)
READY = "ready"
_UNHEALTHY: dict[int | str, dict[str, Any]] = {
    200: {"model": ServerHealth, "description": "Requests can be answered"},
    503: {"model": ServerHealth, "description": "Nobody can be answered"},
}


@router.get("/health", responses=_UNHEALTHY)
async def health(request: Request) -> JsonResponse:
    """Return 200 while any agent can answer. No key is needed; with a key, the agents that it opens are listed.

    Memory and restarts of the workers are for the admin's key, and for keys that open every agent.
    Returns 503 too if keys were set and are lost, or if the registry has been lost for a minute; `troubles` says so.
    """
    principal = get_record(request).principal
    worker_health = get_state(request).services.workers.health()
    workers = [
        _worker_body(worker, with_load=principal.is_admin or principal.agents is None)
        for worker in worker_health["workers"]
    ]
    ready = sum(worker["state"] == READY for worker in workers)
    agents = {
        name: AgentHealth(breaker=agent["breaker"], why=agent["why"], queued=agent["queued"], live=agent["live"])
        for name, agent in worker_health["agents"].items()
        if principal.opens(agent_of(name))
    }
    all_troubles = get_state(request).services.troubles()
    troubles = {
        name: problem
        for name, problem in all_troubles.items()
        if principal.is_admin or principal.opens(agent_of(name))
    }
    all_well = (
        not all_troubles
        and ready == len(workers)
        and all(agent["breaker"] == "closed" for agent in worker_health["agents"].values())
    )
    if (lockout := request.scope["state"].get("shut")) is not None:
        troubles["API keys"] = f"{lockout.problem}; try: {lockout.remedy}"
    can_answer = ready > 0 and lockout is None
    status: Literal["ok", "degraded", "unavailable"] = "unavailable"
    if can_answer:
        status = "ok" if all_well else "degraded"
    body = ServerHealth(
        status=status,
        workers=workers,
        agents=agents,
        troubles=troubles,
    )
    return JsonResponse(body, 200 if can_answer else 503)


def _worker_body(worker: Mapping[str, Any], *, with_load: bool) -> WorkerHealth:
    body = WorkerHealth(state=worker["state"], role=worker["role"])
    if with_load:
        body["memory_bytes"], body["restarts"] = worker["memory_bytes"], worker["restarts"]
    return body


@router.get(
    "/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Numbers"}}
)
async def metrics(request: Request) -> Response:
    """Return all metrics in Prometheus' text format.

    If keys are set, the request needs the admin key or a key that opens every agent.
    """
    return Response(get_state(request).metrics.page(), media_type=CONTENT_TYPE_LATEST)


TEXT = ["text/plain"]
A2A_VERSION = "1.0"


def agent_card_router(team: Team) -> APIRouter:
    """Return the router of the A2A agent card."""
    router = APIRouter(route_class=StrictJsonRoute, include_in_schema=False)
    about_texts = abouts(team)

    @router.get("/.well-known/agent-card.json")
    async def card(request: Request) -> JsonResponse:
        """Return the card. Its skills are `auto` and the agents that the key opens."""
        state, principal = get_state(request), get_record(request).principal
        descriptions = await abilities(state, principal, about_texts)
        url = (team.a2a.url or _own_address(request)).rstrip("/")
        return JsonResponse(_card(team, url, state.fingerprint(), descriptions, needs_key=principal != ANYBODY))

    return router


def _own_address(request: Request) -> str:
    """Return the address at which the client's connection reached this server.

    The Host header is not asked: who sends a foreign one to a cache would have others told a foreign address.
    """
    host, port = request.scope["server"]
    return f"{request.url.scheme}://{f'[{host}]' if ':' in host else host}:{port}"


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
    """Return the router of the two MCP routes. They are not in the OpenAPI document: MCP describes its own tools."""
    router = APIRouter(route_class=StrictJsonRoute, include_in_schema=False)

    @router.post("/mcp")
    async def team(request: Request) -> Response:
        """Serve MCP with all tools that the key opens."""
        body = bytes(await body_of(request))
        parse(body)
        return tools.response_to(body)

    @router.post("/mcp/{agent}")
    async def alone(agent: str, request: Request) -> Response:
        """Serve MCP with the tool of one agent."""
        await get_state(request).check_model(agent, get_record(request).principal)
        return await team(request)

    return router
