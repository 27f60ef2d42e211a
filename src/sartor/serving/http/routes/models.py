"""/v1/models."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request

from sartor.core.errors import UnavailableError
from sartor.serving.api_keys import Principal
from sartor.serving.http import speech_service
from sartor.serving.http.app import JsonResponse, StrictJsonRoute
from sartor.serving.http.app_state import AppState, get_record, get_state
from sartor.serving.http.response_models import ModelBody, ModelsAnswer

router = APIRouter(route_class=StrictJsonRoute)
STARTED = int(time.time())


@router.get("/v1/models", responses={200: {"model": ModelsAnswer}})
async def models(request: Request) -> JsonResponse:
    """What the key opens of base, `auto` and agents, these with every version that may be asked for."""
    names = await _names(get_state(request), get_record(request).visitor)
    return JsonResponse({"object": "list", "data": list(names.values())})


@router.get("/v1/models/{model}", responses={200: {"model": ModelBody}})
async def model(model: str, request: Request) -> JsonResponse:
    """One of them."""
    desk, visitor = get_state(request), get_record(request).visitor
    if model == speech_service.MODEL:
        desk.check_speech(visitor)
    else:
        await desk.check_model(model, visitor)
    names = await _names(desk, visitor)
    if model not in names:
        raise UnavailableError(f"no version of {model[:80]!a} has been admitted yet", "sartor agents list says why")
    return JsonResponse(names[model])


async def _names(desk: AppState, visitor: Principal) -> dict[str, dict[str, Any]]:
    about = desk.house.crew.about
    exact = f"base@{about.base_digest[:12]}"

    def name(id: str, root: str, parent: str | None, reads: Iterable[str] = ()) -> dict[str, Any]:
        said = {"id": id, "object": "model", "created": STARTED, "owned_by": "sartor", "root": root, "parent": parent}
        most = None if id == speech_service.MODEL else about.context_tokens
        return {**said, "max_model_len": most, "modalities": ["text", *sorted(reads)]}

    listed = (*await desk.house.roster.listed(), *desk.house.plans)
    opened = [agent for agent in listed if agent.is_ready and visitor.opens(agent.name)]
    found = [name("base", exact, None)] if visitor.opens("base") else []
    every = {kind for agent in opened for kind in agent.reads.get(agent.live, ())}
    found += [name("auto", "auto", "base", every)] if visitor.opens("auto") else []
    speaks = desk.house.speech.default
    found += [name(speech_service.MODEL, speaks, None)] if speaks and visitor.opens(speech_service.MODEL) else []
    for agent in opened:
        live = f"{agent.name}@{agent.live}" if agent.live else agent.name
        found.append(name(agent.name, live, "base", agent.reads.get(agent.live, ())))
        found += [
            name(f"{agent.name}@{one}", f"{agent.name}@{one}", "base", agent.reads.get(one, ())) for one in agent.versions
        ]
    return {str(said["id"]): said for said in found}
