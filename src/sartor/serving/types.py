"""Requests, replies and protocols between the server's front and its workers.

http/ --AgentRequest--> dispatcher.py --GenerateCall--> supervisor.py --JSON--> worker_main.py (an engine)
      <--AgentReply--                 <--Event--                      <--JSON--
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sartor.core.model_refs import Modality
from sartor.inference.engine import EngineInfo, Event, GenerateCall, ReplyDone


@dataclass(frozen=True)
class AgentRequest:
    """Request of a client, checked for form.

    model: name, name@version, base or auto.
    messages, text, schema, must_call, top_logprobs: as in `GenerateCall`.
    tools: as in `GenerateCall`; None takes the tools that the team and the Release give the agent, () takes none.
    sampling: the options that the client set; the Release's own apply to the rest.
    openable: agents that the client's key opens, None for all; `auto` chooses among these.
    deadline_s: seconds from now.
    person: registry id of the user for whom the client speaks; empty for none.
    key: id of the API key that asks; empty on a server without keys.
    cache_owner: requests of other owners share no cached prompts with this one; empty on a server without keys.
    streams: whether the client receives the reply while it is generated.
    has_team_system: whether the leading system message is the team's own, as in a step of a plan.
    server_turns: number of messages at the end that the server's tool loop added.
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
    key: str = ""
    cache_owner: str = ""
    streams: bool = False
    has_team_system: bool = False
    server_turns: int = 0


class EventStream(Protocol):
    """Events of one reply, as an async iterator.

    `aclose` cancels the reply. It may be called at any time and more than once.
    """

    def __aiter__(self) -> AsyncIterator[Event]:
        """Return the iterator itself."""
        ...

    async def __anext__(self) -> Event:
        """Return the next event. Raises StopAsyncIteration after ReplyDone or ReplyFailed."""
        ...

    async def aclose(self) -> None:
        """Cancel the reply."""
        ...


@dataclass
class AgentReply:
    """Reply that has begun.

    Its first event is there, so an earlier failure was raised as an error.
    agent: the exact version that answers, `name@version`, or `base@` and 12 digits of its digest.
    reason: why this agent was chosen.
    receipt: id of the receipt, which is written when the reply ends.
    events: TextDelta..., then ReplyDone or ReplyFailed; closing the iterator cancels the reply.
    """

    agent: str
    reason: str
    receipt: str
    events: EventStream


class Replier(Protocol):
    """Source of replies: the dispatcher, or a layer around it."""

    async def open(self, request: AgentRequest) -> AgentReply:
        """Begin a reply, and return when its first event is there."""
        ...


@dataclass(frozen=True)
class EmbeddingResult:
    """Embeddings of texts, as vectors of unit length.

    tokens: number of tokens read.
    cut: indices of texts that were truncated.
    """

    vectors: list[list[float]]
    tokens: int = 0
    cut: tuple[int, ...] = ()


class WorkerBackend(Protocol):
    """Supervised workers, as `dispatch` uses them.

    `agent` is an exact version, `name@version`, or `base`.
    """

    @property
    def about(self) -> EngineInfo:
        """Facts of the engine that every worker runs."""
        ...

    async def attach(self, adapter: str, path: Path) -> None:
        """Load an admitted adapter in every worker, now and after each restart.

        Raises ModelError and BudgetError.
        """
        ...

    async def detach(self, adapter: str) -> None:
        """Unload an adapter as soon as no call uses it."""
        ...

    async def reply(self, call: GenerateCall, agent: str, deadline_s: float) -> AsyncIterator[Event]:
        """Begin a reply, and return when its first event is there.

        A worker's death is hidden: another worker repeats the call and continues where it was. Closing the iterator
        cancels the call.
        Raises BusyError, DeadlineError, UnavailableError (the agent's circuit breaker is open, or no worker is alive),
        or the error that the first event reports.
        """
        ...

    async def embed(self, texts: Sequence[str], encoder: str) -> EmbeddingResult:
        """Return embeddings of unit length by the base or by another encoder.

        encoder: `base`, `minilm`, `tfidf` or a directory.
        """
        ...

    async def renew(self) -> None:
        """Replace the workers one after the other, so that no request or reply stays in memory."""
        ...

    def blame(self, agent: str, reason: str) -> None:
        """Count a failure against an agent's circuit breaker that only the caller could see.

        An example is a reply that violates its format.
        """
        ...

    def release(self, agent: str) -> None:
        """Release an agent from quarantine."""
        ...

    def health(self) -> Mapping[str, Any]:
        """Return the state of workers and agents for /health and /metrics.

        workers: state, pid, memory_bytes, restarts. agents: breaker, queued, live.
        """
        ...


@dataclass(frozen=True)
class RoutingDecision:
    """Agent that `auto` chose.

    agent: its name, or `base`.
    reason: one sentence.
    scores: the score of each agent.
    fits: the agent that the request fits, if the base was chosen because its Report shows no gain; else empty.
    """

    agent: str
    reason: str
    scores: Mapping[str, float] = field(default_factory=dict)
    fits: str = ""


class Router(Protocol):
    """Chooser of the agent for a request with the model `auto`."""

    async def learn(self, releases: Mapping[str, Path]) -> None:
        """Learn the agents from the directories of their live Releases.

        It is called at the start and whenever a live Release changes. An agent whose Release has nothing for the
        router is never chosen; that is no error.
        """
        ...

    async def route(self, messages: Sequence[Mapping[str, Any]], openable: Collection[str]) -> RoutingDecision:
        """Return the agent among `openable` that fits these messages, or `base`."""
        ...


@dataclass(frozen=True)
class FinishedReply:
    """Finished reply, with what its receipt needs.

    agent: the exact version.
    release_id: empty for the base.
    call: as computed, with the Release's system prompt and sampling.
    done: None if the reply failed.
    began: seconds since the epoch.
    person: the user whose personal version answered, empty for none; release_id is then that of the Release below it.
    steps: for a plan's answer, the receipts of its steps.
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
    """Store of the receipts of replies."""

    def write(self, finished: FinishedReply) -> None:
        """Sign one receipt and store it.

        It is called in a thread. An error is counted and does not affect the reply.
        """
        ...


@dataclass(frozen=True)
class AgentListing:
    """Agent as it is served.

    versions: every version that `name@version` can name, including the live one.
    is_ready: whether a version was ever admitted, so that requests can be answered.
    reads: by version, the kinds `image` and `audio` that it reads besides text.
    """

    name: str
    live: str
    versions: tuple[str, ...]
    state: Mapping[str, Any] = field(default_factory=dict)
    is_ready: bool = True
    reads: Mapping[str, Sequence[Modality]] = field(default_factory=dict)
