"""One reply being generated: sampling, text, stop."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sartor.inference.constrained_decoding import Constraint
from sartor.inference.engine import Event, Finish, GenerateCall, Logprob, ReplyDone, TextDelta
from sartor.inference.generate import prompt_generator, sample_token, sampling_probabilities
from sartor.inference.local.media_inputs import MediaPrompt
from sartor.inference.tool_calls import CallReader
from sartor.models.chat import ChatTokenizer


class IncrementalDetokenizer:
    """Tokens -> text as it becomes certain: never half a character, and never the beginning of a text that ends the reply."""

    def __init__(self, chat: ChatTokenizer, stops: Sequence[str]) -> None:
        self._chat, self._stops = chat, stops
        self._ids: list[int] = []
        # tokens before `_told` are spelt; those from `_from` on are spelt again with them, since a token's text may hang on it
        self._from = self._told = 0
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """One more token; returns what is certain now. Sets `is_stopped` when a stop text was written."""
        self._ids.append(token)
        before = self._chat.decode(self._ids[self._from : self._told])
        after = self._chat.decode(self._ids[self._from :])
        if len(after) <= len(before) or after.endswith("�"):
            return ""
        self._from, self._told = self._told, len(self._ids)
        return self._until_stop(after[len(before) :])

    def rest(self) -> str:
        """The reply is over: what was held back."""
        spelt = self._chat.decode(self._ids[self._from :])[len(self._chat.decode(self._ids[self._from : self._told])) :]
        said = self._until_stop(spelt) + self._held
        self._held = ""
        return "" if self.is_stopped and not said else said

    def _until_stop(self, text: str) -> str:
        text, self._held = self._held + text, ""
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            return text[: min(places)]
        longest = max((len(stop) for stop in self._stops), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._held = text[-size:]
                return text[:-size]
        return text


@dataclass
class SequenceState:
    """A call in work. number, slot: its adapter's; pages: where its keys and values are; read: prompt tokens that are done."""

    call: GenerateCall
    prompt: list[int]
    chat: ChatTokenizer
    most_tokens: int
    constraint: Constraint | None = None
    number: int = 0
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    read: int = 0
    cached: int = 0
    tokens: list[int] = field(default_factory=list)
    seen: MediaPrompt | None = None

    def __post_init__(self) -> None:
        self._sampling = self.call.sampling
        self._source = prompt_generator(self._sampling)
        self._spelling = IncrementalDetokenizer(self.chat, self._sampling.stop)
        self._calls = CallReader(self.call)
        self._counts: Counter[int] = Counter()
        self._untold: list[Logprob] = []
        self._untold_tokens = 0

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is the next one, and nothing else of the logits is wanted."""
        sampling = self._sampling
        penalised = sampling.frequency_penalty or sampling.presence_penalty
        return sampling.is_greedy and not penalised and self.constraint is None and self.call.top_logprobs < 0

    def choose(self, logits: torch.Tensor) -> int:
        """The next token from logits (V,). Raises RequestError where the schema cannot be obeyed."""
        logits = logits.float().cpu()
        self._note_logprobs = logits if self.call.top_logprobs >= 0 else None
        if self._counts and (self._sampling.frequency_penalty or self._sampling.presence_penalty):
            logits = logits.clone()
            places = torch.tensor(list(self._counts))
            times = torch.tensor([float(count) for count in self._counts.values()])
            logits[places] -= self._sampling.frequency_penalty * times + self._sampling.presence_penalty
        if self.constraint is not None:
            logits = logits.masked_fill(~self.constraint.mask(), -math.inf)
        if self._sampling.is_greedy:
            token = int(logits.argmax())
        else:
            token = sample_token(sampling_probabilities(logits[None], self._sampling)[0], self._source)
        if self._note_logprobs is not None:
            self._untold.append(self._logprob(self._note_logprobs, token))
        return token

    def take(self, token: int) -> list[Event]:
        """The chosen token; returns what can be told, with Done at the end. Raises RequestError as the constraint does."""
        if self.constraint is not None:
            self.constraint.advance(token)
        if token in self.chat.stops:
            self._untold = self._untold[: self._untold_tokens]
            return self.end("stop")
        self.tokens.append(token)
        self._counts[token] += 1
        self._untold_tokens += 1
        said = self._calls.feed(self._spelling.push(token))
        events = self._told(said)
        if self._spelling.is_stopped or (self.constraint is not None and self.constraint.is_done):
            return [*events, *self.end("stop")]
        return [*events, *self.end("length")] if len(self.tokens) >= self.most_tokens else events

    def end(self, finish: Finish) -> list[Event]:
        """The rest of the text and Done."""
        rest = "" if finish == "cancelled" else self._calls.feed(self._spelling.rest())
        last, calls = self._calls.end()
        events: list[Event] = list(self._told(rest + last, at_end=True)) if finish != "cancelled" else []
        done = ReplyDone(self.call.id, finish, len(self.prompt), len(self.tokens), self.cached, calls)
        return [*events, done]

    def _told(self, text: str, *, at_end: bool = False) -> list[Event]:
        if not text and not (at_end and self._untold_tokens):
            return []
        piece = TextDelta(self.call.id, text, self._untold_tokens, tuple(self._untold))
        self._untold, self._untold_tokens = [], 0
        return [piece]

    def _logprob(self, logits: torch.Tensor, token: int) -> Logprob:
        chances = logits.log_softmax(-1)
        values, places = chances.topk(min(self.call.top_logprobs, len(chances)))
        top = tuple((self._shown(int(place)), float(value)) for place, value in zip(places, values, strict=True))
        return Logprob(self._shown(token), float(chances[token]), top)

    def _shown(self, token: int) -> str:
        return str(self.chat.tokenizer.decode([token]))
