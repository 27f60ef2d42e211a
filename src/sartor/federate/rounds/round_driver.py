"""Driver of the rounds of one run, over any transport.

    open -> pay for the noise -> finish -> record the line

A simulation and a coordinator over a network drive their rounds with it. It resumes from the coordinator's journal at
any point: an open round is finished first. Noise is paid for before a noised number is seen, and a round's line is in
the journal before the round's end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from sartor.core import records
from sartor.federate.rounds.round_client import Participant
from sartor.federate.rounds.round_coordinator import Coordinator, Pool, RoundPlan, RoundResult
from sartor.federate.rounds.round_journal import RoundJournal
from sartor.federate.rounds.round_manifest import Manifest, SideTensor
from sartor.federate.rounds.transport import TransferStats, Transport, finish
from sartor.models.lora_tensors import Tensors, add_changes


class RoundSchedule(Protocol):
    """Plan of each round of a run, its price, and its line."""

    def plan(self, number: int, shared: Tensors) -> tuple[RoundPlan, Sequence[SideTensor]]:
        """Return the plan of the next round, and the shapes of what is summed besides; shared: the current tensors."""
        ...

    def pay(self, manifest: Manifest) -> None:
        """Record what an open round spends, before anything of it is sent.

        Called again where another process resumes the round. Raises BudgetError for a round beyond the budget.
        """
        ...

    @property
    def pool(self) -> Pool | None:
        """Function that combines the updates of an inspectable round; None without one."""
        ...

    def line(
        self, manifest: Manifest, active: Sequence[str], shared: Tensors, mean: Tensors
    ) -> Mapping[str, Any] | None:
        """Return the metrics of a round; None where the run has none.

        active: clients in the sum. shared: the tensors that the round started from. mean: of the updates, in the
        shapes of `shared`, and of the side tensors.
        """
        ...


class FinishedRound(NamedTuple):
    """Result of a round, and what its last process transferred.

    took_s: seconds in this process.
    """

    result: RoundResult
    stats: TransferStats
    took_s: float


class RoundDriver:
    """Driver of the rounds of one run, restored from the coordinator's journal.

    Raises what Coordinator raises.
    """

    def __init__(
        self,
        member: Participant,
        journal: RoundJournal,
        run: str,
        schedule: RoundSchedule,
        transport: Transport,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._journal, self._run, self._schedule, self._transport = journal, run, schedule, transport
        self.coordinator = Coordinator(member, journal, run, self._merge, clock, schedule.pool)

    def run(self, last_number: int) -> Iterator[FinishedRound]:
        """Yield each round up to this number as it ends, done or abandoned."""
        while self.coordinator.is_open or self._number < last_number:
            yield self.step()
        # clients that missed the last outcome get it now
        finish(self.coordinator, self._transport)

    def step(self) -> FinishedRound:
        """Run the next round, or the rest of an open one. Raises the errors of the schedule."""
        coordinator, started_at, stats = self.coordinator, time.monotonic(), TransferStats()
        if not coordinator.is_open:
            coordinator.begin(*self._schedule.plan(self._number + 1, coordinator.shared))
        assert coordinator.manifest
        self._schedule.pay(coordinator.manifest)
        result = finish(coordinator, self._transport, stats)
        assert result
        return FinishedRound(result, stats, time.monotonic() - started_at)

    @property
    def _number(self) -> int:
        """Number of the last round that began; 0 before the first."""
        rounds = self._journal.rounds(self._run)
        return rounds[0].number if rounds else 0

    def _merge(self, shared: Tensors, mean: Tensors) -> Tensors:
        """Record the round's line, once even after a kill, and return the next shared tensors, in their shapes."""
        manifest = self.coordinator.manifest
        assert manifest
        line = self._schedule.line(manifest, self.coordinator.active, shared, mean)
        if line is not None:
            self._journal.keep(_line_key(manifest.number), records.canonical(line))
        return add_changes(shared, mean)


def lines_of(journal: RoundJournal, run: str) -> list[dict[str, Any]]:
    """Return the metrics of each finished round, in order."""
    done = (stored_round.number for stored_round in reversed(journal.rounds(run)) if stored_round.state == "done")
    return [json.loads(journal.load(_line_key(number)) or b"{}") for number in done]


def _line_key(number: int) -> str:
    return f"line {number}"
