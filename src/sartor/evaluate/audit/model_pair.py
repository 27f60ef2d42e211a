"""Likelihoods and replies of base and tuned model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sartor.core.records import Example, Message
from sartor.core.reply_markup import without_reasoning
from sartor.evaluate.predictions import SPARE_TOKENS, ask_refusal, losses, model_side, opens_reasoning
from sartor.inference.engine import Sampling
from sartor.inference.generate import context_tokens, generate
from sartor.models.base import Base
from sartor.models.packing import TokenizedExample

Array = NDArray[np.float64]
# Which side is which in what `both` gives
SIDES = ("base", "tuned")


@dataclass(frozen=True)
class ModelPair:
    """A base and the model with the adapter on it. folder: below which media of rows lie."""

    base: Base
    model: Any
    folder: Path

    def both(self, ask: Callable[[], Any]) -> tuple[Any, Any]:
        """What `ask` gives under the base, and under the tuned model."""
        results = []
        for tuned in (False, True):
            with model_side(self.model, tuned=tuned):
                results.append(ask())
        return results[0], results[1]

    def fits(self, prompt: Sequence[Message], reply: str) -> bool:
        """Whether the base's template, towers and context take a prompt with a reply."""
        row = Example((*prompt, Message.of("assistant", reply)), ())
        return not ask_refusal(self.base, row, self.folder, len(self.base.chat.content_tokens(reply)) + SPARE_TOKENS)[
            0
        ]

    def encoded(self, prompt: Sequence[Message], reply: str) -> TokenizedExample:
        """A prompt and a reply to it as tokens; earlier replies are read, not judged."""
        row = self.base.chat.encode(Example((*prompt, Message.of("assistant", reply)), ()), self.folder)
        start, _ = row.last_reply
        return replace(row, learnt=[learnt and index >= start for index, learnt in enumerate(row.learnt)])

    def sentence(self, text: str) -> TokenizedExample:
        """A text outside the chat template. Every token is judged, also the first: before it stands one that says
        nothing.
        """
        tokenizer = self.base.chat.tokenizer
        opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = self.base.chat.content_tokens(text)
        return TokenizedExample([opening, *ids], [False] + [True] * len(ids))

    def nats(self, rows: Sequence[TokenizedExample]) -> Array:
        """(2, N): how unlikely base and tuned find what is judged of each row, in nats in all."""

        def ask() -> Array:
            means, tokens = losses(self.base, self.model, rows, share=True)
            return np.asarray(means) * np.asarray(tokens)

        return np.stack(self.both(ask)) if rows else np.zeros((2, 0))

    def chances(self, prompts: Sequence[Sequence[Message]], outcomes: Sequence[str]) -> Array:
        """(2, prompts, outcomes): how likely each outcome is as the whole reply, among these outcomes; rows sum to
        1.
        """
        rows = [self.encoded(prompt, outcome) for prompt in prompts for outcome in outcomes]
        scores = -self.nats(rows).reshape(2, len(prompts), len(outcomes))
        odds = np.exp(scores - scores.max(2, keepdims=True, initial=-np.inf))
        return np.asarray(odds / odds.sum(2, keepdims=True))

    def replies(self, prompts: Sequence[Sequence[Message]], most_tokens: int) -> tuple[list[str], list[str]]:
        """Greedy replies of both sides."""
        chat = self.base.chat
        continuations = self.continued([chat.prompt_ids(prompt, "", self.folder) for prompt in prompts], most_tokens)
        return [chat.decode(ids) for ids in continuations[0]], [chat.decode(ids) for ids in continuations[1]]

    def answers(self, prompts: Sequence[Sequence[Message]], most_tokens: int) -> tuple[list[str], list[str]]:
        """Greedy replies of both sides, without their reasoning."""
        chat = self.base.chat
        is_opened = bool(prompts) and opens_reasoning(chat, chat.prompt_ids(prompts[0], "", self.folder))
        before, after = self.replies(prompts, most_tokens)
        return (
            [without_reasoning(text, is_opened=is_opened) for text in before],
            [without_reasoning(text, is_opened=is_opened) for text in after],
        )

    def continued(self, prompts: Sequence[Sequence[int]], most_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
        """The tokens with which both sides go on, greedily, to their end, `most_tokens`, or the end of the context."""
        context = context_tokens(self.model) or max(map(len, prompts), default=0) + most_tokens
        room = context - max(map(len, prompts), default=0)
        chat, sampling = self.base.chat, Sampling(min(most_tokens, room))

        def ask() -> list[list[int]]:
            return [
                item.ids for item in generate(self.model, prompts, stop=chat.stops, pad=chat.pad, sampling=sampling)
            ]

        return self.both(ask) if prompts else ([], [])
