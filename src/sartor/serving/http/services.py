"""Protocols and container of the services that HTTP needs."""

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
    """Part of `WorkerBackend` that the HTTP routes use themselves."""

    @property
    def about(self) -> EngineInfo:
        """Description of the engine that every worker runs."""
        ...

    async def embed(self, texts: Sequence[str], encoder: str) -> EmbeddingResult:
        """Return vectors of unit length, one for each text."""
        ...

    def health(self) -> Mapping[str, Any]:
        """Return the state of workers and agents, for /health and /metrics."""
        ...


class Authenticator(Protocol):
    """Store of the API keys of agents and of the admin. It reads a database, so it is called in a thread."""

    @property
    def is_open(self) -> bool:
        """Whether no key is set, so that everybody who reaches the server is admitted. Such a server binds to
        loopback.

        Raises UnavailableError if keys were set and cannot be read; then nobody is admitted until they can.
        """
        ...

    @property
    def has_admin(self) -> bool:
        """Whether an admin key is set; without one the admin's routes are off."""
        ...

    def admit(self, secret: str) -> Principal:
        """Return the principal of a key.

        Raises KeyRefusedError for an unknown key.
        """
        ...


class RateLimits(Protocol):
    """Use of requests and tokens by each key."""

    def begin(self, key: str) -> None:
        """Count a request. Raises BusyError when the rate of requests or tokens is used up."""
        ...

    def count(self, key: str, tokens: int) -> None:
        """Count the tokens of a finished request."""
        ...


class AgentAdminProtocol(Protocol):
    """Listing and administration of agents. The changes return the agent's state afterwards."""

    async def listed(self) -> Sequence[AgentListing]:
        """Return every agent."""
        ...

    async def promote(self, name: str, release: str, version: str, expected: str | None) -> Mapping[str, Any]:
        """Make a Release or a registered version live.

        release: directory; "" if `version` is given. expected: version that must be live now; None for any.
        Raises ConflictError, AdmissionError, UnknownAgentError.
        """
        ...

    async def rollback(self, name: str, expected: str | None) -> Mapping[str, Any]:
        """Make the previous version live again.

        Raises ConflictError, UnknownAgentError.
        """
        ...

    async def drain(self, name: str) -> Mapping[str, Any]:
        """Take an agent out of service: running replies end, new requests are refused."""
        ...

    async def release(self, name: str) -> Mapping[str, Any]:
        """Return an agent to service after quarantine or drain."""
        ...

    async def hear(self, agent: str, rating: float, key: str = "") -> None:
        """Pass a user's rating of a reply by this exact version to the monitors: -1 bad to 1 good.

        key: id of the API key that rates.
        """
        ...


class ReceiptFinder(Protocol):
    """Store of the receipts that `dispatch` wrote."""

    async def find(self, receipt: str) -> Mapping[str, Any] | None:
        """Return the signed receipt with this id, or None. Its `agent` is the exact version."""
        ...


@dataclass(frozen=True)
class UserDirectory:
    """Users who may have personal versions.

    person_of: maps the id that a client sends to the internal id; "" for no user.
    listeners: called with the internal id of a user whose data are to be erased.
    """

    person_of: Callable[[str], str] = lambda user: ""
    listeners: list[Callable[[str], object]] = field(default_factory=list)


@dataclass(frozen=True)
class Services:
    """Services behind the HTTP server.

    troubles: reasons why something cannot be served as configured, by agent or version.
    receipts_lost: number of receipts that could not be written.
    plans: plans, which clients use like agents and which combine several of them.
    frozen_rollouts: version whose trial or watch waits for an admin, by agent.
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
    frozen_rollouts: Callable[[], Mapping[str, str]] = dict
