"""/v1/feedback and /v1/receipts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request

from sartor.core.errors import KeyRefusedError
from sartor.core.records import Feedback
from sartor.serving.api_keys import Principal
from sartor.serving.http.app import JsonResponse, StrictJsonRoute
from sartor.serving.http.app_state import AppState, agent_of, get_record, get_state
from sartor.serving.http.http_errors import FieldError, NotFoundError
from sartor.serving.http.request_models import FeedbackRequest
from sartor.serving.http.response_models import FeedbackAnswer

router = APIRouter(route_class=StrictJsonRoute)
PREFIXES = ("chatcmpl-", "cmpl-")


@router.post("/v1/feedback", responses={200: {"model": FeedbackAnswer}})
async def feedback(asked: FeedbackRequest, request: Request) -> JsonResponse:
    """Rate or correct a reply by its receipt, or by the `id` of its completion. It is on disk when this answers."""
    desk, entry = get_state(request), get_record(request)
    if asked.rating is None and not asked.correction and not asked.comment:
        raise FieldError("the feedback says nothing", '"rating": 1, or a correction, or a comment', "rating")
    desk.hearing.rates.begin(entry.visitor.key)
    receipt = _bare(asked.receipt)
    known = desk.memory.find(receipt)
    agent = entry.agent = known.agent if known else str((await _find(desk, receipt))["agent"])
    _check_may_rate(entry.visitor, agent, desk.memory.asker(receipt))
    voice = await asyncio.to_thread(desk.hearing.voice, entry.visitor.key, asked.user or "", asked.consent)
    if known and known.person and not voice.user:  # who asked is who is spoken of, so that it can be forgotten
        voice = replace(voice, user=known.person)
    said = Feedback(
        receipt=receipt,
        agent=agent,
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        rating=asked.rating,
        correction=asked.correction or "",
        comment=asked.comment or "",
        messages=tuple(known.messages) if known else (),
        text=known.text if known else "",
        reply=known.reply if known else "",
        by=voice,
    )
    if said.by.consent == "refused" and said.rating is None:
        raise FieldError("words without consent are not kept", '"consent": true, or a rating beside them', "consent")
    kept = await asyncio.to_thread(desk.hearing.keep, said)
    if said.rating is not None and desk.memory.is_first(receipt, entry.visitor.key):
        await desk.house.roster.hear(agent, said.rating)
    desk.meters.hear(said, kept)
    return JsonResponse({"receipt": receipt, "agent": agent, "learnable": kept.has_words})


@router.get("/v1/receipts/{receipt}", responses={200: {"model": dict[str, Any]}})
async def receipt(receipt: Annotated[str, Path(max_length=128)], request: Request) -> JsonResponse:
    """The signed record of a reply: digests, no content. `sartor receipt verify` checks it."""
    found = await _find(get_state(request), _bare(receipt))
    _check_opens(get_record(request).visitor, str(found["agent"]))
    return JsonResponse(found)


async def _find(desk: AppState, receipt: str) -> Mapping[str, Any]:
    found = await desk.house.receipts.find(receipt)
    if found is None:
        raise NotFoundError(f"there is no receipt {receipt!a}", "use the header x-sartor-receipt of a reply")
    return found


def _check_opens(visitor: Principal, agent: str) -> None:
    if not visitor.opens(agent_of(agent)):
        raise KeyRefusedError("this key does not open the agent of that receipt", "send a key of that agent")


def _check_may_rate(visitor: Principal, agent: str, asker: str) -> None:
    """Raises KeyRefusedError for a key that does not open the agent, or did not get the reply, where that is known."""
    if visitor.is_admin:
        return
    _check_opens(visitor, agent)
    if asker and asker != visitor.key:
        raise KeyRefusedError("that receipt is of a reply to another key", "send the key that asked, or the admin's")


def _bare(receipt: str) -> str:
    """The receipt in a completion's id, or itself."""
    return next((receipt.removeprefix(prefix) for prefix in PREFIXES if receipt.startswith(prefix)), receipt)
