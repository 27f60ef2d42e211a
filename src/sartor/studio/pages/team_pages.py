"""Team: agents with versions, traffic, health and log; promote, roll back, trials, drain.

What is live is read from a team's registry; traffic and health from its server, if one runs on this machine. Each
change is a command of `sartor agents`, which names the user and their reason in the log.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

import sartor
from sartor.core.errors import ConfigError, SartorError
from sartor.serving.http.http_errors import NotFoundError
from sartor.studio.jobs.job_files import JobState, JobStatus
from sartor.studio.page_renderer import redirect, render
from sartor.studio.server_traffic import KEY_VARIABLE, ServerState, VersionTraffic, local_address, read_server
from sartor.studio.team_files import SUFFIXES, is_team, team_files
from sartor.studio.visitor import Owner, PostedForm, Studio, Viewer, studio_of, text_field

router = APIRouter()
VERB = "agents"
# name of the team whose server shows this studio; the names of others end in a suffix of YAML
SERVER = "server"
MAX_EVENTS = 200
MAX_REASON_CHARS = 500
# commands of a team that its page shows
RECENT_COMMANDS = 3
# seconds after which the page renews its live part: while a command runs, and else
FAST_S, SLOW_S = 2, 5


class AgentAction(StrEnum):
    """What an owner may do to an agent, by verbs of `sartor agents`.

    CANARY: by `promote --canary`, which changes nothing if another version is live than was expected.
    """

    PROMOTE = "promote"
    ROLLBACK = "rollback"
    CANARY = "canary"
    DRAIN = "drain"
    REPAIR = "repair"


@dataclass(frozen=True)
class FoundTeam:
    """A team's file below the folder, or that of the server which shows the studio.

    name: of its page. overview: None if it cannot be read, for the reason `problem`, to be mended by `remedy`.
    server: the running server, if it answers.
    """

    name: str
    file: Path
    overview: Any = None
    server: ServerState | None = None
    problem: str = ""
    remedy: str = ""


def teams_of(studio: Studio) -> dict[str, Path]:
    """Return the files of teams by the names of their pages; that of the server that mounts the studio first."""
    served = studio.served_team
    found = {name: file for name, file in team_files(studio.folder).items() if file != served}
    return found if served is None else {SERVER: served, **found}


def _team_file(studio: Studio, name: str) -> Path:
    """Return the file of the team that a request names. Raises OutsideError, NotFoundError."""
    if name == SERVER and studio.served_team is not None:
        return studio.served_team
    file = studio.folder.resolve(name)
    if not (file.suffix in SUFFIXES and is_team(file)):
        raise NotFoundError(f"{name[:80]!a} is no file of a team", "the page Team lists those of this folder")
    return file


def _found_team(request: Request, studio: Studio, name: str, file: Path, events: int) -> FoundTeam:
    """Return a team with its state and that of its server."""
    server = read_server(_own_address(request)) if name == SERVER else None
    if file.is_dir():  # one Adapter or Release is served, which has no registry
        return FoundTeam(name, file, server=server)
    try:
        overview = sartor.team_overview(file, events=events)
    except SartorError as error:
        return FoundTeam(name, file, server=server, problem=error.problem, remedy=error.remedy)
    if server is None and overview.servers:
        address = _address_of_job(studio, file) or local_address(overview.host, overview.port)
        server = read_server(address) if address else None
    return FoundTeam(name, file, overview, server)


def _own_address(request: Request) -> str:
    """Return the address of the server that shows the studio, as this machine reaches it."""
    host, port = request.scope.get("server") or ("", 0)
    return local_address(host, port or 0)


def _address_of_job(studio: Studio, file: Path) -> str:
    """Return the address of a server of a team that a job of the studio runs; empty if there is none."""
    for status in studio.jobs.files.statuses():
        is_server = status.job.verb == "serve" and status.state is JobState.RUNNING
        if is_server and str(file) in status.job.arguments:
            return str(studio.jobs.files.result(status.job.id).get("address", ""))
    return ""


def recent_commands(studio: Studio, verb: str, target: Path) -> list[JobStatus]:
    """Return the newest commands of a verb that act on a path, which is their `out`."""
    statuses = studio.jobs.files.statuses()
    return [item for item in statuses if item.job.verb == verb and item.job.out == str(target)][:RECENT_COMMANDS]


@router.get("/team")
def teams(request: Request, visitor: Viewer) -> Response:
    """List the teams with what is live."""
    studio = studio_of(request)
    found = [_found_team(request, studio, name, file, 1) for name, file in teams_of(studio).items()]
    return render(request, visitor, "teams", found=found)


@router.get("/team/{name:path}")
def team(request: Request, visitor: Viewer, name: str) -> Response:
    """Show a team."""
    studio = studio_of(request)
    file = _team_file(studio, name)
    found = _found_team(request, studio, name, file, MAX_EVENTS)
    commands = recent_commands(studio, VERB, file)
    agents = _agent_rows(studio, found) if found.overview else []
    return render(
        request,
        visitor,
        "team",
        title=file.name if name == SERVER else name,
        name=name,
        found=found,
        agents=agents,
        others=_others(found, agents),
        commands=commands,
        refresh_s=FAST_S if any(not status.state.is_over for status in commands) else SLOW_S,
        key_variable=KEY_VARIABLE,
        max_reason_chars=MAX_REASON_CHARS,
        max_events=MAX_EVENTS,
    )


@dataclass(frozen=True)
class AgentRow:
    """An agent on the page: the registry's `Agent`, its versions, and their traffic.

    first_release: directory of the Release that the team's file names.
    """

    agent: Any
    versions: Sequence[VersionRow]
    frozen: Any
    first_release: str = ""

    @property
    def registered(self) -> list[str]:
        """Names of its versions that may become live, the newest first."""
        return [row.version for row in self.versions if row.version != self.agent.live]


@dataclass(frozen=True)
class VersionRow:
    """A version of an agent. place: live, candidate, previous or registered; page: of its Release in the studio."""

    version: str
    place: str
    entry: Any
    page: str
    traffic: VersionTraffic | None


def _agent_rows(studio: Studio, found: FoundTeam) -> list[AgentRow]:
    overview = found.overview
    rows = []
    for name, agent in sorted(overview.agents.items()):
        entries = [entry for entry in overview.versions.values() if entry.agent == name]
        entries.sort(key=lambda entry: (entry.added, entry.version), reverse=True)
        versions = []
        for entry in entries:
            page = studio.folder.name_of(Path(entry.release))
            traffic = found.server.versions.get(entry.name) if found.server else None
            versions.append(VersionRow(entry.version, _place(agent, entry.version), entry, page, traffic))
        order = ("live", "candidate", "previous", "registered")
        versions.sort(key=lambda row: order.index(row.place))
        rows.append(AgentRow(agent, versions, overview.frozen.get(name), overview.releases.get(name, "")))
    return rows


def _place(agent: Any, version: str) -> str:
    places = {agent.previous: "previous", agent.candidate: "candidate", agent.live: "live"}
    return places.get(version, "registered")


def _others(found: FoundTeam, agents: Sequence[AgentRow]) -> Mapping[str, VersionTraffic]:
    """Return the traffic of what is no registered version, such as the base."""
    if found.server is None:
        return {}
    registered = {row.entry.name for agent in agents for row in agent.versions}
    return {name: traffic for name, traffic in found.server.versions.items() if name not in registered}


@router.post("/team/{name:path}")
def act(request: Request, visitor: Owner, name: str, form: PostedForm) -> Response:
    """Start a command that changes an agent, and show the team again."""
    assert visitor.user is not None
    studio = studio_of(request)
    file = _team_file(studio, name)
    agent, action = text_field(form, "agent"), text_field(form, "action")
    overview = sartor.team_overview(file, events=1)
    if agent not in {*overview.agents, *overview.damaged}:
        raise ConfigError(f"{name} has no agent {agent[:80]!a}", "reload the page of the team")
    if action not in list(AgentAction):
        raise ConfigError(f"there is no action {action[:40]!a}", f"one of {', '.join(AgentAction)}")
    reason = text_field(form, "reason", max_chars=MAX_REASON_CHARS)
    verb = AgentAction.PROMOTE if action == AgentAction.CANARY else AgentAction(action)
    arguments = [VERB, verb, agent, *_version_arguments(AgentAction(action), agent, overview.versions, form)]
    if verb in (AgentAction.PROMOTE, AgentAction.ROLLBACK) and (expected := text_field(form, "expected")):
        arguments.append(f"--expected-version={expected}")
    arguments += [f"--reason={reason}"] if reason else []
    arguments += [f"--by={visitor.user.name}", f"--team={file}"]
    studio.jobs.start(
        arguments,
        title=f"{action} {agent}",
        by=visitor.user.name,
        cwd=studio.folder.root,
        out=str(file),
        is_heavy=False,
    )
    return redirect(request, f"/team/{name}")


def _version_arguments(action: AgentAction, agent: str, versions: Mapping[str, Any], form: Any) -> list[str]:
    """Return the version of a promotion or trial, and its fractions. Raises ConfigError."""
    if action not in (AgentAction.PROMOTE, AgentAction.CANARY):
        return []
    version = text_field(form, "version")
    if f"{agent}@{version}" not in versions:
        raise ConfigError(f"{agent} has no version {version[:80]!a}", "sartor agents add RELEASE registers one")
    if action is AgentAction.PROMOTE:
        return [version]
    return [version, f"--canary={_fraction(text_field(form, 'percent', max_chars=10)):g}"]


def _fraction(text: str) -> float:
    try:
        percent = float(text.replace(",", "."))
    except ValueError:
        percent = -1.0
    if not 0 < percent <= 100:
        raise ConfigError(f"{text!a} is no share of the requests", "a number above 0, up to 100, such as 10")
    return percent / 100
