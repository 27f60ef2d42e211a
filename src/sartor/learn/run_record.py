"""Record and context of one retrain run.

    STATE/retrain/AGENT/3/
      retrain.json     the record: which version is live, the facts of each stage that is done, the decision
      feedback/  data/  adapter/  ...     what the stages made: artefacts, each whole or absent

A stage is done when the record says so, which is after its artefacts are written. An interrupted retrain resumes at
the first stage that the record lacks. That stage finds the artefacts that it had finished itself.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import ArtifactError, ConfigError, UnknownAgentError
from sartor.core.filesystem import PRIVATE, make_private_folder, write_file_atomic, writer_lock
from sartor.core.installation import upgrade_command
from sartor.core.lineage import ancestry
from sartor.release.release import Waiver
from sartor.serving.commands.agent_commands import add_agent
from sartor.serving.registry.registry import Registry, Snapshot
from sartor.serving.team_config import Retraining, Team

SCHEMA = 1
FILE = "retrain.json"
# "" while stages are left; "canary" until the monitors or a person decide
Decision = Literal["", "promoted", "canary", "candidate", "refused", "rolled back"]
FINAL = ("promoted", "refused", "rolled back", "candidate")


@dataclass(frozen=True)
class Live:
    """Version that a retrain starts from and is compared with.

    release: its directory.
    release_id: id of its manifest.
    """

    version: str
    release: str
    release_id: str


@dataclass(frozen=True)
class Record:
    """Facts about a retrain.

    began, ended: UTC, ISO.
    stages: facts by name, in the order in which they were done.
    gain: as `Claim.as_json` returns it.
    """

    agent: str
    number: int
    began: str
    live: Live
    stages: Mapping[str, Mapping[str, Any]]
    decision: Decision = ""
    reason: str = ""
    gain: Mapping[str, Any] | None = None
    ended: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the content of the file; `from_json` makes an equal record of it."""
        return {"schema": SCHEMA, **vars(self), "live": vars(self.live)}

    @classmethod
    def from_json(cls, payload: Mapping[str, Any]) -> Record:
        """Return the record in a file's content.

        Raises ArtifactError for another schema, KeyError or TypeError for no record.
        """
        if payload.get("schema") != SCHEMA:
            raise ArtifactError(
                f"a retrain of schema {payload.get('schema')!r}; this reads {SCHEMA}", upgrade_command()
            )
        fields = {key: value for key, value in payload.items() if key != "schema"}
        return cls(**{**fields, "live": Live(**fields["live"])})


class RunRecord:
    """Folder of one retrain, and its record. One process holds it under `retrain_lock`."""

    def __init__(self, folder: Path, record: Record) -> None:
        self.folder, self.record = folder, record

    @classmethod
    def create(cls, state: Path, agent: str, live: Live) -> RunRecord:
        """Create the next retrain of an agent."""
        number = max((run.record.number for run in list_runs(state, agent)), default=0) + 1
        record = Record(agent, number, began=now(), live=live, stages={})
        run = cls(_home(state, agent) / str(number), record)
        run._write()
        return run

    @classmethod
    def open(cls, folder: Path) -> RunRecord:
        """Return the retrain in a folder. Raises ArtifactError if the record is damaged."""
        file = folder / FILE
        try:
            return cls(folder, Record.from_json(json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{file} is no whole record: {error}", f"move {folder} elsewhere: a new retrain begins"
            ) from None

    def done(self, stage: str) -> bool:
        """Return whether the stage is done."""
        return stage in self.record.stages

    def facts(self, stage: str) -> Mapping[str, Any]:
        """Return the facts of a stage that is done."""
        return self.record.stages[stage]

    def finish(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Store the facts of a stage that is done, after its artefacts are written."""
        self.record = replace(self.record, stages={**self.record.stages, stage: dict(facts)})
        self._write()

    def decide(self, decision: Decision, reason: str, gain: Mapping[str, Any] | None = None) -> None:
        """Record the decision. It may be replaced while it is not final."""
        gain = self.record.gain if gain is None else gain
        self.record = replace(self.record, decision=decision, reason=reason, gain=gain, ended=now())
        self._write()

    @property
    def is_open(self) -> bool:
        """True while there is no decision."""
        return not self.record.decision

    def _write(self) -> None:
        text = json.dumps(self.record.as_json(), indent=1, ensure_ascii=False) + "\n"
        write_file_atomic(self.folder / FILE, text.encode(), mode=PRIVATE)


def list_runs(state: Path, agent: str) -> list[RunRecord]:
    """Return every retrain of an agent, oldest first.

    A folder without a record was killed before it began, and is skipped.
    """
    folders = (
        folder for folder in _home(state, agent).glob("*") if folder.name.isdigit() and (folder / FILE).exists()
    )
    return [RunRecord.open(folder) for folder in sorted(folders, key=lambda folder: int(folder.name))]


@contextmanager
def retrain_lock(state: Path, agent: str) -> Iterator[None]:
    """Hold the lock on an agent's retrains.

    Raises ConfigError if another process holds it; a lock ends with its process.
    """
    home = _home(state, agent)
    make_private_folder(home.parent)
    busy = True
    try:
        with writer_lock(home):
            busy = False
            yield
    except ConfigError:
        if not busy:
            raise
        raise ConfigError(f"another process retrains {agent}", "wait for it: its record is in " + str(home)) from None


def now() -> str:
    """Return the current time in UTC, ISO, to the second, as the inbox writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _home(state: Path, agent: str) -> Path:
    return state / "retrain" / agent


Notice = Callable[[str], None]


@dataclass(frozen=True)
class RetrainOptions:
    """A person's options for one retrain.

    promote: make the version live even if no server is running.
    anyway: retrain with less feedback than required.
    believe, ignore: keys.
    waivers: of checks of the Release's own gate, not of those against the live version.
    """

    promote: bool = False
    anyway: bool = False
    believe: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    waivers: tuple[Waiver, ...] = ()


@dataclass(frozen=True)
class RetrainContext:
    """Context of a retrain, passed to its stages."""

    team: Team
    run: RunRecord
    wishes: RetrainOptions
    notice: Notice

    @property
    def rules(self) -> Retraining:
        """Section `retrain` of TEAM.yaml."""
        return self.team.retrain

    @property
    def agent(self) -> str:
        """Name of the agent."""
        return self.run.record.agent

    def at(self, name: str) -> Path:
        """Return the path of an artefact of this retrain."""
        return self.run.folder / name

    def live(self) -> Artifact:
        """Return the live Release. Raises ArtifactError if it is missing, or another one is in its place."""
        live = self.run.record.live
        release = open_artifact(live.release, "release")
        if release.id != live.release_id:
            raise ArtifactError(
                f"{live.release} is no longer the Release {live.release_id[:16]}", f"cp -r BACKUP/. {live.release}"
            )
        return release

    def own_rows(self) -> Artifact:
        """Return the Dataset that the live version was tuned on. Raises ArtifactError if it is missing."""
        dataset = ancestry.find_parent(self.live(), "dataset")
        if dataset is None:
            raise ArtifactError(
                f"the Dataset of {self.run.record.live.release} is not where it was: nothing could be rehearsed or "
                "held out",
                "sartor index DIR finds a Dataset that was moved",
            )
        return dataset


class Stage(Protocol):
    """Stage of a retrain: writes its artefacts, or finds them written, and returns facts.

    Raises GateError to refuse.
    """

    def __call__(self, job: RetrainContext) -> Mapping[str, Any]:
        """Return the facts for the record."""
        ...


def read_registry(team: Team) -> Snapshot:
    """Return every agent and version of a team."""
    with closing(Registry.of(team)) as registry:
        return registry.read()


def live_version(team: Team, agent: str) -> Live:
    """Return the live version of an agent.

    An agent that only TEAM.yaml names is registered first, as a server would. Raises UnknownAgentError, ArtifactError.
    """
    Path(team.state).mkdir(mode=0o700, parents=True, exist_ok=True)
    snapshot = read_registry(team)
    if agent not in snapshot.agents:
        member = next((member for member in team.agents if member.name == agent), None)
        if member is None:
            known = ", ".join(sorted({*snapshot.agents, *(member.name for member in team.agents)})) or "none"
            raise UnknownAgentError(f"no agent has the name {agent!r}; there are: {known}", "sartor agents list")
        add_agent(team, member.release, name=agent, why="retrain")
        snapshot = read_registry(team)
    agent_row = snapshot.agents[agent]
    version = snapshot.versions.get(f"{agent}@{agent_row.live}")
    if version is None:
        raise ArtifactError(
            f"{agent} has no live version: {agent_row.note or 'nothing was added'}", "sartor agents add RELEASE"
        )
    return Live(version.version, version.release, version.release_id)


def resolve_trial(team: Team, run: RunRecord) -> None:
    """Record the outcome of a version on trial: promoted, rolled back, or still on trial."""
    record = run.record
    if record.decision in FINAL:
        return
    version = str(record.stages["release"]["version"])
    snapshot = read_registry(team)
    agent, registered = snapshot.agents.get(record.agent), snapshot.versions.get(f"{record.agent}@{version}")
    if agent is not None and agent.live == version:
        run.decide("promoted", f"{record.agent}@{version} has become live after its trial")
    elif agent is None or agent.candidate != version:
        sent_back = registered is not None and registered.status == "rolled_back"
        reason = "was sent back: sartor agents events " + record.agent if sent_back else "is no longer on trial"
        run.decide("rolled back", f"{record.agent}@{version} {reason}")


def next_version(version: str, existing: Collection[str]) -> str:
    """Return the next version: its last number raised by one, further where that is taken.

    >>> next_version("1.9", ["1.10"]) '1.11' >>> next_version("first", []) 'first.1'
    """
    match = re.fullmatch(r"(.*?)(\d+)(\D*)", version)
    head, number, tail = match.groups() if match else (f"{version}.", "0", "")
    candidate = version
    while candidate == version or candidate in existing:
        number = str(int(number) + 1)
        candidate = f"{head}{number}{tail}"
    return candidate
