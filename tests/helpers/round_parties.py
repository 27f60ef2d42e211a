"""A coordinator and clients of whole rounds, in this process, for the tests of federate/rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from federating import COORDINATOR, LENIENT, identity, names, roster_of
from sartor.federate.rounds.round_client import Participant, RoundClient
from sartor.federate.rounds.round_coordinator import Coordinator, RoundPlan
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.round_manifest import LocalUpdate, Manifest, UpdateRules
from sartor.federate.rounds.transport import InProcess
from sartor.models.lora_tensors import Tensors

RULES = UpdateRules(clip=1.0, most_examples=10)
START = {"head.weight": np.zeros((2, 3), np.float32), "tail.weight": np.ones(4, np.float32)}


@dataclass
class Pull:
    """A task without chance: towards this client's number, from so many examples."""

    number: int
    calls: int = 0

    def update(self, manifest: Manifest, shared: Tensors) -> LocalUpdate:
        self.calls += 1
        rate = float(manifest.work.settings.get("rate", 0.01))
        return LocalUpdate(
            {name: np.full_like(value, rate * (self.number + 1)) for name, value in shared.items()}, self.number + 1
        )


def mean_of_numbers(numbers: list[int], rate: float = 0.01) -> float:
    """What the weighted mean of their updates is, in each place."""
    return rate * sum((number + 1) ** 2 for number in numbers) / sum(number + 1 for number in numbers)


@dataclass
class House:
    """A run with n clients; folder None: journals in memory."""

    count: int = 5
    folder: Path | None = None
    clock: Callable[[], float] = field(default=lambda: 1_000.0)

    def __post_init__(self) -> None:
        self.names = names(self.count)
        people = [identity(name) for name in self.names]
        self.me = identity(COORDINATOR)
        self.roster = roster_of(self.me, *people)
        self.members = {one.name: Participant(one, self.roster, COORDINATOR, LENIENT) for one in people}
        self.tasks = {name: Pull(number) for number, name in enumerate(self.names)}
        self.journals: dict[str, RoundJournal] = {}
        self.clients = {name: self.client(name) for name in self.names}
        self.transport = InProcess(self.clients)
        self.coordinator = self.lead()
        self.coordinator.start(START)

    def path(self, name: str) -> Path | None:
        return self.folder / f"{name}.sqlite" if self.folder else None

    def client(self, name: str, **options: object) -> RoundClient:
        """Opened anew, as after a kill."""
        journal = self._journal(name)
        return RoundClient(self.members[name], journal, {"pull": self.tasks[name]}, clock=self.clock, **options)

    def lead(self) -> Coordinator:
        member = Participant(self.me, self.roster, COORDINATOR, LENIENT)
        return Coordinator(member, self._journal(COORDINATOR), "triage", clock=self.clock)

    def _journal(self, name: str) -> RoundJournal:
        if self.folder and name in self.journals:
            self.journals.pop(name).close()
        if name not in self.journals:
            self.journals[name] = RoundJournal(self.path(name))
        return self.journals[name]

    def plan(self, **options: object) -> RoundPlan:
        return RoundPlan(**{"task": "pull", "cohort": self.names, "stage_s": 0, "rules": RULES, **options})
