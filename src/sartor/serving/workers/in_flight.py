"""Calls in flight, with replay after a worker dies.

Replies are deterministic (greedy, or sampled with a seed). When a worker dies, another one therefore makes the reply
again from its start. The text that the client already has is compared and not sent again, so the client sees one
reply.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from sartor.core.errors import SartorError
from sartor.core.ipc import error_of
from sartor.inference.engine import Event, GenerateCall, Logprob, ReplyDone, ReplyFailed, TextDelta

# The events received from a worker may lag this many tokens behind its state at its death.
_LAG_TOKENS = 2
_SUSPECT_DEATHS, _SUSPECT_DEATHS_ANYWHERE = 2, 3


class ReplayMismatchError(Exception):
    """Replayed reply that differs from the first attempt."""


class ReplayBuffer:
    """Text, tokens and log-probabilities of a reply so far, so that another worker can continue it.

    token_position: tokens of the current attempt.
    """

    def __init__(self) -> None:
        self._text = ""
        self._tokens = 0
        self._logprobs = 0
        self.restart()

    def restart(self) -> None:
        """Begin a new attempt at the reply."""
        self._position = 0
        self.token_position = 0
        self._logprob_position = 0

    def advance(self, delta: TextDelta) -> TextDelta | None:
        """Return the new part of a piece; None if the client has all of it.

        Raises ReplayMismatchError if the piece differs from the earlier attempt.
        """
        sent_text = self._text[self._position : self._position + len(delta.text)]
        if not delta.text.startswith(sent_text):
            raise ReplayMismatchError
        self._position += len(delta.text)
        self.token_position += delta.tokens
        self._logprob_position += len(delta.logprobs)
        text = delta.text[len(sent_text) :]
        tokens = max(0, self.token_position - self._tokens)
        n_new_logprobs = max(0, self._logprob_position - self._logprobs)
        logprobs = delta.logprobs[len(delta.logprobs) - n_new_logprobs :]
        self._text += text
        self._tokens += tokens
        self._logprobs += n_new_logprobs
        return TextDelta(delta.call, text, tokens, logprobs) if text or tokens or logprobs else None

    def end(self) -> None:
        """Record the end of the reply.

        Raises ReplayMismatchError if an earlier attempt was longer.
        """
        if self._position < len(self._text):
            raise ReplayMismatchError


class InFlightCall:
    """One call between its client and the workers.

    trial: whether it tries a half-open breaker.
    number: position in the order of arrival.
    wire_id: id of the current attempt; "" if none runs.
    is_suspect: whether it must run alone in a worker.
    deaths_alone: number of workers that died while they ran only this call.
    """

    def __init__(self, call: GenerateCall, agent: str, trial: bool, number: int) -> None:
        self.call = call
        self.agent = agent
        self.trial = trial
        self.number = number
        self.replay_buffer = ReplayBuffer()
        self.wire_id = ""
        self.began_at = time.monotonic()
        self.finished = asyncio.Event()
        self.is_suspect = False
        self.deaths_alone = 0
        self.timer: asyncio.TimerHandle | None = None
        self._deaths: list[int] = []
        self._pieces: list[TextDelta] = []
        self._final_event: ReplyDone | ReplyFailed | None = None
        self._untaken_since = 0.0
        self._has_event = asyncio.Event()

    @property
    def untaken_s(self) -> float:
        """Seconds for which the client has left pieces unread; 0 if it has read all."""
        return time.monotonic() - self._untaken_since if self._pieces else 0.0

    def add_event(self, event: Event) -> None:
        """Keep an event for the client."""
        if isinstance(event, TextDelta):
            if not self._pieces:
                self._untaken_since = time.monotonic()
            self._pieces.append(event)
        else:
            self._final_event = event
        self._has_event.set()

    def died(self) -> None:
        """Record the death of the worker that made this reply.

        A call that kills workers probably does so at the same position each time. It is suspected at the second death
        at
        one position, or the third anywhere. Innocent calls in the same workers had reached different positions.
        """
        position = self.replay_buffer.token_position
        deaths_nearby = 1 + sum(abs(position - death) <= _LAG_TOKENS for death in self._deaths)
        self._deaths.append(position)
        self.is_suspect = deaths_nearby >= _SUSPECT_DEATHS or len(self._deaths) >= _SUSPECT_DEATHS_ANYWHERE
        self.restart()

    def restart(self) -> None:
        """Reset the call for a new attempt from the start."""
        self.replay_buffer.restart()
        self.wire_id = ""

    async def wait(self) -> None:
        """Return when there is an event to take."""
        while not self._pieces and self._final_event is None:
            self._has_event.clear()
            await self._has_event.wait()

    def error(self) -> SartorError | None:
        """Return the error if the reply failed and no pieces are left to take; else None."""
        if self._pieces or not isinstance(self._final_event, ReplyFailed):
            return None
        return error_of(self._final_event.kind, self._final_event.problem, self._final_event.remedy)

    def take(self) -> Event:
        """Return all waiting pieces as one, or else the final event. Call `wait` first."""
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            return merge_pieces(pieces)
        assert self._final_event is not None, "wait() before take()"
        return self._final_event


def merge_pieces(pieces: Sequence[TextDelta]) -> TextDelta:
    """Return consecutive pieces as one."""
    if len(pieces) == 1:
        return pieces[0]
    logprobs: tuple[Logprob, ...] = tuple(logprob for piece in pieces for logprob in piece.logprobs)
    return TextDelta(
        pieces[0].call, "".join(piece.text for piece in pieces), sum(piece.tokens for piece in pieces), logprobs
    )


class InFlightEvents:
    """Client's side of an InFlightCall: an async iterator of its events.

    It ends after ReplyDone or ReplyFailed. `aclose` cancels the reply.
    """

    def __init__(self, in_flight: InFlightCall, cancel: Callable[[InFlightCall], None]) -> None:
        self._in_flight = in_flight
        self._cancel = cancel
        self._ended = False

    def __aiter__(self) -> InFlightEvents:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        try:
            await self._in_flight.wait()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        event = self._in_flight.take()
        self._ended = not isinstance(event, TextDelta)
        return event

    async def aclose(self) -> None:
        """Cancel the reply."""
        self._ended = True
        self._cancel(self._in_flight)
