"""Commands of the agent registry and the feedback inbox.

A running server sees each change within a second. It loads what a change needs before the change takes effect there.
The log names who made a change (`by`; the system's user where it is empty) and why.
"""

from __future__ import annotations

import getpass
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sartor.core.errors import ConfigError
from sartor.core.filesystem import make_private_folder
from sartor.core.records import Feedback
from sartor.curate.sources import feedback_inbox
from sartor.inference.engine import EngineInfo
from sartor.release.release import verify_release
from sartor.serving.admission import admission
from sartor.serving.admission.admission import AdmissionContext, version_of
from sartor.serving.api_keys import ApiKeyStore
from sartor.serving.feedback_store import FeedbackStore
from sartor.serving.receipts import team_digest
from sartor.serving.registry import registry_schema, registry_seals
from sartor.serving.registry.registry import ChangeCause, Registry, Snapshot
from sartor.serving.registry.registry_schema import Agent, AgentVersion
from sartor.serving.team_config import Team, load


@dataclass(frozen=True)
class CommandRows:
    """Result of a command about agents."""

    rows: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON."""
        return {"rows": self.rows}

    def table(self) -> list[tuple[str, Any]]:
        """Return a (name, fields) line for each row, for a reader."""
        lines = []
        for row in self.rows:
            name = str(next(iter(row.values())))
            nonempty_fields = [(key, value) for key, value in row.items() if value]
            lines.append((name, dict(nonempty_fields[1:])))
        return lines


def list_agents(team: Team | Path | str) -> CommandRows:
    """Return every agent of a team; one whose row was changed from outside is marked."""
    with _opened(team) as registry:
        snapshot = registry.read()
    damaged = [{"name": name, "hurt": reason} for name, reason in snapshot.damaged.items()]
    return CommandRows(
        [*(_row(agent, snapshot) for agent in snapshot.agents.values() if agent.state != "removed"), *damaged]
    )


def add_agent(
    team: Team | Path | str, release: Path | str, *, name: str = "", why: str = "", by: str = ""
) -> CommandRows:
    """Register a Release under its own name or another, after every check that needs no engine.

    The first version of an agent is live at once; a later one waits for a promotion. Raises what `check_release_files`
    raises, and ConflictError if name and version already belong to another Release.
    """
    loaded_team = team if isinstance(team, Team) else load(Path(team))
    version = _looked_at(loaded_team, Path(release), name)
    fallback = next(
        (member.fallback for member in loaded_team.agents if member.name == version.agent), ("previous", "base")
    )
    return _changed(
        loaded_team, lambda registry, cause: registry.add(version, fallback=fallback, cause=cause), why, by
    )


def promote_agent(
    team: Team | Path | str,
    name: str,
    version: str,
    *,
    expected: str | None = None,
    canary: float | None = None,
    shadow: float | None = None,
    why: str = "",
    by: str = "",
) -> CommandRows:
    """Make a registered version live, or start its trial: with the given fractions, else those of TEAM.yaml.

    A version on trial becomes live, unless a fraction is given.
    Raises ConflictError if `expected` is not the live version (None: any).
    """
    loaded_team = team if isinstance(team, Team) else load(Path(team))
    has_fractions = canary is not None or shadow is not None
    fractions = (loaded_team.rollout.canary_fraction, loaded_team.rollout.shadow_fraction)
    if has_fractions:
        fractions = (canary or 0.0, shadow or 0.0)

    def change(registry: Registry, cause: ChangeCause) -> Agent:
        canary, shadow = fractions
        return registry.bring_in(
            name, version, canary=canary, shadow=shadow, ends_trial=not has_fractions, expected=expected, cause=cause
        )

    return _changed(loaded_team, change, why, by)


def rollback_agent(
    team: Team | Path | str, name: str, *, expected: str | None = None, why: str = "", by: str = ""
) -> CommandRows:
    """End a running trial, or else make the previous version live. Raises ConflictError."""
    return _changed(team, lambda registry, cause: registry.rollback(name, expected=expected, cause=cause), why, by)


def remove_agent(team: Team | Path | str, name: str, *, why: str = "", by: str = "") -> CommandRows:
    """Remove an agent from service; `add_agent` brings it back."""
    return _changed(team, lambda registry, cause: registry.remove(name, cause=cause), why, by)


def drain_agent(team: Team | Path | str, name: str, *, why: str = "", by: str = "") -> CommandRows:
    """Let an agent finish its running requests and accept no new ones, until a version of it is promoted."""
    return _changed(team, lambda registry, cause: registry.drain(name, cause=cause), why, by)


def repair_agent(team: Team | Path | str, name: str, *, why: str = "", by: str = "") -> CommandRows:
    """Restore an agent's row from the log, after it was changed from outside."""
    return _changed(team, lambda registry, cause: registry.repair(name, cause=cause), why, by)


def reseal_registry(team: Team | Path | str) -> dict[str, Any]:
    """Seal every row of a team's registry as it is now, for a lost key of the seals or a restored copy.

    Returns the number of rows by table, and the API keys, which the caller must know: any of them opens what it names.
    """
    loaded_team = team if isinstance(team, Team) else load(Path(team))
    with closing(registry_schema.open_unsealed(loaded_team.registry_url)) as database:
        state = Path(loaded_team.state)
        head = registry_schema.head_of(database, state)
        counts = registry_seals.reseal(database, head, state, registry_schema.SEALED)
        keys = [key.as_json() for key in ApiKeyStore(database).listed()]
    return {"resealed": counts, "keys": keys, "note": "look through the keys: sartor agents key --revoke ID"}


def agent_events(team: Team | Path | str, name: str = "", *, most: int = 100) -> CommandRows:
    """Return the newest `most` changes of one agent or of all, oldest first."""
    with _opened(team) as registry:
        return CommandRows([event.as_json() for event in registry.events(name, limit=most)])


def _changed(
    team: Team | Path | str, change: Callable[[Registry, ChangeCause], Agent], reason: str, by: str
) -> CommandRows:
    with _opened(team) as registry:
        agent = change(registry, ChangeCause(by or getpass.getuser(), reason))
        return CommandRows([_row(agent, registry.read())])


def _row(agent: Agent, snapshot: Snapshot) -> dict[str, Any]:
    fields = agent.as_json()
    shown = ("name", "live", "state", "candidate", "canary_fraction", "shadow_fraction", "changed", "note")
    versions = [version.version for version in snapshot.versions.values() if version.agent == agent.name]
    freeze = snapshot.frozen.get(agent.name)
    frozen = {"frozen": f"{agent.name}@{freeze.version}: {freeze.reason}"} if freeze else {}
    return {**{key: fields[key] for key in shown}, "previous": agent.previous, "versions": versions, **frozen}


def _looked_at(team: Team, release: Path, name: str) -> AgentVersion:
    """Return a Release as a version, checked against the team's base without an engine.

    A server checks again whatever it loads.
    """
    make_private_folder(Path(team.state))
    base = verify_release(release, key=team.trust or None, base=team.base).release.manifest["base"]
    about = EngineInfo(
        team.engine.kind, base["name"], base["digest"], base["template_digest"], context_tokens=0, rows=0
    )
    admitted = admission.check_release_files(release, AdmissionContext.of(team, about), name)
    return version_of(admitted, name or admitted.name)


@contextmanager
def _opened(team: Team | Path | str) -> Iterator[Registry]:
    loaded_team = team if isinstance(team, Team) else load(Path(team))
    with closing(Registry.of(loaded_team)) as registry:
        yield registry


@dataclass(frozen=True)
class _FeedbackFilter:
    """Filter of feedback by its author.

    user: a digest, as in the inbox. An empty field matches anybody.
    """

    key: str
    user: str

    def is_by(self, feedback: Feedback) -> bool:
        return self.key in ("", feedback.by.key) and (not self.user or feedback.is_of(self.user))


@dataclass
class _FeedbackCounts:
    """Counts of one author's feedback."""

    rows: int = 0
    good: int = 0
    bad: int = 0
    corrections: int = 0
    without_consent: int = 0
    masked: int = 0
    dates: list[str] = field(default_factory=list)

    def count(self, feedback: Feedback) -> None:
        self.rows += 1
        self.good += (feedback.rating or 0) > 0
        self.bad += (feedback.rating or 0) < 0
        self.corrections += bool(feedback.correction)
        self.without_consent += feedback.by.consent == "refused"
        self.masked += sum(feedback.masked.values())
        self.dates = [min([*self.dates, feedback.date]), max([*self.dates, feedback.date])]

    def as_json(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if name != "dates"}
        return {**fields, "first": self.dates[0], "last": self.dates[-1]}


def list_feedback(team: Team | Path | str, *, key: str = "", user: str = "") -> CommandRows:
    """Return the feedback counts and trust of each key, and of each user of a key with several.

    user: the id as clients send it.
    Raises ConfigError for a team's file that cannot be read.
    """
    loaded_team, feedback_filter = _feedback_filter(team, key, user)
    inbox = _inbox(loaded_team)
    counted: dict[feedback_inbox.RaterId, _FeedbackCounts] = {}
    for line in inbox.lines():
        feedback = line.feedback
        if feedback and feedback_filter.is_by(feedback):
            for giver in ((feedback.by.key, feedback_inbox.WHOLE), (feedback.by.key, feedback.by.user)):
                counted.setdefault(giver, _FeedbackCounts()).count(feedback)
    trust_by_giver = {(trust.key, trust.user): trust for trust in feedback_inbox.of_folder(inbox.path).standings}
    givers = [giver for giver in sorted(counted) if giver in trust_by_giver]
    return CommandRows([_feedback_book_row(trust_by_giver[giver], counted[giver]) for giver in givers])


def remove_feedback(team: Team | Path | str, *, key: str = "", user: str = "") -> dict[str, Any]:
    """Remove all feedback of a key, of a user, or of a user of a key, and every truncated line.

    `places` in the result names the removed lines as the origins of Examples do, so that `sartor revoke` can find what
    was learnt from them.
    Raises ConfigError if neither is given, MissingError if the disk fails.
    """
    if not key and not user:
        raise ConfigError(
            "neither a key nor a user is named", "--key-id ID, as `sartor agents feedback` lists it, or --user ID"
        )
    loaded_team, feedback_filter = _feedback_filter(team, key, user)
    removed = _inbox(loaded_team).remove(feedback_filter.is_by)
    places = [line.location for line in removed if line.feedback]
    return {"removed": len(places), "damaged": len(removed) - len(places), "places": places}


def _feedback_filter(team: Team | Path | str, key: str, user: str) -> tuple[Team, _FeedbackFilter]:
    loaded_team = team if isinstance(team, Team) else load(Path(team))
    return loaded_team, _FeedbackFilter(key, team_digest(Path(loaded_team.state))("user", user) if user else "")


def _inbox(team: Team) -> FeedbackStore:
    return FeedbackStore(Path(team.state) / "inbox")


def _feedback_book_row(trust: feedback_inbox.RaterTrust, counted: _FeedbackCounts) -> dict[str, Any]:
    return {
        "key": trust.key,
        "user": "" if trust.user == feedback_inbox.WHOLE else trust.user,
        **counted.as_json(),
        "compared": trust.compared,
        "against": trust.against,
        "trust": round(trust.score, 3),
        "set_aside": trust.is_distrusted,
        "why": trust.reason if trust.is_distrusted else "",
    }
