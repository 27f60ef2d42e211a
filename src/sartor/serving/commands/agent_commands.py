"""Verbs of the agent registry and feedback inbox.

A running server sees each change within a second; it loads what a change needs before the change takes effect there.
"""

from __future__ import annotations

import getpass
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sartor.core.errors import ConfigError
from sartor.core.records import Feedback
from sartor.curate.sources import feedback_inbox
from sartor.inference.engine import EngineInfo
from sartor.release.release import verify_release
from sartor.serving.admission import admission
from sartor.serving.admission.admission import AdmissionContext, version_of
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.receipts import team_digest
from sartor.serving.registry.registry import ChangeCause, Registry, Snapshot
from sartor.serving.registry.registry_schema import Agent, AgentVersion
from sartor.serving.team_config import Team, load


@dataclass(frozen=True)
class CommandRows:
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


def list_agents(team: Team | Path | str) -> CommandRows:
    """Every agent of a team; one whose row was changed from outside says so."""
    with _opened(team) as registry:
        read = registry.read()
    hurt = [{"name": name, "hurt": why} for name, why in read.hurt.items()]
    return CommandRows([*(_row(agent, read) for agent in read.agents.values() if agent.state != "removed"), *hurt])


def add_agent(team: Team | Path | str, release: Path | str, *, name: str = "", why: str = "") -> CommandRows:
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
) -> CommandRows:
    """Make a registered version live, or put it on trial: by the fractions given, else by those of TEAM.yaml.

    A version that is on trial becomes live, unless a fraction is given. Raises ConflictError when `expected` is not live
    (None: whatever is).
    """
    made = team if isinstance(team, Team) else load(Path(team))
    is_given = canary is not None or shadow is not None
    fractions = (canary or 0.0, shadow or 0.0) if is_given else (made.rollout.canary_fraction, made.rollout.shadow_fraction)

    def change(registry: Registry, cause: ChangeCause) -> Agent:
        canary, shadow = fractions
        return registry.bring_in(
            name, version, canary=canary, shadow=shadow, ends_trial=not is_given, expected=expected, cause=cause
        )

    return _changed(made, change, why)


def rollback_agent(team: Team | Path | str, name: str, *, expected: str | None = None, why: str = "") -> CommandRows:
    """End a trial, if one runs; else make the version live that was before. Raises ConflictError."""
    return _changed(team, lambda registry, cause: registry.rollback(name, expected=expected, cause=cause), why)


def remove_agent(team: Team | Path | str, name: str, *, why: str = "") -> CommandRows:
    """Serve an agent no more; `add_agent` brings it back."""
    return _changed(team, lambda registry, cause: registry.remove(name, cause=cause), why)


def drain_agent(team: Team | Path | str, name: str, *, why: str = "") -> CommandRows:
    """Let an agent end what it has begun and take nothing new, until a version of it is promoted."""
    return _changed(team, lambda registry, cause: registry.drain(name, cause=cause), why)


def repair_agent(team: Team | Path | str, name: str, *, why: str = "") -> CommandRows:
    """Write an agent's row anew as the log has it, after it was changed from outside."""
    return _changed(team, lambda registry, cause: registry.repair(name, cause=cause), why)


def agent_events(team: Team | Path | str, name: str = "", *, most: int = 100) -> CommandRows:
    """The newest changes of one agent or of all, the oldest of them first."""
    with _opened(team) as registry:
        return CommandRows([event.as_json() for event in registry.events(name, most=most)])


def _changed(team: Team | Path | str, change: Callable[[Registry, ChangeCause], Agent], why: str) -> CommandRows:
    with _opened(team) as registry:
        agent = change(registry, ChangeCause(getpass.getuser(), why))
        return CommandRows([_row(agent, registry.read())])


def _row(agent: Agent, read: Snapshot) -> dict[str, Any]:
    said = agent.as_json()
    shown = ("name", "live", "state", "candidate", "canary_fraction", "shadow_fraction", "changed", "note")
    versions = [version.version for version in read.versions.values() if version.agent == agent.name]
    return {**{key: said[key] for key in shown}, "previous": agent.previous, "versions": versions}


def _looked_at(team: Team, release: Path, name: str) -> AgentVersion:
    """A Release, checked against the team's base without an engine. What a server loads is checked by the server again."""
    Path(team.state).mkdir(parents=True, exist_ok=True)
    base = verify_release(release, key=team.trust or None, base=team.base).release.manifest["base"]
    about = EngineInfo(team.engine.kind, base["name"], base["digest"], base["template_digest"], context_tokens=0, rows=0)
    admitted = admission.check_release_files(release, AdmissionContext.of(team, about))
    return version_of(admitted, name or admitted.name)


@contextmanager
def _opened(team: Team | Path | str) -> Iterator[Registry]:
    made = team if isinstance(team, Team) else load(Path(team))
    with closing(Registry.open(made.registry_url)) as registry:
        yield registry


@dataclass(frozen=True)
class _Asked:
    """Whose feedback. user: a digest, as it stands in the inbox. "" is anybody."""

    key: str
    user: str

    def is_by(self, said: Feedback) -> bool:
        return self.key in ("", said.by.key) and self.user in ("", said.by.user)


@dataclass
class _Counted:
    """What one voice said."""

    rows: int = 0
    good: int = 0
    bad: int = 0
    corrections: int = 0
    without_consent: int = 0
    masked: int = 0
    dates: list[str] = field(default_factory=list)

    def count(self, said: Feedback) -> None:
        self.rows += 1
        self.good += (said.rating or 0) > 0
        self.bad += (said.rating or 0) < 0
        self.corrections += bool(said.correction)
        self.without_consent += said.by.consent == "refused"
        self.masked += sum(said.masked.values())
        self.dates = [min([*self.dates, said.date]), max([*self.dates, said.date])]

    def as_json(self) -> dict[str, Any]:
        said = {name: value for name, value in vars(self).items() if name != "dates"}
        return {**said, "first": self.dates[0], "last": self.dates[-1]}


def list_feedback(team: Team | Path | str, *, key: str = "", user: str = "") -> CommandRows:
    """Every key that spoke, and every user of a key that has several: how much, and whether it is trusted.

    user: the id as clients send it. Raises ConfigError for a team's file that cannot be read.
    """
    made, asked = _asked(team, key, user)
    inbox = _inbox(made)
    counted = _counted(kept.said for kept in inbox.lines() if kept.said and asked.is_by(kept.said))
    standings = {(one.key, one.user): one for one in feedback_inbox.of_folder(inbox.path).standings}
    return CommandRows(
        [_feedback_book_row(standings[voice], counted[voice]) for voice in sorted(counted) if voice in standings]
    )


def remove_feedback(team: Team | Path | str, *, key: str = "", user: str = "") -> dict[str, Any]:
    """Take everything out of the inbox that a key said, or a user, or a user of a key; and every line that was cut short.

    `places` names the lines, as the origins of Examples do: what was learnt from them is `sartor revoke`'s to find. Raises
    ConfigError where neither is given, MissingError where the disk does not take it.
    """
    if not key and not user:
        raise ConfigError("neither a key nor a user is named", "--key ID, as `sartor agents feedback` lists it, or --user ID")
    made, asked = _asked(team, key, user)
    gone = _inbox(made).remove(asked.is_by)
    places = [kept.place for kept in gone if kept.said]
    return {"removed": len(places), "damaged": len(gone) - len(places), "places": places}


def _asked(team: Team | Path | str, key: str, user: str) -> tuple[Team, _Asked]:
    made = team if isinstance(team, Team) else load(Path(team))
    return made, _Asked(key, team_digest(Path(made.state))("user", user) if user else "")


def _inbox(team: Team) -> FeedbackStore:
    return FeedbackStore(Path(team.state) / "inbox")


def _counted(every: Iterable[Feedback]) -> Mapping[feedback_inbox.Giver, _Counted]:
    found: dict[feedback_inbox.Giver, _Counted] = {}
    for said in every:
        for voice in ((said.by.key, feedback_inbox.WHOLE), (said.by.key, said.by.user)):
            found.setdefault(voice, _Counted()).count(said)
    return found


def _feedback_book_row(standing: feedback_inbox.RaterTrust, counted: _Counted) -> dict[str, Any]:
    return {
        "key": standing.key,
        "user": "" if standing.user == feedback_inbox.WHOLE else standing.user,
        **counted.as_json(),
        "compared": standing.compared,
        "against": standing.against,
        "trust": round(standing.score, 3),
        "set_aside": standing.is_aside,
        "why": standing.why if standing.is_aside else "",
    }
