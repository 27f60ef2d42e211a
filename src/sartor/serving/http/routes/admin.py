"""Routes /v1/agents, for the admin key."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Request

from sartor.core.errors import AdmissionError, ModelError
from sartor.serving.http.app import JsonResponse, StrictJsonRoute
from sartor.serving.http.app_state import get_record, get_state
from sartor.serving.http.http_errors import FieldError
from sartor.serving.http.request_models import PromoteRequest, RollbackRequest
from sartor.serving.http.response_models import AgentList, AgentObject, ErrorResponse

router = APIRouter(
    route_class=StrictJsonRoute,
    responses={
        409: {"model": ErrorResponse, "description": "Another version is live than was expected; nothing was changed"},
        422: {"model": ErrorResponse, "description": "The Release is not admitted; nothing was changed"},
    },
)
Name = Annotated[str, Path(max_length=128)]
T = TypeVar("T")
_CHANGED: dict[int | str, dict[str, Any]] = {200: {"model": dict[str, Any], "description": "The agent afterwards"}}


@router.get("/v1/agents", responses={200: {"model": AgentList}})
async def agents(request: Request) -> JsonResponse:
    """List every agent with its live version, versions, trial and state."""
    listed = await get_state(request).services.agent_admin.listed()
    rows = [
        AgentObject(name=agent.name, live=agent.live, versions=agent.versions, state=agent.state) for agent in listed
    ]
    return JsonResponse(AgentList(agents=rows))


@router.post("/v1/agents/{name}/promote", responses=_CHANGED)
async def promote(name: Name, body: PromoteRequest, request: Request) -> JsonResponse:
    """Make a Release or a version live if `expected_version` is still live (compare and swap).

    Running replies continue with the version that began them.
    """
    if bool(body.release) == bool(body.version):
        raise FieldError("exactly one of release and version says what becomes live", '"version": "1.1"', "version")
    agent_admin = get_state(request).services.agent_admin
    return await _change_response(
        request, agent_admin.promote(name, body.release or "", body.version or "", body.expected_version)
    )


@router.post("/v1/agents/{name}/rollback", responses=_CHANGED)
async def rollback(name: Name, body: RollbackRequest, request: Request) -> JsonResponse:
    """Undo the newest step: end a trial, or else make the previous version live again."""
    return await _change_response(
        request, get_state(request).services.agent_admin.rollback(name, body.expected_version)
    )


@router.post("/v1/agents/{name}/drain", responses=_CHANGED)
async def drain(name: Name, request: Request) -> JsonResponse:
    """Take an agent out of service. Running replies end, and new requests are refused."""
    return await _change_response(request, get_state(request).services.agent_admin.drain(name))


@router.post("/v1/agents/{name}/release", responses=_CHANGED)
async def release(name: Name, request: Request) -> JsonResponse:
    """Return an agent to service after quarantine or drain."""
    return await _change_response(request, get_state(request).services.agent_admin.release(name))


async def _change_response(request: Request, change: Awaitable[Mapping[str, Any]]) -> JsonResponse:
    try:
        agent = await change
    except ModelError as error:  # the Release is at fault, not the service: answer 422 instead of 503
        raise AdmissionError(error.problem, error.remedy) from None
    get_record(request).agent = f"{agent['name']}@{agent['live']}"
    return JsonResponse(agent)
