"""State of one reply being generated: sampling, text, stop."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sartor.inference.constrained_decoding import Constraint
from sartor.inference.engine import Event, Finish, GenerateCall, Logprob, ReplyDone, TextDelta
from sartor.inference.generate import prompt_generator, sample_token, sampling_probabilities
from sartor.inference.local.kv_cache import CacheScope
from sartor.inference.local.media_inputs import MediaPrompt
from sartor.inference.tool_calls import CallReader
from sartor.models.chat import ChatTokenizer


class IncrementalDetokenizer:
    """Converter of tokens to text that can be shown.

    Its output never ends inside a character or with the beginning of a stop text.
    """

    def __init__(self, chat: ChatTokenizer, stops: Sequence[str]) -> None:
        self._chat, self._stops = chat, stops
        self._ids: list[int] = []
        # Tokens before `_read_offset` are decoded. Those from `_prefix_offset` on are decoded again with the next
        # ones, since a token's text may depend on the tokens before it.
        self._prefix_offset = self._read_offset = 0
        self._pending_text = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain. Sets `is_stopped` after a stop text."""
        self._ids.append(token)
        previous_text = self._chat.decode(self._ids[self._prefix_offset : self._read_offset])
        current_text = self._chat.decode(self._ids[self._prefix_offset :])
        if len(current_text) <= len(previous_text) or current_text.endswith("�"):
            return ""
        self._prefix_offset, self._read_offset = self._read_offset, len(self._ids)
        return self._until_stop(current_text[len(previous_text) :])

    def rest(self) -> str:
        """Return the text held back, at the end of the reply."""
        spelt = self._chat.decode(self._ids[self._prefix_offset :])[
            len(self._chat.decode(self._ids[self._prefix_offset : self._read_offset])) :
        ]
        text = self._until_stop(spelt) + self._pending_text
        self._pending_text = ""
        return "" if self.is_stopped and not text else text

    def _until_stop(self, text: str) -> str:
        text, self._pending_text = self._pending_text + text, ""
        positions = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if positions:
            self.is_stopped = True
            return text[: min(positions)]
        longest = max((len(stop) for stop in self._stops), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._pending_text = text[-size:]
                return text[:-size]
        return text


@dataclass
class SequenceState:
    """A call in work.

    scope: rows with which it shares cache pages.
    slot: that of its adapter.
    pages: cache pages with its keys and values.
    read: number of prompt tokens computed or found in the cache.
    cached: number of prompt tokens found in the cache that rows of the same salt left there. Public ones are not
        counted for a row with a salt, since anybody's call may have left them.
    """

    call: GenerateCall
    prompt: list[int]
    chat: ChatTokenizer
    max_tokens: int
    constraint: Constraint | None = None
    scope: CacheScope = CacheScope(0)
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    read: int = 0
    cached: int = 0
    tokens: list[int] = field(default_factory=list)
    media: MediaPrompt | None = None

    def __post_init__(self) -> None:
        self._sampling = self.call.sampling
        self._generator = prompt_generator(self._sampling)
        self._detokenizer = IncrementalDetokenizer(self.chat, self._sampling.stop)
        self._calls = CallReader(self.call)
        self._counts: Counter[int] = Counter()
        self._pending_logprobs: list[Logprob] = []
        self._pending_tokens = 0

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the most likely one, and nothing else of the logits is needed."""
        sampling = self._sampling
        penalised = sampling.frequency_penalty or sampling.presence_penalty
        return sampling.is_greedy and not penalised and self.constraint is None and self.call.top_logprobs < 0

    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token.

        logits: (V,). Raises RequestError if the schema cannot be obeyed.
        """
        logits = logits.float().cpu()
        self._raw_logits = logits if self.call.top_logprobs >= 0 else None
        if self._counts and (self._sampling.frequency_penalty or self._sampling.presence_penalty):
            # z_v -= frequency_penalty * c_v + presence_penalty, for each token v written c_v > 0 times
            logits = logits.clone()
            token_ids = torch.tensor(list(self._counts))
            counts = torch.tensor([float(count) for count in self._counts.values()])
            logits[token_ids] -= self._sampling.frequency_penalty * counts + self._sampling.presence_penalty
        if self.constraint is not None:
            logits = logits.masked_fill(~self.constraint.mask(), -math.inf)
        if self._sampling.is_greedy:
            token = int(logits.argmax())
        else:
            token = sample_token(sampling_probabilities(logits[None], self._sampling)[0], self._generator)
        if self._raw_logits is not None:
            self._pending_logprobs.append(self._logprob(self._raw_logits, token))
        return token

    def take(self, token: int) -> list[Event]:
        """Add the chosen token; return new events, with ReplyDone at the end of the reply.

        Raises RequestError if the constraint forbids the token.
        """
        if self.constraint is not None:
            self.constraint.advance(token)
        if token in self.chat.stops:
            self._pending_logprobs = self._pending_logprobs[: self._pending_tokens]
            return self.end("stop")
        self.tokens.append(token)
        self._counts[token] += 1
        self._pending_tokens += 1
        text = self._calls.feed(self._detokenizer.push(token))
        events = self._delta_events(text)
        if self._detokenizer.is_stopped or (self.constraint is not None and self.constraint.is_done):
            return [*events, *self.end("stop")]
        return [*events, *self.end("length")] if len(self.tokens) >= self.max_tokens else events

    def end(self, finish: Finish) -> list[Event]:
        """Return the events with the rest of the text and ReplyDone."""
        rest_text = "" if finish == "cancelled" else self._calls.feed(self._detokenizer.rest())
        last, calls = self._calls.end()
        events: list[Event] = list(self._delta_events(rest_text + last, at_end=True)) if finish != "cancelled" else []
        done_event = ReplyDone(
            self.call.id,
            finish,
            prompt_tokens=len(self.prompt),
            reply_tokens=len(self.tokens),
            cached_tokens=self.cached,
            tool_calls=calls,
        )
        return [*events, done_event]

    def _delta_events(self, text: str, *, at_end: bool = False) -> list[Event]:
        if not text and not (at_end and self._pending_tokens):
            return []
        delta = TextDelta(self.call.id, text, self._pending_tokens, tuple(self._pending_logprobs))
        self._pending_logprobs, self._pending_tokens = [], 0
        return [delta]

    def _logprob(self, logits: torch.Tensor, token: int) -> Logprob:
        log_probabilities = logits.log_softmax(-1)
        values, token_ids = log_probabilities.topk(min(self.call.top_logprobs, len(log_probabilities)))
        top = tuple(
            (self._token_text(int(token_id)), float(value)) for token_id, value in zip(token_ids, values, strict=True)
        )
        return Logprob(self._token_text(token), float(log_probabilities[token]), top)

    def _token_text(self, token: int) -> str:
        return str(self.chat.tokenizer.decode([token]))
