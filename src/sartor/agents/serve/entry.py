"""What is known of one request by the time it ends: for its log line, the numbers and the trace. Never its content."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from sartor.agents.keys import Opened
from sartor.agents.serve.seams import NOBODY
from sartor.inference.engine import Done, Event, Piece


@dataclass
class Usage:
    """Tokens of a request's replies together. reply: counted while they come, so that a reply that is cut counts too."""

    prompt: int = 0
    reply: int = 0
    cached: int = 0

    @property
    def total(self) -> int:
        """What a rate counts."""
        return self.prompt + self.reply

    def as_json(self) -> dict[str, object]:
        """OpenAI's usage."""
        said = {"prompt_tokens": self.prompt, "completion_tokens": self.reply, "total_tokens": self.total}
        return {**said, "prompt_tokens_details": {"cached_tokens": self.cached}}


@dataclass
class Entry:
    """One request. agent: the exact version that answered, "" before. error: the kind of the error that ended it."""

    id: str
    method: str
    route: str = ""
    visitor: Opened = NOBODY
    agent: str = ""
    receipt: str = ""
    finish: str = ""
    status: int = 0
    error: str = ""
    usage: Usage = field(default_factory=Usage)
    began: float = field(default_factory=time.monotonic)
    first_s: float | None = None

    def hear(self, event: Event, prompt_is_new: bool = True) -> None:
        """Count an event of a reply. prompt_is_new: several replies to one prompt have its tokens once."""
        if isinstance(event, Piece):
            self.usage.reply += event.tokens
            if self.first_s is None:
                self.first_s = self.elapsed_s
        elif isinstance(event, Done):
            self.finish = event.finish
            if prompt_is_new:
                self.usage.prompt += event.prompt_tokens
                self.usage.cached += event.cached_tokens

    @property
    def elapsed_s(self) -> float:
        """Since the request's head was read."""
        return time.monotonic() - self.began
