"""`model` -> who is to answer, in order: the version that is asked for, live or on trial, then those that step in for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sartor.agents.asking import Request, Router
from sartor.agents.entries import Agent
from sartor.agents.rollout import takes
from sartor.core.errors import KeyRefusedError, SartorError, UnavailableError, UnknownAgentError

BASE_AGENT = "base"
AUTO = "auto"


@dataclass(frozen=True)
class Choice:
    """One who may answer: an exact version, or `base`; and why."""

    agent: str
    why: str


@dataclass(frozen=True)
class Plan:
    """Who may answer a request, the first that can does. scores: what the router found, of `auto` only."""

    choices: Sequence[Choice]
    scores: Mapping[str, float] = field(default_factory=dict)


async def plan(request: Request, agents: Mapping[str, Agent], router: Router | None, id: str) -> Plan:
    """Who may answer `request`. `id`: what a canary's draw hangs on.

    Raises UnknownAgentError for a name that nobody has, KeyRefusedError for one that the client's key does not open,
    UnavailableError for an agent that is being drained.
    """
    name, at, version = request.model.partition("@")
    if request.model == BASE_AGENT:
        return Plan([Choice(BASE_AGENT, "asked by name")])
    if request.model == AUTO:
        return await _routed(request, agents, router, id)
    agent = _opened(request, agents, name)
    if not at:
        return Plan(list(_chain(agent, "asked by name", id)))
    if version not in agent.versions:
        raise UnknownAgentError(
            f"{name} has no version {version[:80]!r} that is served; there are: {', '.join(agent.versions) or 'none'}",
            f'"model": "{name}"',
        )
    return Plan([Choice(request.model, "asked by name and version")])


def _opened(request: Request, agents: Mapping[str, Agent], name: str) -> Agent:
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


async def _routed(request: Request, agents: Mapping[str, Agent], router: Router | None, id: str) -> Plan:
    """`auto`. A router that fails chooses the base, and says so."""
    openable = {
        name
        for name, agent in agents.items()
        if agent.state == "serving" and (request.openable is None or name in request.openable)
    }
    if router is None or not openable:
        return Plan([Choice(BASE_AGENT, "auto: there is nobody to choose from")])
    messages = request.messages or ({"role": "user", "content": request.text},)
    try:
        route = await router.route(messages, openable)
    except SartorError as error:
        return Plan([Choice(BASE_AGENT, f"auto: the router failed: {error.problem}")])
    if route.agent not in openable:
        return Plan([Choice(BASE_AGENT, f"auto: {route.reason}")], route.scores)
    return Plan(list(_chain(agents[route.agent], f"auto: {route.reason}", id)), route.scores)


def _chain(agent: Agent, why: str, id: str) -> Iterator[Choice]:
    """The version on trial if the draw says so, the live one, then the agent's fall-backs."""
    if agent.candidate and takes(agent.canary_fraction, f"{agent.name}@{agent.candidate}", id):
        yield Choice(f"{agent.name}@{agent.candidate}", f"{why}; canary, {agent.canary_fraction:g} of the requests")
    if agent.live:
        yield Choice(f"{agent.name}@{agent.live}", why)
    else:
        why = f"{why}; {agent.name} has no version: {agent.note}"
    for step in agent.fallback:
        if step == "previous" and agent.previous:
            yield Choice(f"{agent.name}@{agent.previous}", "the previous version steps in")
        elif step == BASE_AGENT:
            yield Choice(BASE_AGENT, "the base steps in" if agent.live else f"{why}; the base steps in")
