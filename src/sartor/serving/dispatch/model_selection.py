"""Which versions may answer a model name."""

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
# Of an exact version, or the base: what it reads beside text
Reads = Callable[[str], Collection[str]]


class ReasonKind(Enum):
    """Kind of a part of the answer to why a version answers."""

    NAMED = auto()  # by the client
    ROUTED = auto()  # by the router, or without one
    CANARY = auto()  # the draw gave the request to the version on trial
    NO_VERSION = auto()  # the agent has none that is live
    FALLBACK = auto()  # it steps in for another
    FAILED = auto()  # what came before it could not answer
    PERSONAL = auto()  # it is the user's own version
    PERSONAL_UNUSED = auto()  # the user's own version cannot be used


class Reason(NamedTuple):
    """A part of the answer to why a version answers: its kind, and the words that the client reads."""

    kind: ReasonKind
    detail: str


def join_reasons(reasons: Sequence[Reason]) -> str:
    """Return reasons as the one text that headers and receipts hold."""
    return "; ".join(reason.detail for reason in reasons)


@dataclass(frozen=True)
class Candidate:
    """One who may answer: an exact version, or `base`; and why. personal_version: the version of the person who asks,
    where it is that.
    """

    agent: str
    reasons: tuple[Reason, ...]
    personal_version: AgentVersion | None = None


_BY_NAME = Reason(ReasonKind.NAMED, "asked by name")


@dataclass(frozen=True)
class CandidateList:
    """Who may answer a request, the first that can does. scores: what the router found, of `auto` only."""

    candidates: Sequence[Candidate]
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Modalities:
    """What a request holds beside text, and who reads it. readers: agents that do, for the remedy."""

    kinds: Collection[str]
    reads: Reads
    readers: Sequence[str] = ()

    def fit(self, agent: str) -> bool:
        """Whether an exact version, or the base, reads all of the request."""
        return set(self.kinds) <= set(self.reads(agent))

    def check(self, agent: str) -> None:
        """Raise RequestError where it does not."""
        if not self.fit(agent):
            reads = ", ".join(["text", *sorted(self.reads(agent))])
            raise RequestError(f"{agent} reads {reads}, and the request holds {' and '.join(self.kinds)}", self.remedy)

    @property
    def remedy(self) -> str:
        """What else may be asked."""
        return f'"model": "{self.readers[0]}"' if self.readers else "send text: no agent that you may ask reads that"


async def select_candidates(
    request: AgentRequest, agents: Mapping[str, Agent], router: Router | None, id: str, reads: Reads = lambda agent: ()
) -> CandidateList:
    """Who may answer `request`. `id`: what a canary's draw hangs on.

    Raises UnknownAgentError for a name that nobody has, KeyRefusedError for one that the client's key does not open,
    RequestError where who is asked does not read what the request holds, UnavailableError for an agent that is being
    drained.
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
        return await _select_routed(request, agents, router, id, modalities)
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
    """Whether `auto` may choose it for this client."""
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
    """`auto`: by the text, among those that read all of the request. A router that fails chooses the base, and says
    so.
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
    """No agent was chosen, and the base does not read the request. Without a judgement the only agent that does,
    answers, and so does one that fits and is only no better than a base that could see it.

    Raises RequestError where none fits or several may be meant.
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
    """The version on trial if the draw says so, the live one, then the agent's fall-backs; those that read the
    request.

    Raises RequestError where the live one does not.
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
