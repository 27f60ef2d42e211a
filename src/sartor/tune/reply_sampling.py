"""Sampled replies of the model that is tuned, to the prompts of its own rows.

They depend on the weights, the seed and the number of the update alone, so a resumed run samples them again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sartor.core.records import Message
from sartor.inference.engine import Sampling
from sartor.inference.generate import Generation, context_tokens, generate
from sartor.models.chat import ChatTokenizer
from sartor.models.losses.transformers_backend import unpacked
from sartor.tune.checkpoint_selection import last_reply
from sartor.tune.tokenized_dataset import DistilExample

# Factor between the seeds of two updates, above any number of updates
_SEEDS = 1_000_003


def update_seed(seed: int, updates: int) -> int:
    """Return the seed of the replies of the update after `updates`, by the seed of the recipe."""
    return seed * _SEEDS + updates


def sample_replies(
    model: Any, chat: ChatTokenizer, rows: Sequence[DistilExample], sampling: Sampling
) -> list[DistilExample]:
    """Return rows with the model's own replies in place of their last ones.

    A reply that ends by itself has its end token; one that reaches the limit of `sampling` or of the context has none.
    The same row given several times gets several replies.
    Each prompt leaves room in the context (`preflight.of_room`); a long one shortens no reply but its own.
    """
    prompts = [last_reply(row)[0] for row in rows]
    context = context_tokens(model) or math.inf
    by_room = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_room[int(min(sampling.max_tokens, context - len(prompt)))].append(index)
    replies: dict[int, Generation] = {}
    is_training = model.training
    model.eval()
    with unpacked(model):
        for room, indices in by_room.items():
            limited = replace(sampling, max_tokens=room)
            batch = [prompts[index] for index in indices]
            generations = generate(model, batch, stop=chat.stops, pad=chat.pad, sampling=limited)
            replies |= zip(indices, generations, strict=True)
    model.train(is_training)
    result = []
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        reply = replies[index]
        # the row's own reply ends with the token that ends one
        end = [row.ids[row.last_reply[1] - 1]] if reply.finish == "stop" else []
        ids, example = [*reply.ids, *end], row.example
        if example is not None:
            messages = (*example.prompt, Message.of("assistant", chat.decode(reply.ids)))
            example = replace(example, messages=messages, rejected=(), rating=0.0)
        learnt = [False] * len(prompt) + [True] * len(ids)
        result.append(replace(row, ids=[*prompt, *ids], learnt=learnt, example=example))
    return result
