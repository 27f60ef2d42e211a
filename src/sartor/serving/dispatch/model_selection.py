"""Selection of the versions that may answer a model name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from sartor.core.errors import KeyRefusedError, RequestError, SartorError, UnavailableError, UnknownAgentError
from sartor.media.content_parts import kinds_in
from sartor.serving.dispatch.rollout import in_fraction
from sartor.serving.registry.registry_schema import Agent, AgentVersion
from sartor.serving.types import AgentRequest, Router, RoutingDecision

BASE_AGENT = "base"
AUTO = "auto"
# Takes an exact version or `base`; returns its modalities besides text
Reads = Callable[[str], Collection[str]]


class ReasonKind(Enum):
    """Kind of one part of the reason for the choice of a version."""

    NAMED = auto()  # the client named it
    ROUTED = auto()  # chosen for `auto`, by the router or without one
    CANARY = auto()  # the request falls into the canary fraction of the version on trial
    NO_VERSION = auto()  # the agent has no live version
    FALLBACK = auto()  # it answers instead of a version that cannot
    FAILED = auto()  # the earlier candidates could not answer
    PERSONAL = auto()  # it is the user's personal version
    PERSONAL_UNUSED = auto()  # the user's personal version cannot be used


class Reason(NamedTuple):
    """One part of the reason for the choice of a version.

    detail: text for the client.
    """

    kind: ReasonKind
    detail: str


def join_reasons(reasons: Sequence[Reason]) -> str:
    """Return reasons as one text, for headers and receipts."""
    return "; ".join(reason.detail for reason in reasons)


@dataclass(frozen=True)
class Candidate:
    """Version that may answer: an exact version or `base`, with the reasons.

    personal_version: the user's personal version if this is one, else None.
    """

    agent: str
    reasons: tuple[Reason, ...]
    personal_version: AgentVersion | None = None


_BY_NAME = Reason(ReasonKind.NAMED, "asked by name")


@dataclass(frozen=True)
class CandidateList:
    """Versions that may answer a request, in order of preference.

    scores: of the router, for `auto` only.
    """

    candidates: Sequence[Candidate]
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Modalities:
    """Modalities of a request besides text, and the agents that support them.

    reads: returns the modalities of a version. readers: agents that support the request, for the remedy.
    """

    kinds: Collection[str]
    reads: Reads
    readers: Sequence[str] = ()

    def fit(self, agent: str) -> bool:
        """Return whether an exact version or the base supports all modalities of the request."""
        return set(self.kinds) <= set(self.reads(agent))

    def check(self, agent: str) -> None:
        """Raise RequestError if `agent` does not support all modalities of the request."""
        if not self.fit(agent):
            reads = ", ".join(["text", *sorted(self.reads(agent))])
            raise RequestError(f"{agent} reads {reads}, and the request holds {' and '.join(self.kinds)}", self.remedy)

    @property
    def remedy(self) -> str:
        """Another model to request, as text."""
        return f'"model": "{self.readers[0]}"' if self.readers else "send text: no agent that you may ask reads that"


async def select_candidates(
    request: AgentRequest, agents: Mapping[str, Agent], router: Router | None, id: str, reads: Reads = lambda agent: ()
) -> CandidateList:
    """Return the versions that may answer `request`.

    id: decides whether the request falls into a canary fraction.
    Raises UnknownAgentError for an unknown name; KeyRefusedError if the client's key does not open it; RequestError if
    the version does not support the request's modalities; UnavailableError for an agent that is draining or cannot
    answer.
    """
    kinds = kinds_in(request.messages)
    modalities = Modalities(kinds, reads)
    if kinds:
        readers = [
            name
            for name, agent in agents.items()
            if _is_choosable(request, agent) and modalities.fit(f"{name}@{agent.live}")
        ]
        modalities = Modalities(kinds, reads, readers)
    name, separator, version = request.model.partition("@")
    if request.model == BASE_AGENT:
        modalities.check(BASE_AGENT)
        return CandidateList([Candidate(BASE_AGENT, (_BY_NAME,))])
    if request.model == AUTO:
        return await _select_routed(request, agents, router, id=id, modalities=modalities)
    agent = _openable_agent(request, agents, name)
    if not separator:
        return CandidateList(list(_chain(agent, (_BY_NAME,), id, modalities)))
    if version not in agent.versions:
        raise UnknownAgentError(
            f"{name} has no version {version[:80]!r} that is served; there are: {', '.join(agent.versions) or 'none'}",
            f'"model": "{name}"',
        )
    modalities.check(request.model)
    return CandidateList([Candidate(request.model, (Reason(ReasonKind.NAMED, "asked by name and version"),))])


def _is_choosable(request: AgentRequest, agent: Agent) -> bool:
    """Return whether `auto` may choose the agent for this client."""
    return agent.state == "serving" and (request.openable is None or agent.name in request.openable)


def _openable_agent(request: AgentRequest, agents: Mapping[str, Agent], name: str) -> Agent:
    openable = [other for other in agents if request.openable is None or other in request.openable]
    if name not in agents:
        raise UnknownAgentError(
            f"there is no agent {name[:80]!r}; there are: {', '.join([BASE_AGENT, AUTO, *openable])}",
            '"model": "auto"',
        )
    if name not in openable:
        raise KeyRefusedError(f"this key does not open {name!r}", "send a key of that agent")
    if agents[name].state == "draining":
        raise UnavailableError(
            f"{name} takes no requests: it is being drained",
            f'"model": "auto", or after sartor agents promote {name} VERSION the same request again',
        )
    if not agents[name].live and BASE_AGENT not in agents[name].fallback:
        reason = agents[name].note or "it has no version"
        raise UnavailableError(
            f"{name} cannot answer: {reason}", "sartor agents list says more; sartor agents add RELEASE"
        )
    return agents[name]


async def _select_routed(
    request: AgentRequest, agents: Mapping[str, Agent], router: Router | None, id: str, modalities: Modalities
) -> CandidateList:
    """Return the candidates for `auto`: the agent that the router chooses among those that support the modalities.

    If the router fails, the base is chosen, and the reason says so.
    """
    openable = {name for name, agent in agents.items() if _is_choosable(request, agent)}
    if modalities.kinds:
        openable &= set(modalities.readers)
    if router is None or not openable:
        modalities.check(BASE_AGENT)
        return CandidateList([Candidate(BASE_AGENT, _routed_by("there is nobody to choose from"))])
    messages = request.messages or ({"role": "user", "content": request.text},)
    try:
        decision = await router.route(messages, openable)
    except SartorError as error:
        decision = RoutingDecision(BASE_AGENT, f"the router failed: {error.problem}")
    reasons = _routed_by(decision.reason)
    if decision.agent in openable:
        return CandidateList(list(_chain(agents[decision.agent], reasons, id, modalities)), decision.scores)
    if modalities.fit(BASE_AGENT):
        return CandidateList([Candidate(BASE_AGENT, reasons)], decision.scores)
    return _select_unrouted(decision, agents, id, modalities)


def _select_unrouted(
    decision: RoutingDecision, agents: Mapping[str, Agent], id: str, modalities: Modalities
) -> CandidateList:
    """Return candidates if no agent was chosen and the base does not support the modalities.

    An agent that the router found fitting answers, even if it is no better than the base. If the router gave no
    scores, the only supporting agent answers.
    Raises RequestError if neither holds.
    """
    kinds = " and ".join(modalities.kinds)
    if decision.fits:
        reasons = _routed_by(f"{decision.reason}, and the base reads no {kinds}")
        return CandidateList(list(_chain(agents[decision.fits], reasons, id, modalities)), decision.scores)
    if not decision.scores and len(modalities.readers) == 1:
        reasons = (
            *_routed_by(decision.reason),
            Reason(ReasonKind.ROUTED, f"{modalities.readers[0]} alone reads {kinds}"),
        )
        return CandidateList(list(_chain(agents[modalities.readers[0]], reasons, id, modalities)))
    raise RequestError(
        f"auto chose no agent, and the base reads no {kinds}: {decision.reason}",
        f"name one that does: {', '.join(modalities.readers)}",
    )


def _routed_by(detail: str) -> tuple[Reason, ...]:
    return (Reason(ReasonKind.ROUTED, f"auto: {detail}"),)


def _chain(agent: Agent, reasons: tuple[Reason, ...], id: str, modalities: Modalities) -> Iterator[Candidate]:
    """Yield the version on trial if drawn, the live one, then the fallbacks; only those that support the modalities.

    Raises RequestError if the live version does not support them.
    """
    trial = f"{agent.name}@{agent.candidate}"
    if agent.candidate and in_fraction(agent.canary_fraction, trial, id) and modalities.fit(trial):
        canary = Reason(ReasonKind.CANARY, f"canary, {agent.canary_fraction:g} of the requests")
        yield Candidate(trial, (*reasons, canary))
    if agent.live:
        modalities.check(f"{agent.name}@{agent.live}")
        yield Candidate(f"{agent.name}@{agent.live}", reasons)
    else:
        reasons = (*reasons, Reason(ReasonKind.NO_VERSION, f"{agent.name} has no version: {agent.note}"))
    for step in agent.fallback:
        if step == "previous" and agent.previous and modalities.fit(f"{agent.name}@{agent.previous}"):
            yield Candidate(
                f"{agent.name}@{agent.previous}", (Reason(ReasonKind.FALLBACK, "the previous version steps in"),)
            )
        elif step == BASE_AGENT and modalities.fit(BASE_AGENT):
            fallback = Reason(ReasonKind.FALLBACK, "the base steps in")
            yield Candidate(BASE_AGENT, (fallback,) if agent.live else (*reasons, fallback))
