"""What a caller may ask of this team, each with a sentence of what it is for: MCP's tools and the A2A card's skills."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sartor.agents.asking import Listed
from sartor.agents.keys import Opened
from sartor.agents.serve.desk import Desk
from sartor.agents.team import Team

ABOUT_AUTO = "Answer a prompt by the agent of this team that it is for."
ABOUT_BASE = "Answer a prompt by the model that all agents of this team stand on, without any of them."


@dataclass(frozen=True)
class Ability:
    """One agent or plan. version: what is live. about: what it is for."""

    name: str
    version: str
    about: str


def abouts(team: Team) -> Mapping[str, str]:
    """What TEAM.yaml says of its agents, by name."""
    return {member.name: member.about for member in team.agents if member.about}


async def abilities(desk: Desk, visitor: Opened, said: Mapping[str, str]) -> list[Ability]:
    """The agents and plans that this visitor's key opens and somebody answers for."""
    listed = (*await desk.house.roster.listed(), *desk.house.plans)
    return [_ability(one, said) for one in listed if one.is_ready and visitor.opens(one.name)]


def _ability(one: Listed, said: Mapping[str, str]) -> Ability:
    plan = one.state.get("plan")
    what = f"the plan {one.name} ({plan}: several agents for one request)" if plan else f"the agent {one.name}"
    return Ability(one.name, one.live, said.get(one.name, "") or f"Answer a prompt by {what} of this team.")
