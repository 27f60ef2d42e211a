"""Servers of the page Talk: a base, an Adapter, a Release or a team, each a job `sartor serve`.

    .studio/served/NAME/state        records of a server of one artefact: receipts, inbox of feedback
    .studio/served/NAME/team.yaml    team of a base, or of a Release, by which `sartor retrain` finds the inbox

An Adapter is sealed anew for each server, so each has a folder of its own. A team has its records where its file says.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from sartor.core.artifacts import Artifact
from sartor.core.config import read_yaml
from sartor.core.errors import ConfigError, UnavailableError
from sartor.core.filesystem import PRIVATE, make_private_folder, write_file_atomic
from sartor.studio.jobs.job_files import Job, JobState, JobStatus, new_id
from sartor.studio.served_talk import BASE, Side
from sartor.studio.server_traffic import key_headers
from sartor.studio.studio_folder import FoundArtifact, StudioFolder
from sartor.studio.team_files import SUFFIXES, is_team, team_files
from sartor.studio.visitor import Studio

VERB = "serve"
BASE_PREFIX = "base:"
# what a page waits for a server's list of models
LIST_S = 3.0
_SPEECH, _AUTO = "speech", "auto"


@dataclass(frozen=True)
class ServedModel:
    """Model of a running server. root: exact version. title: of the server. reads: kinds of media."""

    side: Side
    root: str
    title: str
    reads: frozenset[str]


@dataclass(frozen=True)
class ServerView:
    """Running server.

    speaks: whether it has a voice.
    problems: why its models are unknown, or some of its agents are not served.
    """

    status: JobStatus
    address: str
    models: Sequence[ServedModel]
    speaks: bool = False
    problems: Sequence[str] = ()


@dataclass(frozen=True)
class TalkTarget:
    """What can be served. name: as the form of the page sends it. kind: "base", "adapter", "release" or "team"."""

    name: str
    kind: str


def servers(studio: Studio) -> dict[str, JobStatus]:
    """Return the jobs that serve, by their target, the newest of each."""
    found: dict[str, JobStatus] = {}
    for status in studio.jobs.files.statuses():
        if status.job.verb == VERB and not status.state.is_over:
            found.setdefault(status.job.out, status)
    return found


def targets(folder: StudioFolder) -> list[TalkTarget]:
    """Return what can be talked to: Releases and Adapters, teams, and the bases that artefacts name."""
    artifacts, _ = folder.scan()
    found = [
        TalkTarget(item.name, item.kind) for item in artifacts if item.kind in ("release", "adapter") and item.artifact
    ]
    found.sort(key=lambda target: target.kind, reverse=True)  # Releases first
    found += [TalkTarget(name, "team") for name in team_files(folder)]
    return [*found, *(TalkTarget(f"{BASE_PREFIX}{name}", "base") for name in _bases(artifacts))]


def _bases(artifacts: Sequence[FoundArtifact]) -> list[str]:
    """Return the names of the bases of artefacts."""
    names = set()
    for item in artifacts:
        base = item.artifact.manifest.get("base") if item.artifact else None
        if isinstance(base, dict) and isinstance(base.get("name"), str) and base["name"]:
            names.add(base["name"])
    return sorted(names)


def target_of(studio: Studio, name: str) -> tuple[str, str]:
    """Return the `out` of a target's job, and the target's kind. Raises OutsideError, ConfigError, ArtifactError."""
    if name.startswith(BASE_PREFIX):
        return str(_served(studio, f"base-{_digest(name)}") / "team.yaml"), "base"
    path = studio.folder.resolve(name)
    if path.suffix in SUFFIXES and path.is_file():
        if not is_team(path):
            raise ConfigError(f"{name} is no team: it has no base or no agents", "docs/agents.md shows one")
        return str(path), "team"
    artifact = studio.folder.artifact(name, ("adapter", "release"))
    return str(artifact.path), artifact.kind


def open_server(studio: Studio, name: str, by: str) -> str:
    """Serve a target, unless it is served, and return the id of the job. Raises what `target_of` raises."""
    out, kind = target_of(studio, name)
    if status := servers(studio).get(out):
        return status.job.id
    arguments = [VERB, out, "--port", "0"]
    if kind == "base":
        base = name.removeprefix(BASE_PREFIX)
        local = studio.folder.root / base
        _write_team(Path(out), {"base": str(local) if local.exists() else base})
    elif kind in ("adapter", "release"):
        artifact = studio.folder.artifact(name, ("adapter", "release"))
        arguments += ["--state", str(_records(studio, artifact) / "state")]
    job = studio.jobs.start(arguments, title=name, by=by, cwd=studio.folder.root, out=out, is_heavy=False)
    return job.id


def _records(studio: Studio, artifact: Artifact) -> Path:
    """Return the folder for the records of a server of an artefact."""
    if artifact.kind == "adapter":
        _remove_copies(studio, artifact)
        return _served(studio, f"adapter-{_digest(str(artifact.path))}-{new_id()}")
    folder = _served(studio, f"release-{_digest(str(artifact.path))}")
    member = {"name": artifact.manifest["name"], "release": str(artifact.path)}
    team = {"base": artifact.manifest["base"]["name"], "agents": [member], "state": "state"}
    _write_team(folder / "team.yaml", team)
    return folder


def _remove_copies(studio: Studio, artifact: Artifact) -> None:
    """Remove the copies of an Adapter that its ended servers have left; receipts and feedback stay."""
    for folder in (studio.folder.hidden / "served").glob(f"adapter-{_digest(str(artifact.path))}-*"):
        shutil.rmtree(folder / "state" / "adapters", ignore_errors=True)


def _served(studio: Studio, name: str) -> Path:
    folder = studio.folder.hidden / "served" / name
    make_private_folder(folder.parent)
    make_private_folder(folder)
    return folder


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def _write_team(file: Path, fields: Mapping[str, Any]) -> None:
    write_file_atomic(file, yaml.safe_dump(dict(fields), allow_unicode=True).encode(), mode=PRIVATE)


def state_of(job: Job) -> Path:
    """Return the folder of a server's records. Raises ConfigError for a team's file that cannot be read."""
    if "--state" in job.arguments:
        return Path(job.arguments[job.arguments.index("--state") + 1])
    file = Path(job.out)
    return file.parent / str(read_yaml(file).get("state") or f".{file.stem}")


def team_file_of(job: Job) -> Path | None:
    """Return the team's file by which commands find a server's records; None for an Adapter, which has none."""
    file = Path(job.out) if Path(job.out).suffix in SUFFIXES else state_of(job).parent / "team.yaml"
    return file if file.is_file() else None


def address_of(result: Mapping[str, Any]) -> str:
    """Return the address that `sartor serve` printed. Raises UnavailableError until there is one."""
    address = result.get("address")
    if not isinstance(address, str) or not address.startswith("http://127.0.0.1:"):
        raise UnavailableError("the server is not ready yet", "wait some seconds, then reload the page")
    return address


def running_server(studio: Studio, job_id: str) -> tuple[Job, str]:
    """Return the job of a server and its address. Raises ConfigError for another job, UnavailableError if it ended."""
    status = server_status(studio, job_id)
    if status.state is not JobState.RUNNING:
        raise UnavailableError("the server has ended", "open it again on the page Talk")
    return status.job, address_of(studio.jobs.files.result(job_id))


def server_status(studio: Studio, job_id: str) -> JobStatus:
    """Return the job of a server as it stands. Raises ConfigError for another job."""
    status = studio.jobs.files.status(job_id)
    if status.job.verb != VERB:
        raise ConfigError("this job is no server", "choose one on the page Talk")
    return status


def views(studio: Studio) -> list[ServerView]:
    """Return the servers that answer, with their models."""
    found = []
    for status in servers(studio).values():
        result = studio.jobs.files.result(status.job.id)
        if status.state is JobState.RUNNING and "address" in result:
            found.append(_view(status, result))
    return found


def _view(status: JobStatus, result: Mapping[str, Any]) -> ServerView:
    address, agents = address_of(result), [str(agent) for agent in result.get("agents") or ()]
    try:
        with httpx.Client(base_url=address, headers=key_headers(), timeout=LIST_S, trust_env=False) as client:
            answer = client.get("/v1/models")
            if answer.status_code != 200:
                return ServerView(status, address, (), problems=[str(answer.json()["error"]["message"])])
            listed = {str(model["id"]): model for model in answer.json()["data"]}
            troubles = client.get("/health").json()["troubles"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return ServerView(status, address, (), problems=[f"the server does not answer: {error}"])
    live = {str(model["root"]) for name, model in listed.items() if "@" not in name}
    models = []
    for name, model in listed.items():
        is_repeated = "@" in name and name in live
        is_choice = name == _AUTO and len(agents) < 2  # with one agent it is that one or the base, as the router says
        if name != _SPEECH and not is_repeated and not is_choice:
            reads = frozenset(map(str, model.get("modalities") or ())) - {"text"}
            root = name if name in (_AUTO, BASE) else str(model["root"])
            models.append(ServedModel(Side(status.job.id, name), root, status.job.title, reads))
    models.sort(key=lambda model: _rank(model.side.model, agents))
    problems = [f"{name}: {problem}" for name, problem in troubles.items()]
    return ServerView(status, address, models, _SPEECH in listed, problems)


def _rank(name: str, agents: Sequence[str]) -> int:
    """Return where a model stands in a list: the router's choice, agents, their versions, and the base."""
    ranks = {_AUTO: 0, BASE: 3}
    return ranks.get(name, 1 if name in agents else 2)
