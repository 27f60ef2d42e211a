"""The registry of a team as verbs, for the command line and for scripts: what is live, and who changed it when and why.

A running server sees each change within a second; it loads what a change needs before the change takes effect there.
"""

from __future__ import annotations

import getpass
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sartor.agents import admission
from sartor.agents.admission import Ground, version_of
from sartor.agents.entries import Agent, Version
from sartor.agents.registry import Cause, Registry, Snapshot
from sartor.agents.team import Team, load
from sartor.inference.engine import About
from sartor.release.release import verify_release


@dataclass(frozen=True)
class Rows:
    """What a command about agents says."""

    rows: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        return {"rows": self.rows}

    def table(self) -> list[tuple[str, Any]]:
        """A line for each row, as people read it."""
        return [(str(next(iter(row.values()))), dict(list(_told(row))[1:])) for row in self.rows]


def _told(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in row.items() if value)


def list_agents(team: Team | Path | str) -> Rows:
    """Every agent of a team; one whose row was changed from outside says so."""
    with _opened(team) as registry:
        read = registry.read()
    hurt = [{"name": name, "hurt": why} for name, why in read.hurt.items()]
    return Rows([*(_row(agent, read) for agent in read.agents.values() if agent.state != "removed"), *hurt])


def add_agent(team: Team | Path | str, release: Path | str, *, name: str = "", why: str = "") -> Rows:
    """Register a Release under its own name or another, after every check that needs no engine.

    The first version of an agent is live at once, a later one waits to be promoted. Raises what `admission.look` raises, and
    ConflictError for a name and version that mean another Release.
    """
    made = team if isinstance(team, Team) else load(Path(team))
    version = _looked_at(made, Path(release), name)
    fallback = next((member.fallback for member in made.agents if member.name == version.agent), ("previous", "base"))
    return _changed(made, lambda registry, cause: registry.add(version, fallback=fallback, cause=cause), why)


def promote_agent(
    team: Team | Path | str,
    name: str,
    version: str,
    *,
    expected: str | None = None,
    canary: float | None = None,
    shadow: float | None = None,
    why: str = "",
) -> Rows:
    """Make a registered version live, or put it on trial: by the fractions given, else by those of TEAM.yaml.

    A version that is on trial becomes live, unless a fraction is given. Raises ConflictError when `expected` is not live
    (None: whatever is).
    """
    made = team if isinstance(team, Team) else load(Path(team))
    is_given = canary is not None or shadow is not None
    fractions = (canary or 0.0, shadow or 0.0) if is_given else (made.rollout.canary_fraction, made.rollout.shadow_fraction)

    def change(registry: Registry, cause: Cause) -> Agent:
        canary, shadow = fractions
        return registry.bring_in(
            name, version, canary=canary, shadow=shadow, ends_trial=not is_given, expected=expected, cause=cause
        )

    return _changed(made, change, why)


def rollback_agent(team: Team | Path | str, name: str, *, expected: str | None = None, why: str = "") -> Rows:
    """End a trial, if one runs; else make the version live that was before. Raises ConflictError."""
    return _changed(team, lambda registry, cause: registry.rollback(name, expected=expected, cause=cause), why)


def remove_agent(team: Team | Path | str, name: str, *, why: str = "") -> Rows:
    """Serve an agent no more; `add_agent` brings it back."""
    return _changed(team, lambda registry, cause: registry.remove(name, cause=cause), why)


def drain_agent(team: Team | Path | str, name: str, *, why: str = "") -> Rows:
    """Let an agent end what it has begun and take nothing new, until a version of it is promoted."""
    return _changed(team, lambda registry, cause: registry.drain(name, cause=cause), why)


def repair_agent(team: Team | Path | str, name: str, *, why: str = "") -> Rows:
    """Write an agent's row anew as the log has it, after it was changed from outside."""
    return _changed(team, lambda registry, cause: registry.repair(name, cause=cause), why)


def agent_events(team: Team | Path | str, name: str = "", *, most: int = 100) -> Rows:
    """The newest changes of one agent or of all, the oldest of them first."""
    with _opened(team) as registry:
        return Rows([event.as_json() for event in registry.events(name, most=most)])


def _changed(team: Team | Path | str, change: Callable[[Registry, Cause], Agent], why: str) -> Rows:
    with _opened(team) as registry:
        agent = change(registry, Cause(getpass.getuser(), why))
        return Rows([_row(agent, registry.read())])


def _row(agent: Agent, read: Snapshot) -> dict[str, Any]:
    said = agent.as_json()
    shown = ("name", "live", "state", "candidate", "canary_fraction", "shadow_fraction", "changed", "note")
    versions = [version.version for version in read.versions.values() if version.agent == agent.name]
    return {**{key: said[key] for key in shown}, "previous": agent.previous, "versions": versions}


def _looked_at(team: Team, release: Path, name: str) -> Version:
    """A Release, checked against the team's base without an engine. What a server loads is checked by the server again."""
    Path(team.state).mkdir(parents=True, exist_ok=True)
    base = verify_release(release, key=team.trust or None, base=team.base).release.manifest["base"]
    about = About(team.engine.kind, base["name"], base["digest"], base["template_digest"], context_tokens=0, rows=0)
    admitted = admission.look(release, Ground.of(team, about))
    return version_of(admitted, name or admitted.name)


@contextmanager
def _opened(team: Team | Path | str) -> Iterator[Registry]:
    made = team if isinstance(team, Team) else load(Path(team))
    with closing(Registry.open(made.registry_url)) as registry:
        yield registry
