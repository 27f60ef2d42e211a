"""What one retrain works on, and where its stages put what they make."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ArtifactError, UnknownAgentError
from sartor.core.lineage import ancestry
from sartor.release.release import Waiver
from sartor.retrain.work import FINAL, Live, Work
from sartor.serving.commands.agent_commands import add_agent
from sartor.serving.registry.registry import Registry, Snapshot
from sartor.serving.team_config import Retraining, Team

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Wishes:
    """What a person asks of this one retrain. believe, ignore: keys. promote: also where nobody serves the team. anyway: with
    less feedback than is asked for. waivers: of checks of the Release's own gate, not of those against the live version.
    """

    promote: bool = False
    anyway: bool = False
    believe: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    waivers: tuple[Waiver, ...] = ()


@dataclass(frozen=True)
class Job:
    """A retrain as its stages see it."""

    team: Team
    work: Work
    wishes: Wishes
    notice: Notice

    @property
    def rules(self) -> Retraining:
        """The section of TEAM.yaml."""
        return self.team.retrain

    @property
    def agent(self) -> str:
        """Its name."""
        return self.work.record.agent

    def at(self, name: str) -> Path:
        """What a stage makes, by the name of it."""
        return self.work.folder / name

    def live(self) -> Artifact:
        """The Release that is live. Raises ArtifactError where it is gone, or another one stands there."""
        known = self.work.record.live
        found = open_artifact(known.release, "release")
        if found.id != known.release_id:
            raise ArtifactError(f"{known.release} is no longer the Release {known.release_id[:16]}", "restore it from a copy")
        return found

    def own_rows(self) -> Artifact:
        """The Dataset that the live version was tuned on. Raises ArtifactError where it is gone."""
        dataset = ancestry.find_parent(self.live(), "dataset")
        if dataset is None:
            raise ArtifactError(
                f"the Dataset of {self.work.record.live.release} is not where it was: nothing could be rehearsed or held out",
                "sartor index DIR finds a Dataset that was moved",
            )
        return dataset


class Stage(Protocol):
    """One step of a retrain: makes its artefacts, or finds them made, and says what it found. Raises GateError to refuse."""

    def __call__(self, job: Job) -> Mapping[str, Any]:
        """Facts, for the record."""
        ...


def read_registry(team: Team) -> Snapshot:
    """Every agent and version of a team."""
    with closing(Registry.open(team.registry_url)) as registry:
        return registry.read()


def live_version(team: Team, agent: str) -> Live:
    """The version of an agent that is live; one that only TEAM.yaml names is registered first, as a server would.

    Raises UnknownAgentError, ArtifactError.
    """
    Path(team.state).mkdir(mode=0o700, parents=True, exist_ok=True)
    read = read_registry(team)
    if agent not in read.agents:
        member = next((member for member in team.agents if member.name == agent), None)
        if member is None:
            known = ", ".join(sorted({*read.agents, *(one.name for one in team.agents)})) or "none"
            raise UnknownAgentError(f"no agent has the name {agent!r}; there are: {known}", "sartor agents list")
        add_agent(team, member.release, name=agent, why="retrain")
        read = read_registry(team)
    standing = read.agents[agent]
    version = read.versions.get(f"{agent}@{standing.live}")
    if version is None:
        raise ArtifactError(
            f"{agent} has no live version: {standing.note or 'nothing was added'}", f"sartor agents add {agent}-1.0"
        )
    return Live(version.version, version.release, version.release_id)


def settle(team: Team, work: Work) -> None:
    """What became of a version that was on trial: live by now, sent back by the monitors or a person, or on trial still."""
    record = work.record
    if record.decision in FINAL:
        return
    version = str(record.stages["release"]["version"])
    read = read_registry(team)
    agent, known = read.agents.get(record.agent), read.versions.get(f"{record.agent}@{version}")
    if agent is not None and agent.live == version:
        work.decide("promoted", f"{record.agent}@{version} has become live after its trial")
    elif agent is None or agent.candidate != version:
        sent_back = known is not None and known.status == "rolled_back"
        why = "was sent back: sartor agents events " + record.agent if sent_back else "is no longer on trial"
        work.decide("rolled back", f"{record.agent}@{version} {why}")


def bumped(version: str, taken: Collection[str]) -> str:
    """The next version after one: its last number raised by one, further where that is taken.

    >>> bumped("1.9", ["1.10"])
    '1.11'
    >>> bumped("first", [])
    'first.1'
    """
    match = re.fullmatch(r"(.*?)(\d+)(\D*)", version)
    head, number, tail = match.groups() if match else (f"{version}.", "0", "")
    found = version
    while found == version or found in taken:
        number = str(int(number) + 1)
        found = f"{head}{number}{tail}"
    return found
