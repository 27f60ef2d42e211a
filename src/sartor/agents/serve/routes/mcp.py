"""POST /mcp and /mcp/{agent}: the Model Context Protocol by streamable HTTP (as_tools.py)."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from sartor.agents.serve.app import Route, body_of
from sartor.agents.serve.as_tools import AsTools
from sartor.agents.serve.bodies import parse
from sartor.agents.serve.desk import desk_of, entry_of


def router_of(tools: AsTools) -> APIRouter:
    """The two routes. Not in the OpenAPI: MCP says itself what it takes."""
    router = APIRouter(route_class=Route, include_in_schema=False)

    @router.post("/mcp")
    async def team(request: Request) -> Response:
        """All that the key opens."""
        body = bytes(await body_of(request))
        parse(body)
        return tools.answered(body)

    @router.post("/mcp/{agent}")
    async def alone(agent: str, request: Request) -> Response:
        """One agent alone."""
        await desk_of(request).check_model(agent, entry_of(request).visitor)
        return await team(request)

    return router
