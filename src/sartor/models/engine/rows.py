"""One call while it lives: its tokens, its place in the cache, what of its text is not yet shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sartor.models.chat import Chat
from sartor.models.engine.choose import Chooser, logprob
from sartor.models.engine.contract import Call, Done, Event, Finish, Logprob, Piece
from sartor.models.engine.factors import Factors
from sartor.models.engine.pages import Lease
from sartor.models.engine.spelling import Spelling


class Tools(Protocol):
    """How calls with tools are put to the base, and read from what it says."""

    def prepare(self, call: Call, chat: Chat) -> Call:
        """The call as it is to be rendered and constrained. Raises RequestError when the tools cannot be used."""
        ...

    def parse(self, text: str) -> Sequence[Mapping[str, Any]]:
        """The tool calls in a whole reply, in OpenAI's form; none when it is an answer in words."""
        ...


@dataclass(frozen=True)
class Attached:
    """An adapter (or the base, without factors), and the root of what is cached under it."""

    root: int
    factors: Factors | None = None


@dataclass
class Row:
    """A call that is answered.

    ids: prompt and reply; computed: how many of them have keys and values; slot: -1 until it is decoded. said: text that is
    kept for `tools`; pending, shown: logprobs not yet told, tokens told.
    """

    call: Call
    attached: Attached
    ids: list[int]
    prompt_tokens: int
    chooser: Chooser
    spelling: Spelling
    lease: Lease = field(default_factory=lambda: Lease(0, [], 0))
    computed: int = 0
    slot: int = -1
    said: str = ""
    pending: list[Logprob] = field(default_factory=list)
    shown: int = 0

    @property
    def reply_tokens(self) -> int:
        """Tokens of the reply until now."""
        return len(self.ids) - self.prompt_tokens

    @property
    def holds_text(self) -> bool:
        """Whether nothing is shown before the reply is whole: it may be a tool call."""
        return bool(self.call.tools)

    def write(self, token: int, logits: torch.Tensor, tokenizer: Any) -> list[Event]:
        """Take a token that is no stop token; the piece of text that can be shown by it, if any. logits: (V,) it came from."""
        self.ids.append(token)
        self.chooser.take(token)
        if self.call.top_logprobs >= 0:
            self.pending.append(logprob(tokenizer, logits, token, self.call.top_logprobs))
        return self._piece(self.spelling.add(token))

    def end(self, finish: Finish, tools: Tools | None) -> list[Event]:
        """What was held back, and Done."""
        events = self._piece(self.spelling.end()) if finish != "cancelled" else []
        calls: Sequence[Mapping[str, Any]] = ()
        if self.holds_text and finish != "cancelled":
            calls = tools.parse(self.said) if tools is not None else ()
            events = [] if calls or not self.said else [self._shown(self.said)]
        cached = self.lease.cached
        return [*events, Done(self.call.id, finish, self.prompt_tokens, self.reply_tokens, cached, tuple(calls))]

    def _piece(self, text: str) -> list[Event]:
        if self.holds_text:
            self.said += text
            return []
        return [self._shown(text)] if text else []

    def _shown(self, text: str) -> Piece:
        tokens, self.shown = self.reply_tokens - self.shown, self.reply_tokens
        logprobs, self.pending = tuple(self.pending), []
        return Piece(self.call.id, text, tokens, logprobs)
