"""Route /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
import struct

from fastapi import APIRouter, Request

from sartor.core.errors import KeyRefusedError, UnknownAgentError
from sartor.serving.http.app import JsonResponse, StrictJsonRoute
from sartor.serving.http.app_state import get_record, get_state
from sartor.serving.http.http_errors import FieldError
from sartor.serving.http.request_conversion import as_list
from sartor.serving.http.request_models import MOST_EMBEDDED, VectorRequest
from sartor.serving.http.response_models import EmbeddingList, EmbeddingObject, EmbeddingUsage
from sartor.serving.http.shutdown import until_disconnect

router = APIRouter(route_class=StrictJsonRoute)
# Encoders that a client may name. Directories are encoders too, but not for clients.
ENCODERS = ("base", "minilm")


@router.post("/v1/embeddings", responses={200: {"model": EmbeddingList}})
async def embeddings(body: VectorRequest, request: Request) -> JsonResponse:
    """Return one vector of unit length for each text."""
    state = get_state(request)
    if body.model not in ENCODERS:
        raise UnknownAgentError(
            f"nothing that embeds has the name {body.model[:80]!a}", '"model": "base", or "minilm"'
        )
    if not get_record(request).principal.opens(body.model):
        raise KeyRefusedError(
            f"this key does not open {body.model!r}", f"sartor agents key {body.model} makes one that does"
        )
    texts = as_list(body.input)
    if (size := sum(map(len, texts))) > MOST_EMBEDDED:
        problem = f"input has {size} characters in {len(texts)} texts; the limit of one request is {MOST_EMBEDDED}"
        raise FieldError(problem, "send the texts in several requests", "input")
    deadline = asyncio.get_running_loop().time() + state.limits.deadline_s - get_record(request).elapsed_s
    work = state.lifetime.within(state.services.workers.embed(texts, body.model), deadline)
    result = await until_disconnect(request.receive, work)
    if result.cut:
        problem = f"input[{result.cut[0]}] is longer than {body.model} reads, and nothing is cut"
        raise FieldError(problem, 'split that text, or "model": "base"', "input")
    record = get_record(request)
    record.agent, record.usage.prompt = body.model, result.tokens
    data = []
    for index, vector in enumerate(result.vectors):
        embedding: str | list[float] = vector
        if body.encoding_format == "base64":
            # little-endian 32-bit floats, as OpenAI's clients unpack them
            embedding = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append(EmbeddingObject(object="embedding", index=index, embedding=embedding))
    usage = EmbeddingUsage(prompt_tokens=result.tokens, total_tokens=result.tokens)
    return JsonResponse(EmbeddingList(object="list", model=body.model, data=data, usage=usage))
