"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Sequence

from fastapi import APIRouter, Request

from sartor.core.errors import KeyRefusedError, UnknownAgentError
from sartor.serving.http.app import JsonResponse, StrictJsonRoute
from sartor.serving.http.app_state import get_record, get_state
from sartor.serving.http.http_errors import FieldError
from sartor.serving.http.request_conversion import as_list
from sartor.serving.http.request_models import MOST_EMBEDDED, VectorRequest
from sartor.serving.http.response_models import VectorAnswer
from sartor.serving.http.shutdown import until_disconnect

router = APIRouter(route_class=StrictJsonRoute)
# A directory is an encoder too, but none that a client may name
ENCODERS = ("base", "minilm")


@router.post("/v1/embeddings", responses={200: {"model": VectorAnswer}})
async def embeddings(asked: VectorRequest, request: Request) -> JsonResponse:
    """One vector of unit length per text."""
    desk = get_state(request)
    if asked.model not in ENCODERS:
        raise UnknownAgentError(f"nothing that embeds has the name {asked.model[:80]!a}", '"model": "base", or "minilm"')
    if not get_record(request).visitor.opens(asked.model):
        raise KeyRefusedError(f"this key does not open {asked.model!r}", f"sartor agents key {asked.model} makes one that does")
    texts = as_list(asked.input)
    if (size := sum(map(len, texts))) > MOST_EMBEDDED:
        problem = f"input has {size} characters in {len(texts)} texts; the limit of one request is {MOST_EMBEDDED}"
        raise FieldError(problem, "send the texts in several requests", "input")
    at = asyncio.get_running_loop().time() + desk.limits.deadline_s - get_record(request).elapsed_s
    work = desk.shift.within(desk.house.crew.embed(texts, asked.model), at)
    made = await until_disconnect(request.receive, work)
    if made.cut:
        problem = f"input[{made.cut[0]}] is longer than {asked.model} reads, and nothing is cut"
        raise FieldError(problem, 'split that text, or "model": "base"', "input")
    entry = get_record(request)
    entry.agent, entry.usage.prompt = asked.model, made.tokens
    as_text = asked.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": place, "embedding": _packed(vector) if as_text else vector}
        for place, vector in enumerate(made.vectors)
    ]
    usage = {"prompt_tokens": made.tokens, "total_tokens": made.tokens}
    return JsonResponse({"object": "list", "model": asked.model, "data": data, "usage": usage})


def _packed(vector: Sequence[float]) -> str:
    """Little-endian 32 bit floats in base64, as OpenAI's clients unpack them."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
