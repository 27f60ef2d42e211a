"""Routes /v1/feedback and /v1/receipts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request

from sartor.core.errors import KeyRefusedError
from sartor.core.records import Feedback
from sartor.serving.api_keys import Principal
from sartor.serving.http.app import JsonResponse, StrictJsonRoute
from sartor.serving.http.app_state import AppState, agent_of, get_record, get_state
from sartor.serving.http.http_errors import FieldError, NotFoundError
from sartor.serving.http.request_models import FeedbackRequest
from sartor.serving.http.response_models import FeedbackResult

router = APIRouter(route_class=StrictJsonRoute)
PREFIXES = ("chatcmpl-", "cmpl-")


@router.post("/v1/feedback", responses={200: {"model": FeedbackResult}})
async def feedback(body: FeedbackRequest, request: Request) -> JsonResponse:
    """Rate or correct a reply, named by its receipt or by the `id` of its completion.

    The feedback is on disk when the request is answered.
    """
    state, record = get_state(request), get_record(request)
    if body.rating is None and not body.correction and not body.comment:
        raise FieldError("the feedback says nothing", '"rating": 1, or a correction, or a comment', "rating")
    state.feedback_intake.rates.begin(record.principal.key)
    receipt = _bare(body.receipt)
    exchange = state.memory.find(receipt)
    agent = record.agent = exchange.agent if exchange else str((await _find(state, receipt))["agent"])
    _check_may_rate(record.principal, agent, state.memory.asker(receipt))
    intake, asker = state.feedback_intake, exchange.person if exchange else ""
    voice = await intake.run(intake.voice, record.principal.key, body.user or "", body.consent)
    # attribute the feedback to the user of the reply, so that it can be erased with that user's data
    if not voice.user:
        voice = replace(voice, user=asker)
    submitted = Feedback(
        receipt=receipt,
        agent=agent,
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        rating=body.rating,
        correction=body.correction or "",
        comment=body.comment or "",
        messages=tuple(exchange.messages) if exchange else (),
        text=exchange.text if exchange else "",
        reply=exchange.reply if exchange else "",
        by=voice,
        asker=asker if asker != voice.user else "",
    )
    if submitted.by.consent == "refused" and submitted.rating is None:
        raise FieldError("words without consent are not kept", '"consent": true, or a rating beside them', "consent")
    is_erased = partial(state.memory.erased.covers, record.began, voice.user, asker)
    stored = await intake.run(intake.keep, submitted, is_erased)
    if submitted.rating is not None and state.memory.is_first(receipt, record.principal.key):
        await state.services.agent_admin.hear(agent, submitted.rating, record.principal.key)
    state.metrics.count_feedback(submitted, stored)
    return JsonResponse(FeedbackResult(receipt=receipt, agent=agent, learnable=stored.has_words))


@router.get("/v1/receipts/{receipt}", responses={200: {"model": dict[str, Any]}})
async def receipt(receipt: Annotated[str, Path(max_length=128)], request: Request) -> JsonResponse:
    """Return the signed receipt of a reply: digests, no content. `sartor receipt verify` checks it."""
    document = await _find(get_state(request), _bare(receipt))
    _check_opens(get_record(request).principal, str(document["agent"]))
    return JsonResponse(document)


async def _find(state: AppState, receipt: str) -> Mapping[str, Any]:
    result = await state.services.receipts.find(receipt)
    if result is None:
        raise NotFoundError(f"there is no receipt {receipt!a}", "use the header x-sartor-receipt of a reply")
    return result


def _check_opens(principal: Principal, agent: str) -> None:
    if not principal.opens(agent_of(agent)):
        raise KeyRefusedError("this key does not open the agent of that receipt", "send a key of that agent")


def _check_may_rate(principal: Principal, agent: str, asker: str) -> None:
    """Raise KeyRefusedError unless the key may rate the reply.

    The key must open the agent and, if the receiving key is known, be that key. An admin key may rate all replies.
    """
    if principal.is_admin:
        return
    _check_opens(principal, agent)
    if asker and asker != principal.key:
        raise KeyRefusedError("that receipt is of a reply to another key", "send the key that asked, or the admin's")


def _bare(receipt: str) -> str:
    """Return the receipt in a completion's id; a bare receipt is returned unchanged."""
    return next((receipt.removeprefix(prefix) for prefix in PREFIXES if receipt.startswith(prefix)), receipt)
