"""Commands about a served team: its agents, their versions, its keys, and the receipts of its replies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cyclopts import App

import sartor
from sartor.cli.app import REPLACE, app, notice
from sartor.core.errors import ConfigError

agents_app = App(name="agents", help="The agents of a team: which version is live, which is on trial, who may ask them.")
app.command(agents_app)
receipt_app = App(name="receipt", help="Signed records of replies.")
app.command(receipt_app)

TEAM = Path("team.yaml")


@agents_app.command
def key(
    *names: str,
    team: Path = TEAM,
    admin: REPLACE = False,
    expires: str = "",
    revoke: str = "",
    list: REPLACE = False,
    remove_all: REPLACE = False,
) -> Any:
    """Make an API key that opens the agents named; it is shown once. Or list, revoke or remove the keys that there are.

    Args:
        names: agents that the key opens; '*' opens every one, base and auto are names too
        team: the team's YAML file
        admin: make an admin's key, which promotes and rolls back, and opens no agent
        expires: 30d, 12h, 2w, or a date after which the key opens nothing
        revoke: id of a key that is to open nothing from now on
        list: every key, without its secret
        remove_all: remove every key, so that a server that is started afterwards asks for none, on loopback alone
    """
    if (bool(names) or admin) + bool(revoke) + list + remove_all != 1:
        problem = "name an agent, or one of --admin, --revoke ID, --list and --remove-all"
        raise ConfigError(problem, "sartor agents key faq")
    if list:
        return sartor.list_keys(team)
    if remove_all:
        return sartor.remove_keys(team)
    return sartor.revoke_key(team, revoke) if revoke else sartor.make_key(team, names, is_admin=admin, expires=expires)


@receipt_app.command
def verify(
    file: Path, *, team: Path | None = None, key: Path | None = None, messages: Path | None = None, reply: str | None = None
) -> Any:
    """Check a receipt: its signature; the digests of what was asked and said; and of a greedy reply that it is said again.

    Args:
        file: what GET /v1/receipts/ID answered, or JSON of it under `receipt`, with the `messages` and the `reply`
        team: the team's YAML file: its public key, its key of digests, its base and engine
        key: trust this public key instead of the team's or those in SARTOR_HOME/trusted
        messages: JSON file of the messages, or of the whole body of the request
        reply: the text of the reply
    """
    return sartor.verify_receipt(file, team=team, key=key, messages=messages, reply=reply, notice=notice)


@agents_app.command(name="list")
def agents_list(*, team: Path = TEAM) -> Any:
    """Every agent: the version that is live, the one before it, the one on trial.

    Args:
        team: the team's YAML file
    """
    return sartor.list_agents(team)


@agents_app.command(name="add")
def agents_add(release: Path, *, name: str = "", why: str = "", team: Path = TEAM) -> Any:
    """Register a Release, after every check that needs no engine; the first version of an agent is live at once.

    Args:
        release: the Release
        name: what clients ask for; by default the Release's own name
        why: for the log
        team: the team's YAML file
    """
    return sartor.add_agent(team, release, name=name, why=why)


@agents_app.command(name="promote")
def agents_promote(
    name: str,
    version: str,
    *,
    expected_version: str | None = None,
    canary: float | None = None,
    shadow: float | None = None,
    why: str = "",
    team: Path = TEAM,
) -> Any:
    """Make a registered version live, or put it on trial; without fractions, one that is on trial already becomes live.

    Args:
        name: the agent
        version: the version
        expected_version: change nothing unless this one is live
        canary: fraction of the requests that it answers at first; by default that of the team's file
        shadow: fraction of the requests that it also answers, unseen; by default that of the team's file
        why: for the log
        team: the team's YAML file
    """
    return sartor.promote_agent(team, name, version, expected=expected_version, canary=canary, shadow=shadow, why=why)


@agents_app.command(name="canary")
def agents_canary(name: str, version: str, fraction: float, *, why: str = "", team: Path = TEAM) -> Any:
    """Let a registered version answer a fraction of the requests.

    Args:
        name: the agent
        version: the version
        fraction: of the requests
        why: for the log
        team: the team's YAML file
    """
    return sartor.promote_agent(team, name, version, canary=fraction, why=why)


@agents_app.command(name="shadow")
def agents_shadow(name: str, version: str, fraction: float, *, why: str = "", team: Path = TEAM) -> Any:
    """Let a registered version answer a fraction of the requests too, unseen.

    Args:
        name: the agent
        version: the version
        fraction: of the requests
        why: for the log
        team: the team's YAML file
    """
    return sartor.promote_agent(team, name, version, shadow=fraction, why=why)


@agents_app.command(name="rollback")
def agents_rollback(name: str, *, expected_version: str | None = None, why: str = "", team: Path = TEAM) -> Any:
    """End a trial, if one runs; else make the version live that was before.

    Args:
        name: the agent
        expected_version: change nothing unless this one is live
        why: for the log
        team: the team's YAML file
    """
    return sartor.rollback_agent(team, name, expected=expected_version, why=why)


@agents_app.command(name="drain")
def agents_drain(name: str, *, why: str = "", team: Path = TEAM) -> Any:
    """Let an agent end what it has begun and take nothing new, until a version of it is promoted.

    Args:
        name: the agent
        why: for the log
        team: the team's YAML file
    """
    return sartor.drain_agent(team, name, why=why)


@agents_app.command(name="remove")
def agents_remove(name: str, *, why: str = "", team: Path = TEAM) -> Any:
    """Serve an agent no more. None of its versions' names will ever mean another Release.

    Args:
        name: the agent
        why: for the log
        team: the team's YAML file
    """
    return sartor.remove_agent(team, name, why=why)


@agents_app.command(name="repair")
def agents_repair(name: str, *, why: str = "", team: Path = TEAM) -> Any:
    """Write an agent's row anew as the log has it, after it was changed from outside.

    Args:
        name: the agent
        why: for the log
        team: the team's YAML file
    """
    return sartor.repair_agent(team, name, why=why)


@agents_app.command(name="replay")
def agents_replay(log: Path, *, run: str = "", messages: Path | None = None, team: Path = TEAM) -> Any:
    """Make what plans did anew, by the versions that did it, and say where it differs; greedy steps are the same.

    Args:
        log: a file of the team's log of plans, STATE/plans/plans-*.jsonl
        run: id of one run, which is the receipt of its answer; by default every run
        messages: where the log has no words: JSON file of the messages, or of the whole body of that run's request
        team: the team's YAML file, with the plans as they were
    """
    return sartor.replay_plans(team, log, run=run, messages=messages, notice=notice)


@agents_app.command(name="feedback")
def agents_feedback(*, key: str = "", user: str = "", remove: REPLACE = False, team: Path = TEAM) -> Any:
    """Who said how much of the team's replies, and whether it is trusted; with --remove, what they said is taken out.

    Args:
        key: id of an API key, of which alone is told
        user: id of a person, as the feedback was sent with
        remove: take out of the inbox what that key or user said
        team: the team's YAML file
    """
    call = sartor.remove_feedback if remove else sartor.list_feedback
    return call(team, key=key, user=user)


@agents_app.command(name="events")
def agents_events(name: str = "", *, most: int = 100, team: Path = TEAM) -> Any:
    """Who changed what, when, from what to what, and why; the newest last.

    Args:
        name: of one agent; by default of all
        most: so many of the newest
        team: the team's YAML file
    """
    return sartor.agent_events(team, name, most=most)
