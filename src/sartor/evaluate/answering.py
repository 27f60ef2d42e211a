"""What one side (base or tuned) does with rows: greedy replies, losses, and how sure it was of the class that it named."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from sartor.core.records import Example
from sartor.evaluate.held_out import HeldOut
from sartor.evaluate.labels import label_of, span_of
from sartor.evaluate.measures import Side
from sartor.inference.engine import Sampling
from sartor.inference.generate import Generation, generate
from sartor.models import packing
from sartor.models.base import Base
from sartor.models.chat import Chat
from sartor.models.content_shielding import reply_text
from sartor.models.losses.loss_backend import Wish
from sartor.models.media_tokens import blank
from sartor.models.multimodal.native_media import is_native
from sartor.models.packing import Encoded

# A reply may be this much longer than the longest reference before it is cut (and then it is wrong anyway)
SPARE_TOKENS = 8
MOST_REPLY_TOKENS = 512


def side(model: Any, *, tuned: bool) -> AbstractContextManager[Any]:
    """Inside, `model` computes as the tuned model, or as its base, to which what projectors make of media is blank."""
    stack = ExitStack()
    if not tuned:
        stack.enter_context(model.disable_adapter())
        if not is_native(model):  # which reads media without an adapter
            stack.enter_context(blank(model))
    return stack


def reply_limit(base: Base, examples: Sequence[Example]) -> int:
    """Tokens after which a reply to any of these rows is cut."""
    longest = max(len(base.chat.tokenizer(reply_text(example.messages[-1]))["input_ids"]) for example in examples)
    return min(longest + SPARE_TOKENS, MOST_REPLY_TOKENS)


def answer(base: Base, model: Any, asked: HeldOut, field: str, *, tuned: bool) -> Side:
    """All that is measured of one side. field: where a reply names a class; empty where none is asked for."""
    with side(model, tuned=tuned):
        said = replies(base, model, asked, reply_limit(base, asked.examples))
        loss, tokens = losses(base, model, [base.chat.encode(example, asked.folder) for example in asked.examples])
    texts = [base.chat.decode(one.ids) for one in said]
    confidence = [_confidence(base.chat, one, text, field) for one, text in zip(said, texts, strict=True)] if field else []
    return Side(texts, loss, tokens, confidence)


def replies(base: Base, model: Any, asked: HeldOut, limit: int) -> list[Generation]:
    """Greedy replies under the model as it stands, at most `limit` tokens each; an empty one to a document."""
    chat = base.chat
    prompts = [chat.prompt_ids(row.prompt, row.tools, asked.folder) for row in asked.examples if not row.is_document]
    made = iter(generate(model, prompts, stop=chat.stops, pad=chat.pad, sampling=Sampling(limit)))
    return [Generation([], "stop") if row.is_document else next(made) for row in asked.examples]


@torch.no_grad()
def losses(
    base: Base, model: Any, encoded: Sequence[Encoded], pack_tokens: int = 2048, *, share: bool = False
) -> tuple[list[float], list[int]]:
    """(nats per supervised token, supervised tokens) of each row under the model as it stands.

    share: what neighbouring rows begin with is computed once, which rounds otherwise.
    """
    # the fast path would always see the adapter, and `side` switches it off
    path = base.path(model, encoded, Wish(fast=False, share=share))
    means: list[float] = []
    for group in packing.fill([len(row.ids) for row in encoded], max(pack_tokens, *(len(row.ids) for row in encoded))):
        chosen = [encoded[index] for index in group]
        found, _ = path.losses(chosen)
        for part in found.split([row.supervised_tokens for row in chosen]):
            means.append(float(part.mean()) if len(part) else 0.0)
    return means, [row.supervised_tokens for row in encoded]


def _confidence(chat: Chat, said: Generation, text: str, field: str) -> float:
    """The probability of the label that a reply named: the product over the tokens that spell it; 0 where it named none."""
    if not said.ids or label_of(text, field) is None:
        return 0.0
    first, last = _spelling(chat, said.ids, *span_of(text, field))
    return math.exp(sum(said.logprobs[first:last]))


def _spelling(chat: Chat, ids: Sequence[int], start: int, end: int) -> tuple[int, int]:
    """[first, last) of the tokens that hold any of the characters [start, end) of a reply."""

    def reached(count: int) -> int:
        return len(chat.decode(ids[:count]))

    counts = range(len(ids) + 1)
    return max(bisect_right(counts, start, key=reached) - 1, 0), bisect_left(counts, end, key=reached)
