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
from sartor.evaluate.predictions import SPARE_TOKENS, ask_refusal, losses, model_side
from sartor.inference.engine import Sampling
from sartor.inference.generate import context_tokens, generate
from sartor.models.base import Base
from sartor.models.packing import TokenizedExample

Array = NDArray[np.float64]
# Order of the sides in the results of `both`
SIDES = ("base", "tuned")


@dataclass(frozen=True)
class ModelPair:
    """A base and the model with the adapter on it.

    folder: folder of the media of rows.
    """

    base: Base
    model: Any
    folder: Path

    def both(self, ask: Callable[[], Any]) -> tuple[Any, Any]:
        """Return the results of `ask` under the base and under the tuned model."""
        results = []
        for tuned in (False, True):
            with model_side(self.model, tuned=tuned):
                results.append(ask())
        return results[0], results[1]

    def fits(self, prompt: Sequence[Message], reply: str) -> bool:
        """Return whether the base's template, towers and context accept a prompt with a reply."""
        row = Example((*prompt, Message.of("assistant", reply)), ())
        return not ask_refusal(self.base, row, self.folder, len(self.base.chat.content_tokens(reply)) + SPARE_TOKENS)[
            0
        ]

    def encoded(self, prompt: Sequence[Message], reply: str, tools: str = "") -> TokenizedExample:
        """Return a prompt and a reply to it as tokens; the loss covers this reply alone, not earlier ones.

        tools: JSON text of the declared tools; empty for none.
        """
        row = self.base.chat.encode(Example((*prompt, Message.of("assistant", reply)), (), tools=tools), self.folder)
        start, _ = row.last_reply
        return replace(row, learnt=[learnt and index >= start for index, learnt in enumerate(row.learnt)])

    def sentence(self, text: str) -> TokenizedExample:
        """Return a text as tokens, without the chat template.

        The loss covers every token, also the first: the BOS token (else EOS) stands before it.
        """
        tokenizer = self.base.chat.tokenizer
        opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ids = self.base.chat.content_tokens(text)
        return TokenizedExample([opening, *ids], [False] + [True] * len(ids))

    def nats(self, rows: Sequence[TokenizedExample]) -> Array:
        """Return the negative log-likelihood of each row's supervised tokens, (2, N) nats of base and tuned."""

        def ask() -> Array:
            """Return the sum of each row's token losses, (N,)."""
            means, tokens = losses(self.base, self.model, rows, share=True)
            return np.asarray(means) * np.asarray(tokens)

        return np.stack(self.both(ask)) if rows else np.zeros((2, 0))

    def chances(self, prompts: Sequence[Sequence[Message]], outcomes: Sequence[str]) -> Array:
        """Return the probability of each outcome as the whole reply, (2, prompts, outcomes).

        It is relative to these outcomes: p_o = softmax over o of log P(outcome o | prompt), so that rows sum to 1.
        """
        rows = [self.encoded(prompt, outcome) for prompt in prompts for outcome in outcomes]
        scores = -self.nats(rows).reshape(2, len(prompts), len(outcomes))
        # softmax over the outcomes, shifted by its maximum; scores: (2, prompts, outcomes) log-likelihoods
        odds = np.exp(scores - scores.max(2, keepdims=True, initial=-np.inf))
        return np.asarray(odds / odds.sum(2, keepdims=True))

    def replies(self, prompts: Sequence[Sequence[Message]], most_tokens: int) -> tuple[list[str], list[str]]:
        """Return greedy replies of both sides."""
        chat = self.base.chat
        continuations = self.continued([chat.prompt_ids(prompt, "", self.folder) for prompt in prompts], most_tokens)
        return [chat.decode(ids) for ids in continuations[0]], [chat.decode(ids) for ids in continuations[1]]

    def answers(self, prompts: Sequence[Sequence[Message]], most_tokens: int) -> tuple[list[str], list[str]]:
        """Return greedy replies of both sides, without their reasoning."""
        chat = self.base.chat
        is_opened = bool(prompts) and chat.opens_reasoning(chat.prompt_ids(prompts[0], "", self.folder))
        before, after = self.replies(prompts, most_tokens)
        return (
            [without_reasoning(text, is_opened=is_opened) for text in before],
            [without_reasoning(text, is_opened=is_opened) for text in after],
        )

    def continued(self, prompts: Sequence[Sequence[int]], most_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
        """Return the tokens of both sides' greedy continuations.

        They end at a stop token, after `most_tokens`, or at the end of the context.
        """
        context = context_tokens(self.model) or max(map(len, prompts), default=0) + most_tokens
        room = context - max(map(len, prompts), default=0)
        chat, sampling = self.base.chat, Sampling(min(most_tokens, room))

        def ask() -> list[list[int]]:
            """Return the continuation of each prompt."""
            return [
                item.ids for item in generate(self.model, prompts, stop=chat.stops, pad=chat.pad, sampling=sampling)
            ]

        return self.both(ask) if prompts else ([], [])
