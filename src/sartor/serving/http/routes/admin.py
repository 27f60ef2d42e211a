"""/v1/agents for the admin key."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Path, Request

from sartor.core.errors import AdmissionError, ModelError
from sartor.serving.http.app import JsonResponse, StrictJsonRoute
from sartor.serving.http.app_state import get_record, get_state
from sartor.serving.http.http_errors import FieldError
from sartor.serving.http.request_models import PromoteRequest, RollbackRequest
from sartor.serving.http.response_models import AgentsAnswer, ErrorAnswer

router = APIRouter(
    route_class=StrictJsonRoute,
    responses={
        409: {"model": ErrorAnswer, "description": "Another version is live than was expected; nothing was changed"},
        422: {"model": ErrorAnswer, "description": "The Release is not admitted; nothing was changed"},
    },
)
Name = Annotated[str, Path(max_length=128)]
T = TypeVar("T")
_CHANGED: dict[int | str, dict[str, Any]] = {200: {"model": dict[str, Any], "description": "The agent afterwards"}}


@router.get("/v1/agents", responses={200: {"model": AgentsAnswer}})
async def agents(request: Request) -> JsonResponse:
    """Every agent: live version, versions, trial, state."""
    listed = await get_state(request).house.roster.listed()
    said = [{"name": one.name, "live": one.live, "versions": one.versions, "state": one.state} for one in listed]
    return JsonResponse({"agents": said})


@router.post("/v1/agents/{name}/promote", responses=_CHANGED)
async def promote(name: Name, asked: PromoteRequest, request: Request) -> JsonResponse:
    """Compare and swap: a Release or version becomes live, if `expected_version` still is. Running replies go on as begun."""
    if bool(asked.release) == bool(asked.version):
        raise FieldError("exactly one of release and version says what becomes live", '"version": "1.1"', "version")
    roster = get_state(request).house.roster
    return await _changed(request, roster.promote(name, asked.release or "", asked.version or "", asked.expected_version))


@router.post("/v1/agents/{name}/rollback", responses=_CHANGED)
async def rollback(name: Name, asked: RollbackRequest, request: Request) -> JsonResponse:
    """Undo the newest step: end a trial, else the version before becomes live again."""
    return await _changed(request, get_state(request).house.roster.rollback(name, asked.expected_version))


@router.post("/v1/agents/{name}/drain", responses=_CHANGED)
async def drain(name: Name, request: Request) -> JsonResponse:
    """Take an agent out of service: what it began ends, what comes is refused."""
    return await _changed(request, get_state(request).house.roster.drain(name))


@router.post("/v1/agents/{name}/release", responses=_CHANGED)
async def release(name: Name, request: Request) -> JsonResponse:
    """Bring an agent back from quarantine or drain."""
    return await _changed(request, get_state(request).house.roster.release(name))


async def _changed(request: Request, change: Awaitable[Mapping[str, Any]]) -> JsonResponse:
    try:
        said = await change
    except ModelError as error:  # here it is the Release that is wrong, not the service
        raise AdmissionError(error.problem, error.remedy) from None
    get_record(request).agent = f"{said['name']}@{said['live']}"
    return JsonResponse(said)
