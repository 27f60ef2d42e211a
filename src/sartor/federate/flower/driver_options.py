"""File of a ServerApp: the rounds to drive, with whom and where.

    run: triage
    rounds: 10                      up to this number, also in a run that goes on
    key: coordinator.key            paths are read from the file's own folder
    roster: roster                  NAME.pub of the coordinator and of each client
    journal: coordinator.sqlite
    start: start.tensors            updates.pack_tensors(...): what the first round starts from
    round: {task: pull, cohort: [ward-1, ward-2, ward-3], rules: {clip: 1.0}, stage_s: 300}
    lora: {mode: freeze_a}          of the task lora, which `sartor federate coordinator` writes down

Beside the journal it writes NAME.rounds.jsonl, a line for each round that ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sartor.core import config
from sartor.core.config import REQUIRED, option
from sartor.core.errors import BusyError, MissingError
from sartor.federate import updates as arrays
from sartor.federate.flower.flower_transport import FlowerTransport
from sartor.federate.rounds.round_client import Participant
from sartor.federate.rounds.round_coordinator import RoundPlan
from sartor.federate.rounds.round_driver import FinishedRound, RoundDriver, RoundSchedule
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.round_manifest import Manifest, SideTensor, UpdateRules
from sartor.federate.rounds.transport import Transport
from sartor.federate.secure.identities import Identity, PinnedKeys
from sartor.federate.tuning.round_schedule import LoraOptions, LoraSchedule
from sartor.models.lora_tensors import Tensors

# seconds to wait for the journal: a ServerApp whose SuperLink was killed holds it some seconds longer
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class RoundOptions:
    """Options of each round, the fields of a RoundPlan."""

    task: str = option(REQUIRED, "the type of work, which each client has installed")
    cohort: tuple[str, ...] = option(REQUIRED, "names of the clients")
    settings: Any = option(None, "a mapping for the task")
    rules: UpdateRules = option(UpdateRules(), "clip, noise, most_examples, stale_rounds, mode")
    trained: tuple[str, ...] = option((), "names of the tensors that are changed; none: all")
    base: str = option("", "digest of what is tuned")
    recipe: str = option("", "digest of how")
    degree: int = option(0, "of the graph; 0 joins everyone with everyone")
    threshold: int = option(0, "how many must stay to the end; 0: the least above 2/3")
    stage_s: int = option(300, "seconds that an exchange may take; Flower alone takes ten")
    work_s: int = option(3_600, "seconds more for the first, in which clients compute")
    length_s: int = option(86_400, "seconds that the round may take")

    def plan(self) -> RoundPlan:
        """Return the plan that the coordinator takes."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return RoundPlan(**{**values, "settings": self.settings or {}})


class _Plain:
    """Schedule whose rounds are all alike, cost nothing and leave no line."""

    pool = None

    def __init__(self, plan: RoundPlan) -> None:
        self._plan = plan

    def plan(self, number: int, shared: Tensors) -> tuple[RoundPlan, Sequence[SideTensor]]:
        """Return the same plan for every round, without side tensors, whatever the shapes of `shared`."""
        return self._plan, ()

    def pay(self, manifest: Manifest) -> None:
        """Do nothing."""

    def line(self, manifest: Manifest, active: Sequence[str], shared: Tensors, mean: Tensors) -> None:
        """Return no metrics, whatever the shapes of the tensors."""


@dataclass(frozen=True)
class RoundDriverOptions:
    """Options in the driver's file; `open` makes the paths absolute."""

    run: str = option(REQUIRED, "name of the run")
    key: str = option(REQUIRED, "the coordinator's private key, as sartor keygen writes it")
    roster: str = option(REQUIRED, "folder of NAME.pub")
    journal: str = option(REQUIRED, "the coordinator's journal")
    start: str = option(REQUIRED, "packed tensors that the first round starts from")
    round: RoundOptions = option(REQUIRED, "what each round is")
    rounds: int = option(1, "the number of the last round")
    name: str = option("coordinator", "the coordinator's name in the roster")
    lora: LoraOptions | None = option(None, "of the task lora: mode, seed, privacy")

    @classmethod
    def open(cls, path: Path) -> RoundDriverOptions:
        """Read the options from a file. Raises ConfigError with the line or the option that is wrong."""
        options = config.load(cls, config.read_yaml(path))
        paths = {
            name: str(path.parent.absolute() / getattr(options, name))
            for name in ("key", "roster", "journal", "start")
        }
        return cls(**{**{item.name: getattr(options, item.name) for item in fields(cls)}, **paths})

    @property
    def record(self) -> Path:
        """File with a line for each round that ended."""
        return Path(self.journal).with_suffix(".rounds.jsonl")

    @property
    def trouble(self) -> Path:
        """File with the error that ended a process that led."""
        return Path(self.journal).with_suffix(".error.json")

    def schedule(self, journal: RoundJournal) -> RoundSchedule:
        """Return the schedule of the rounds."""
        plan = self.round.plan()
        if self.lora is None:
            return _Plain(plan)
        return LoraSchedule(self.lora, plan, journal, Path(self.journal).with_suffix(".privacy.json"))


def drive_rounds(lead: RoundDriverOptions, transport: Transport) -> Iterator[str]:
    """Run an open round to its end, then the next ones up to `lead.rounds`; yield a JSON line for each.

    It may be stopped and called again at any point: it resumes from the journal. Raises BusyError if another process
    leads, and the errors of RoundDriver.
    """
    with _open_journal(Path(lead.journal)) as journal:
        identity = Identity.open(lead.name, Path(lead.key))
        schedule = lead.schedule(journal)
        member = Participant(identity, PinnedKeys.open(Path(lead.roster)), lead.name)
        driver = RoundDriver(member, journal, lead.run, schedule, transport)
        if not driver.coordinator.has_tensors:
            driver.coordinator.start(arrays.unpack_tensors(_read(Path(lead.start))))
        for finished_round in driver.run(lead.rounds):
            line = json.dumps(_round_record(finished_round, transport))
            with lead.record.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            yield line


def _round_record(finished_round: FinishedRound, transport: Transport) -> dict[str, Any]:
    """Return the record of a round, without its tensors."""
    result = finished_round.result
    record: dict[str, Any] = {
        "number": result.number,
        "state": result.state,
        "active": result.active,
        "reason": result.reason,
        "took_s": round(finished_round.took_s, 2),
        **asdict(finished_round.stats),
    }
    if isinstance(transport, FlowerTransport):
        record |= {"said_no": dict(transport.said_no), "lost": transport.lost, "away": sorted(transport.away)}
    return record


def _open_journal(path: Path) -> RoundJournal:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return RoundJournal(path)
        except BusyError:
            if time.monotonic() > deadline:
                raise
        time.sleep(1.0)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingError(
            f"{path} cannot be read: {error.strerror}", "write what the first round starts from"
        ) from None
