"""State of a team on disk, for a page that shows it: agents, versions, log, keys and running servers.

Nothing is begun by a look: a team whose registry does not exist yet is described by its file alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from sartor.serving.api_keys import ApiKeyStore
from sartor.serving.registry import server_presence
from sartor.serving.registry.registry import Freeze, Registry
from sartor.serving.registry.registry_schema import Agent, AgentVersion, Event
from sartor.serving.team_config import Team, load


@dataclass(frozen=True)
class TeamOverview:
    """State of a team.

    base: as the team's file names it.
    state: absolute path of the team's directory.
    host, port: address that a server of this file listens on; port 0 if each start takes a free one.
    has_registry: whether a server or a command has begun the registry.
    agents: those that were not removed, by name. versions: by `agent@version`.
    releases: directory of the first Release of each agent, as the file names it.
    damaged: what cannot be read -> reason. frozen: trials and watches that wait for an admin, by agent.
    events: newest first. keys: rows of `sartor agents key --list`, without secrets.
    servers: process ids of the servers that run on this state directory.
    """

    base: str
    state: str
    host: str
    port: int
    has_registry: bool
    agents: Mapping[str, Agent] = field(default_factory=dict)
    versions: Mapping[str, AgentVersion] = field(default_factory=dict)
    releases: Mapping[str, str] = field(default_factory=dict)
    damaged: Mapping[str, str] = field(default_factory=dict)
    frozen: Mapping[str, Freeze] = field(default_factory=dict)
    events: Sequence[Event] = ()
    keys: Sequence[Mapping[str, Any]] = ()
    servers: Sequence[int] = ()


def team_overview(team: Team | Path | str, *, events: int = 100) -> TeamOverview:
    """Return the state of a team as its file, its registry and its state directory have it.

    events: number of the newest events. Raises ConfigError for a team's file that cannot be read, and as
    `Registry.open`.
    """
    loaded_team = team if isinstance(team, Team) else load(Path(team))
    file = make_url(loaded_team.registry_url).database or ""
    is_sqlite = make_url(loaded_team.registry_url).get_backend_name() == "sqlite"
    facts: dict[str, Any] = {
        "base": loaded_team.base,
        "state": loaded_team.state,
        "host": loaded_team.http.host,
        "port": loaded_team.http.port,
        "releases": {member.name: member.release for member in loaded_team.agents},
    }
    if is_sqlite and not Path(file).is_file():
        return TeamOverview(**facts, has_registry=False)
    with closing(Registry.of(loaded_team)) as registry:
        snapshot = registry.read()
        newest = registry.events(limit=events)
        keys = ApiKeyStore(registry.database, state=Path(loaded_team.state)).listed()
    return TeamOverview(
        **facts,
        has_registry=True,
        agents={name: agent for name, agent in snapshot.agents.items() if agent.state != "removed"},
        versions=snapshot.versions,
        damaged=snapshot.damaged,
        frozen=snapshot.frozen,
        events=newest[::-1],
        keys=[key.as_json() for key in keys],
        servers=sorted(server_presence.running(Path(loaded_team.state))),
    )
