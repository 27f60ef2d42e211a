"""GET /.well-known/agent-card.json: the A2A card (a2a-protocol.org, 1.0) of who is here and by which protocols they are asked.

A card only: no task of A2A's own bindings is taken here, and `supportedInterfaces` names none of them. Its `protocolBinding`
is an open text by that specification.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from sartor.agents.serve.abilities import ABOUT_AUTO, Ability, abilities, abouts
from sartor.agents.serve.app import JsonResponse, Route
from sartor.agents.serve.desk import desk_of, entry_of
from sartor.agents.serve.seams import ANYBODY
from sartor.agents.team import Team

TEXT = ["text/plain"]
A2A_VERSION = "1.0"


def router_of(team: Team) -> APIRouter:
    """The route."""
    router = APIRouter(route_class=Route, include_in_schema=False)
    said = abouts(team)

    @router.get("/.well-known/agent-card.json")
    async def card(request: Request) -> JsonResponse:
        """The card; its skills are the agents that the key opens, and without one the team alone."""
        desk, visitor = desk_of(request), entry_of(request).visitor
        found = await abilities(desk, visitor, said)
        url = (team.a2a.url or str(request.base_url)).rstrip("/")
        return JsonResponse(_card(team, url, desk.fingerprint(), found, needs_key=visitor != ANYBODY))

    return router


def _card(team: Team, url: str, version: str, found: list[Ability], *, needs_key: bool) -> dict[str, Any]:
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
        "skills": [_skill(one) for one in (Ability("auto", "", ABOUT_AUTO), *found)],
    }
    if needs_key:
        card["securitySchemes"] = {"key": {"httpAuthSecurityScheme": {"scheme": "Bearer"}}}
        card["securityRequirements"] = [{"schemes": {"key": {"list": []}}}]
    return card


def _skill(one: Ability) -> dict[str, Any]:
    return {"id": one.name, "name": one.name, "description": one.about, "tags": [one.name]}
