"""Routes /v1/models."""

from __future__ import annotations

import time
from collections.abc import Iterable

from fastapi import APIRouter, Request

from sartor.core.errors import UnavailableError
from sartor.core.model_refs import Modality
from sartor.serving.api_keys import Principal
from sartor.serving.http import speech_service
from sartor.serving.http.app import JsonResponse, StrictJsonRoute
from sartor.serving.http.app_state import AppState, get_record, get_state
from sartor.serving.http.response_models import ModelList, ModelObject

router = APIRouter(route_class=StrictJsonRoute)
STARTED = int(time.time())


@router.get("/v1/models", responses={200: {"model": ModelList}})
async def models(request: Request) -> JsonResponse:
    """List the base, `auto`, `speech`, agents and their versions that the key opens."""
    bodies = await _model_bodies(get_state(request), get_record(request).principal)
    return JsonResponse(ModelList(object="list", data=list(bodies.values())))


@router.get("/v1/models/{model}", responses={200: {"model": ModelObject}})
async def model(model: str, request: Request) -> JsonResponse:
    """Return one model name that the key opens."""
    state, principal = get_state(request), get_record(request).principal
    if model == speech_service.MODEL:
        state.check_speech(principal)
    else:
        await state.check_model(model, principal)
    bodies = await _model_bodies(state, principal)
    if model not in bodies:
        raise UnavailableError(f"no version of {model[:80]!a} has been admitted yet", "sartor agents list says why")
    return JsonResponse(bodies[model])


async def _model_bodies(state: AppState, principal: Principal) -> dict[str, ModelObject]:
    about = state.services.workers.about
    base_version = f"base@{about.base_digest[:12]}"

    def name(id: str, root: str, parent: str | None, reads: Iterable[Modality] = ()) -> ModelObject:
        return ModelObject(
            id=id,
            object="model",
            created=STARTED,
            owned_by="sartor",
            root=root,
            parent=parent,
            max_model_len=None if id == speech_service.MODEL else about.context_tokens,
            modalities=["text", *sorted(reads)],
        )

    listed = (*await state.services.agent_admin.listed(), *state.services.plans)
    agents = [agent for agent in listed if agent.is_ready and principal.opens(agent.name)]
    bodies = [name("base", base_version, None)] if principal.opens("base") else []
    modalities = {kind for agent in agents for kind in agent.reads.get(agent.live, ())}
    bodies += [name("auto", "auto", "base", modalities)] if principal.opens("auto") else []
    voice = state.services.speech.default
    bodies += [name(speech_service.MODEL, voice, None)] if voice and principal.opens(speech_service.MODEL) else []
    for agent in agents:
        live = f"{agent.name}@{agent.live}" if agent.live else agent.name
        bodies.append(name(agent.name, live, "base", agent.reads.get(agent.live, ())))
        bodies += [
            name(f"{agent.name}@{version}", f"{agent.name}@{version}", "base", agent.reads.get(version, ()))
            for version in agent.versions
        ]
    return {body["id"]: body for body in bodies}
