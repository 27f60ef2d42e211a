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
    """One who may answer: an exact version, or `base`; and why. own: the version of the person who asks, where it is that."""

    agent: str
    reasons: tuple[Reason, ...]
    own: AgentVersion | None = None


_BY_NAME = Reason(ReasonKind.NAMED, "asked by name")


@dataclass(frozen=True)
class CandidateList:
    """Who may answer a request, the first that can does. scores: what the router found, of `auto` only."""

    choices: Sequence[Candidate]
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Modalities:
    """What a request holds beside text, and who reads it. others: agents that do, for the remedy."""

    kinds: Collection[str]
    reads: Reads
    others: Sequence[str] = ()

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
        return f'"model": "{self.others[0]}"' if self.others else "send text: no agent that you may ask reads that"


async def select_candidates(
    request: AgentRequest, agents: Mapping[str, Agent], router: Router | None, id: str, reads: Reads = lambda agent: ()
) -> CandidateList:
    """Who may answer `request`. `id`: what a canary's draw hangs on.

    Raises UnknownAgentError for a name that nobody has, KeyRefusedError for one that the client's key does not open,
    RequestError where who is asked does not read what the request holds, UnavailableError for an agent that is being drained.
    """
    kinds = kinds_in(request.messages)
    senses = Modalities(kinds, reads)
    if kinds:
        able = [name for name, agent in agents.items() if _may(request, agent) and senses.fit(f"{name}@{agent.live}")]
        senses = Modalities(kinds, reads, able)
    name, at, version = request.model.partition("@")
    if request.model == BASE_AGENT:
        senses.check(BASE_AGENT)
        return CandidateList([Candidate(BASE_AGENT, (_BY_NAME,))])
    if request.model == AUTO:
        return await _routed(request, agents, router, id, senses)
    agent = _opened(request, agents, name)
    if not at:
        return CandidateList(list(_chain(agent, (_BY_NAME,), id, senses)))
    if version not in agent.versions:
        raise UnknownAgentError(
            f"{name} has no version {version[:80]!r} that is served; there are: {', '.join(agent.versions) or 'none'}",
            f'"model": "{name}"',
        )
    senses.check(request.model)
    return CandidateList([Candidate(request.model, (Reason(ReasonKind.NAMED, "asked by name and version"),))])


def _may(request: AgentRequest, agent: Agent) -> bool:
    """Whether `auto` may choose it for this client."""
    return agent.state == "serving" and (request.openable is None or agent.name in request.openable)


def _opened(request: AgentRequest, agents: Mapping[str, Agent], name: str) -> Agent:
    openable = [other for other in agents if request.openable is None or other in request.openable]
    if name not in agents:
        raise UnknownAgentError(
            f"there is no agent {name[:80]!r}; there are: {', '.join([BASE_AGENT, AUTO, *openable])}", '"model": "auto"'
        )
    if name not in openable:
        raise KeyRefusedError(f"this key does not open {name!r}", "send a key of that agent")
    if agents[name].state == "draining":
        raise UnavailableError(f"{name} takes no requests: it is being drained", "ask later, or another agent")
    if not agents[name].live and BASE_AGENT not in agents[name].fallback:
        why = agents[name].note or "it has no version"
        raise UnavailableError(f"{name} cannot answer: {why}", "sartor agents list says more; sartor agents add RELEASE")
    return agents[name]


async def _routed(
    request: AgentRequest, agents: Mapping[str, Agent], router: Router | None, id: str, senses: Modalities
) -> CandidateList:
    """`auto`: by the text, among those that read all of the request. A router that fails chooses the base, and says so."""
    openable = {name for name, agent in agents.items() if _may(request, agent)}
    if senses.kinds:
        openable &= set(senses.others)
    if router is None or not openable:
        senses.check(BASE_AGENT)
        return CandidateList([Candidate(BASE_AGENT, _routed_by("there is nobody to choose from"))])
    messages = request.messages or ({"role": "user", "content": request.text},)
    try:
        route = await router.route(messages, openable)
    except SartorError as error:
        route = RoutingDecision(BASE_AGENT, f"the router failed: {error.problem}")
    reasons = _routed_by(route.reason)
    if route.agent in openable:
        return CandidateList(list(_chain(agents[route.agent], reasons, id, senses)), route.scores)
    if senses.fit(BASE_AGENT):
        return CandidateList([Candidate(BASE_AGENT, reasons)], route.scores)
    return _unrouted(route, agents, id, senses)


def _unrouted(route: RoutingDecision, agents: Mapping[str, Agent], id: str, senses: Modalities) -> CandidateList:
    """No agent was chosen, and the base does not read the request. Without a judgement the only agent that does, answers, and
    so does one that fits and is only no better than a base that could see it.

    Raises RequestError where none fits or several may be meant.
    """
    what = " and ".join(senses.kinds)
    if route.fits:
        reasons = _routed_by(f"{route.reason}, and the base reads no {what}")
        return CandidateList(list(_chain(agents[route.fits], reasons, id, senses)), route.scores)
    if not route.scores and len(senses.others) == 1:
        reasons = (*_routed_by(route.reason), Reason(ReasonKind.ROUTED, f"{senses.others[0]} alone reads {what}"))
        return CandidateList(list(_chain(agents[senses.others[0]], reasons, id, senses)))
    raise RequestError(
        f"auto chose no agent, and the base reads no {what}: {route.reason}",
        f"name one that does: {', '.join(senses.others)}",
    )


def _routed_by(detail: str) -> tuple[Reason, ...]:
    return (Reason(ReasonKind.ROUTED, f"auto: {detail}"),)


def _chain(agent: Agent, reasons: tuple[Reason, ...], id: str, senses: Modalities) -> Iterator[Candidate]:
    """The version on trial if the draw says so, the live one, then the agent's fall-backs; those that read the request.

    Raises RequestError where the live one does not.
    """
    trial = f"{agent.name}@{agent.candidate}"
    if agent.candidate and in_fraction(agent.canary_fraction, trial, id) and senses.fit(trial):
        canary = Reason(ReasonKind.CANARY, f"canary, {agent.canary_fraction:g} of the requests")
        yield Candidate(trial, (*reasons, canary))
    if agent.live:
        senses.check(f"{agent.name}@{agent.live}")
        yield Candidate(f"{agent.name}@{agent.live}", reasons)
    else:
        reasons = (*reasons, Reason(ReasonKind.NO_VERSION, f"{agent.name} has no version: {agent.note}"))
    for step in agent.fallback:
        if step == "previous" and agent.previous and senses.fit(f"{agent.name}@{agent.previous}"):
            yield Candidate(f"{agent.name}@{agent.previous}", (Reason(ReasonKind.FALLBACK, "the previous version steps in"),))
        elif step == BASE_AGENT and senses.fit(BASE_AGENT):
            fallback = Reason(ReasonKind.FALLBACK, "the base steps in")
            yield Candidate(BASE_AGENT, (fallback,) if agent.live else (*reasons, fallback))
