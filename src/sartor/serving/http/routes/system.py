"""GET /health for whoever balances load, GET /metrics for Prometheus."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from sartor.agents.serve.app import JsonResponse, Route
from sartor.agents.serve.desk import agent_of, desk_of, entry_of
from sartor.agents.serve.said import HealthAnswer

router = APIRouter(route_class=Route)
READY = "ready"
_UNHEALTHY: dict[int | str, dict[str, Any]] = {
    200: {"model": HealthAnswer, "description": "Requests can be answered"},
    503: {"model": HealthAnswer, "description": "Nobody can be answered"},
}


@router.get("/health", responses=_UNHEALTHY)
async def health(request: Request) -> JsonResponse:
    """200 while any agent can be answered. Needs no key; with one, it also tells of the agents that the key opens.

    503 too where the server had keys and they are gone, or its registry has been lost for a minute: `troubles` says so.
    """
    visitor = entry_of(request).visitor
    said = desk_of(request).house.crew.health()
    workers = [{name: worker[name] for name in ("state", "role", "memory_bytes", "restarts")} for worker in said["workers"]]
    ready = sum(worker["state"] == READY for worker in workers)
    agents = {
        name: {key: agent[key] for key in ("breaker", "why", "queued", "live")}
        for name, agent in said["agents"].items()
        if visitor.opens(agent_of(name))
    }
    known = desk_of(request).house.troubles()
    troubles = {name: why for name, why in known.items() if visitor.opens(agent_of(name))}
    all_well = not known and ready == len(workers) and all(agent["breaker"] == "closed" for agent in said["agents"].values())
    if (shut := request.scope["state"].get("shut")) is not None:
        troubles["API keys"] = f"{shut.problem}; try: {shut.remedy}"
    can_answer = ready > 0 and shut is None
    status = "unavailable" if not can_answer else "ok" if all_well else "degraded"
    body = {"status": status, "workers": workers, "agents": agents, "troubles": troubles}
    return JsonResponse(body, 200 if can_answer else 503)


@router.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Numbers"}})
async def metrics(request: Request) -> Response:
    """All numbers in Prometheus' text format. With keys set it takes the admin's, or one that opens every agent."""
    return Response(desk_of(request).meters.page(), media_type=CONTENT_TYPE_LATEST)
