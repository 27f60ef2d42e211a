"""What an export is compared with: the Release on its own base in fp32, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sartor.export.prompts import Asked
from sartor.inference.engine import Sampling
from sartor.inference.generate import generate
from sartor.models.base import Base

# Of each reply that many tokens are compared. Logits of all of them are held: 50 replies over 150,000 tokens are 1.4 GB.
REPLY_TOKENS = 48
ROWS_TOGETHER = 16


@dataclass(frozen=True)
class Trace:
    """A prompt, the Release's greedy reply to it (with the token that ends it), and the logits (len(reply), V) at each."""

    asked: Asked
    reply: tuple[int, ...]
    logits: torch.Tensor

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return list(self.asked.ids)


def trace(base: Base, model: Any, asked: Sequence[Asked]) -> list[Trace]:
    """Greedy replies by Sartor's own decoding, and the logits along each of them.

    base.model and `model` (with the adapter) are in fp32.
    """
    chat = base.chat
    made = generate(
        model,
        [one.ids for one in asked],
        stop=chat.stops,
        pad=chat.pad,
        sampling=Sampling(REPLY_TOKENS),
        batch_rows=ROWS_TOGETHER,
    )
    traces = []
    for one, reply in zip(asked, made, strict=True):
        logits = along(model, list(one.ids), reply.ids)
        if reply.finish == "stop" and len(reply.ids) < REPLY_TOKENS:
            traces.append(Trace(one, (*reply.ids, int(logits[-1].argmax())), logits))
        else:
            traces.append(Trace(one, tuple(reply.ids), logits[:-1]))
    return traces


@torch.inference_mode()
def along(model: Any, prompt: Sequence[int], reply: Sequence[int]) -> torch.Tensor:
    """Logits (len(reply) + 1, V), fp32 on the CPU: of the token behind the prompt, and of that behind each token of `reply`."""
    ids = torch.tensor([[*prompt, *reply]], device=model.device)
    logits: torch.Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 :]
    return logits.float().cpu()
