"""Protocols and container of what HTTP needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sartor.inference.engine import EngineInfo
from sartor.serving.api_keys import Principal
from sartor.serving.http.speech_service import OFF, SpeechService
from sartor.serving.team_config import SpeechOptions
from sartor.serving.types import AgentListing, EmbeddingResult, Replier

NOBODY = Principal("", frozenset(), is_admin=False)
ANYBODY = Principal("", None, is_admin=False, speaks_for=None)


class EmbeddingBackend(Protocol):
    """Who embeds, and who computes: of `Crew`, what this front uses itself."""

    @property
    def about(self) -> EngineInfo:
        """The engine that every worker holds."""
        ...

    async def embed(self, texts: Sequence[str], encoder: str) -> EmbeddingResult:
        """Vectors of unit length."""
        ...

    def health(self) -> Mapping[str, Any]:
        """Workers and agents, as /health and /metrics tell them."""
        ...


class Authenticator(Protocol):
    """The keys, of agents and of the admin. Asked in a thread: they are read from a database."""

    @property
    def is_open(self) -> bool:
        """Whether no key is set, so that who reaches the server may ask (and it binds to loopback only).

        Raises UnavailableError where there were keys, and nobody can be let in until they are there again.
        """
        ...

    @property
    def has_admin(self) -> bool:
        """Whether an admin key is set; without one the admin's routes are off."""
        ...

    def admit(self, secret: str) -> Principal:
        """Who holds this key. Raises KeyRefusedError."""
        ...


class RateLimits(Protocol):
    """What each key has used of its rates."""

    def begin(self, key: str) -> None:
        """Count a request. Raises BusyError when the rate of requests or tokens is used up."""
        ...

    def count(self, key: str, tokens: int) -> None:
        """Count what a reply took."""
        ...


class AgentAdminProtocol(Protocol):
    """The agents: what may be asked for, and what the admin changes. The changes return what is live afterwards."""

    async def listed(self) -> Sequence[AgentListing]:
        """Every agent."""
        ...

    async def promote(self, name: str, release: str, version: str, expected: str | None) -> Mapping[str, Any]:
        """Make a Release (a directory) or a registered version live, if `expected` is live now (None: whatever is).

        Raises ConflictError, AdmissionError, UnknownAgentError.
        """
        ...

    async def rollback(self, name: str, expected: str | None) -> Mapping[str, Any]:
        """Make the version live that was before. Raises ConflictError, UnknownAgentError."""
        ...

    async def drain(self, name: str) -> Mapping[str, Any]:
        """Take an agent out of service: what runs ends, what comes is refused."""
        ...

    async def release(self, name: str) -> Mapping[str, Any]:
        """Bring an agent back from quarantine or drain."""
        ...

    async def hear(self, agent: str, rating: float) -> None:
        """Tell the monitors how a person found a reply of that exact version: -1 bad .. 1 good."""
        ...


class ReceiptFinder(Protocol):
    """The receipts that `dispatch` wrote."""

    async def find(self, receipt: str) -> Mapping[str, Any] | None:
        """The signed document of that id, or None. It holds `agent`, the exact version."""
        ...


@dataclass(frozen=True)
class UserDirectory:
    """Users who may have versions of their own. person_of: the id that a client sends -> who that is here, "" for
    nobody.

    listeners: told whom the server is to forget.
    """

    person_of: Callable[[str], str] = lambda user: ""
    listeners: list[Callable[[str], object]] = field(default_factory=list)


@dataclass(frozen=True)
class Services:
    """Everything behind the server.

    troubles: what cannot be served as it should, by agent or version, and why. receipts_lost: how many could not be
    written.
    plans: what may be asked for as an agent is, and is several of them.
    """

    replies: Replier
    workers: EmbeddingBackend
    authenticator: Authenticator
    rates: RateLimits
    agent_admin: AgentAdminProtocol
    receipts: ReceiptFinder
    troubles: Callable[[], Mapping[str, str]] = dict
    receipts_lost: Callable[[], int] = int
    people: UserDirectory = field(default_factory=UserDirectory)
    speech: SpeechService = field(default_factory=lambda: SpeechService(SpeechOptions(voice=OFF)))
    plans: Sequence[AgentListing] = ()
