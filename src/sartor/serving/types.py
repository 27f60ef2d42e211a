"""Request, Answer and protocols between front and workers.

http/ --Request--> dispatcher.py --Call--> supervisor.py --JSON--> worker_main.py (an engine)
      <--Answer--                <--Event--              <--JSON--
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sartor.inference.engine import EngineInfo, Event, GenerateCall, ReplyDone


@dataclass(frozen=True)
class AgentRequest:
    """One request as a client made it, checked for form.

    model: name, name@version, base or auto. sampling: the options that the client gave; the Release's own hold for the
    rest. messages or text, schema, tools, must_call, top_logprobs: as in `Call`; of tools None is those of the team
    and the Release for the agent, () is none. openable: the agents that the client's key opens
    (None: all); `auto` chooses among these. deadline_s: seconds from now. person: whom the client speaks for, as the
    registry knows them; "" for nobody. streams: the client is told the reply as it is made.
    """

    model: str
    messages: tuple[Mapping[str, Any], ...] = ()
    text: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    schema: str = ""
    tools: tuple[Mapping[str, Any], ...] | None = None
    must_call: str = ""
    top_logprobs: int = -1
    openable: frozenset[str] | None = None
    deadline_s: float = 120.0
    person: str = ""
    streams: bool = False


class EventStream(Protocol):
    """The events of one reply, an async iterator. `aclose` cancels it, may be called at any time and more than
    once.
    """

    def __aiter__(self) -> AsyncIterator[Event]:
        """Itself."""
        ...

    async def __anext__(self) -> Event:
        """The next event; StopAsyncIteration after Done or Failed."""
        ...

    async def aclose(self) -> None:
        """The client wants no more."""
        ...


@dataclass
class AgentReply:
    """A reply that has begun: its first event is there, so a failure before it was raised and not answered.

    agent: the exact version that answers, `name@version`, or `base@` and 12 digits of its digest. reason: why that
    one.
    receipt: the id under which the receipt will be found once the reply is done. events: Piece..., then Done or
    Failed; closing the iterator cancels the reply.
    """

    agent: str
    reason: str
    receipt: str
    events: EventStream


class Replier(Protocol):
    """Answers requests: the dispatcher, and each layer around it."""

    async def open(self, request: AgentRequest) -> AgentReply:
        """Begin a reply; returns when its first event is there."""
        ...


@dataclass(frozen=True)
class EmbeddingResult:
    """Texts as vectors of unit length. tokens: that were read. cut: places of texts whose end is not in their
    vector.
    """

    vectors: list[list[float]]
    tokens: int = 0
    cut: tuple[int, ...] = ()


class WorkerBackend(Protocol):
    """Who computes: the supervised workers, as `dispatch` sees them. `agent` is an exact version, `name@version` or
    `base`.
    """

    @property
    def about(self) -> EngineInfo:
        """The engine that every worker holds."""
        ...

    async def attach(self, adapter: str, path: Path) -> None:
        """Load an admitted adapter in every worker, now and after each restart. Raises ModelError, BudgetError."""
        ...

    async def detach(self, adapter: str) -> None:
        """Forget it, once no call of it lives."""
        ...

    async def reply(self, call: GenerateCall, agent: str, deadline_s: float) -> AsyncIterator[Event]:
        """Begin a reply; returns when its first event is there.

        Raises BusyError, DeadlineError, UnavailableError (the agent's breaker is open, or no worker lives), or the
        error that the first event told. A worker's death does not show: the call is made again by another and goes on
        where it was. Closing the iterator cancels the call.
        """
        ...

    async def embed(self, texts: Sequence[str], encoder: str) -> EmbeddingResult:
        """Vectors of unit length by the base (`base`) or an encoder that the façade offers (`minilm`, `tfidf`, a
        directory).
        """
        ...

    async def renew(self) -> None:
        """Replace every worker, one after the other, so that nothing stays in memory of what was asked and said."""
        ...

    def blame(self, agent: str, reason: str) -> None:
        """Count a failure that only its holder could see (an answer of the wrong form, say) against an agent's
        breaker.
        """
        ...

    def release(self, agent: str) -> None:
        """Take an agent out of quarantine."""
        ...

    def health(self) -> Mapping[str, Any]:
        """Workers (state, pid, memory_bytes, restarts), agents (breaker, queued, live), for /health and /metrics."""
        ...


@dataclass(frozen=True)
class RoutingDecision:
    """What `auto` chose: an agent's name or `base`, why in a sentence, and the score of each agent.

    fits: whose request it is, where the base was chosen because that agent is no better by its Report; else "".
    """

    agent: str
    reason: str
    scores: Mapping[str, float] = field(default_factory=dict)
    fits: str = ""


class Router(Protocol):
    """Who chooses the agent for a request that names none."""

    async def learn(self, releases: Mapping[str, Path]) -> None:
        """Know these agents, by the directories of their live Releases; called at the start and whenever one changes.

        An agent whose Release says nothing to it is never chosen; that is no error.
        """
        ...

    async def route(self, messages: Sequence[Mapping[str, Any]], openable: Collection[str]) -> RoutingDecision:
        """The agent among `openable` that these messages are for, or `base`."""
        ...


@dataclass(frozen=True)
class FinishedReply:
    """A reply that has ended, for its receipt. agent: the exact version; release_id: "" for the base. done: None if it
    failed.

    call: what was computed, the Release's system prompt and sampling in it. began: seconds since the epoch. person:
    whose personal version answered, "" for none; release_id is then of the Release that it stands on. steps: of a
    plan's answer, the receipts of its steps.
    """

    receipt: str
    agent: str
    reason: str
    release_id: str
    call: GenerateCall
    text: str
    done: ReplyDone | None
    scores: Mapping[str, float]
    began: float
    person: str = ""
    steps: tuple[str, ...] = ()


class ReceiptWriter(Protocol):
    """Where the receipts of replies are kept."""

    def write(self, finished: FinishedReply) -> None:
        """Sign and keep one. Called in a thread; what it raises is counted and hurts no reply."""
        ...


@dataclass(frozen=True)
class AgentListing:
    """An agent as it is served. versions: every one that may be asked for by `name@version`, the live one too.

    is_ready: whether a version of it was ever admitted, so that somebody answers in its name. reads: by version, of
    `image` and `audio` those that it reads beside text.
    """

    name: str
    live: str
    versions: tuple[str, ...]
    state: Mapping[str, Any] = field(default_factory=dict)
    is_ready: bool = True
    reads: Mapping[str, Sequence[str]] = field(default_factory=dict)
