"""Calls in flight with replay after a worker dies.

Replies are deterministic (greedy, or drawn by a seed), so when a worker dies the call is made again from the start by
another; what was already said is compared and not said twice. The client sees one reply.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from sartor.core.errors import SartorError
from sartor.core.ipc import error_of
from sartor.inference.engine import Event, GenerateCall, Logprob, ReplyDone, ReplyFailed, TextDelta

# What a worker said may lie this many tokens behind what it did when it died.
_LAG_TOKENS = 2
_SUSPECT_DEATHS, _SUSPECT_DEATHS_ANYWHERE = 2, 3


class ReplayMismatchError(Exception):
    """A reply that was made again is another one."""


class ReplayBuffer:
    """All that was said of one reply, so that another worker can go on where the first one stopped."""

    def __init__(self) -> None:
        self._text = ""
        self._tokens = 0
        self._logprobs = 0
        self.restart()

    def restart(self) -> None:
        """The reply is made again from its start."""
        self._at = 0
        self.at_tokens = 0
        self._at_logprobs = 0

    def more(self, piece: TextDelta) -> TextDelta | None:
        """What of a piece is new. Raises DiffersError when it is not what was said before."""
        known = self._text[self._at : self._at + len(piece.text)]
        if not piece.text.startswith(known):
            raise ReplayMismatchError
        self._at += len(piece.text)
        self.at_tokens += piece.tokens
        self._at_logprobs += len(piece.logprobs)
        text = piece.text[len(known) :]
        tokens = max(0, self.at_tokens - self._tokens)
        fresh = max(0, self._at_logprobs - self._logprobs)
        logprobs = piece.logprobs[len(piece.logprobs) - fresh :]
        self._text += text
        self._tokens += tokens
        self._logprobs += fresh
        return TextDelta(piece.call, text, tokens, logprobs) if text or tokens or logprobs else None

    def end(self) -> None:
        """The reply is whole. Raises DiffersError when more had been said before."""
        if self._at < len(self._text):
            raise ReplayMismatchError


class InFlightCall:
    """One call between its client and the workers. `wire_id` names the attempt that counts; "" when none runs."""

    def __init__(self, call: GenerateCall, agent: str, trial: bool, number: int) -> None:
        self.call = call
        self.agent = agent
        self.trial = trial
        self.number = number
        self.story = ReplayBuffer()
        self.wire_id = ""
        self.began_at = time.monotonic()
        self.over = asyncio.Event()
        self.is_suspect = False
        self.deaths_alone = 0
        self.timer: asyncio.TimerHandle | None = None
        self._deaths: list[int] = []
        self._pieces: list[TextDelta] = []
        self._last: ReplyDone | ReplyFailed | None = None
        self._untaken_since = 0.0
        self._news = asyncio.Event()

    @property
    def untaken_s(self) -> float:
        """For how long its client has not taken what is there; 0 when all is taken."""
        return time.monotonic() - self._untaken_since if self._pieces else 0.0

    def say(self, event: Event) -> None:
        """Keep an event for the client."""
        if isinstance(event, TextDelta):
            if not self._pieces:
                self._untaken_since = time.monotonic()
            self._pieces.append(event)
        else:
            self._last = event
        self._news.set()

    def died(self) -> None:
        """A worker died while it made this reply.

        What kills a worker is likely to do so at the same place of the same reply each time. A call is suspected at the second
        death at one place, or the third anywhere: others that were there by chance had got to different places.
        """
        at = self.story.at_tokens
        here = 1 + sum(abs(at - place) <= _LAG_TOKENS for place in self._deaths)
        self._deaths.append(at)
        self.is_suspect = here >= _SUSPECT_DEATHS or len(self._deaths) >= _SUSPECT_DEATHS_ANYWHERE
        self.again()

    def again(self) -> None:
        """It is to be made from its start."""
        self.story.restart()
        self.wire_id = ""

    async def wait(self) -> None:
        """Return when there is something to take."""
        while not self._pieces and self._last is None:
            self._news.clear()
            await self._news.wait()

    def error(self) -> SartorError | None:
        """The error, if that is all there is to take."""
        if self._pieces or not isinstance(self._last, ReplyFailed):
            return None
        return error_of(self._last.kind, self._last.problem, self._last.remedy)

    def take(self) -> Event:
        """What is there: all pieces as one, or the end."""
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            return merge_pieces(pieces)
        assert self._last is not None, "wait() before take()"
        return self._last


def merge_pieces(pieces: Sequence[TextDelta]) -> TextDelta:
    """Pieces that follow each other, as one."""
    if len(pieces) == 1:
        return pieces[0]
    logprobs: tuple[Logprob, ...] = tuple(logprob for piece in pieces for logprob in piece.logprobs)
    return TextDelta(pieces[0].call, "".join(piece.text for piece in pieces), sum(piece.tokens for piece in pieces), logprobs)


class InFlightEvents:
    """The client's side of a LiveCall: an async iterator that ends after Done or Failed; `aclose` cancels the reply."""

    def __init__(self, live: InFlightCall, cancel: Callable[[InFlightCall], None]) -> None:
        self._live = live
        self._cancel = cancel
        self._ended = False

    def __aiter__(self) -> InFlightEvents:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        try:
            await self._live.wait()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        event = self._live.take()
        self._ended = not isinstance(event, TextDelta)
        return event

    async def aclose(self) -> None:
        """The client wants no more."""
        self._ended = True
        self._cancel(self._live)
