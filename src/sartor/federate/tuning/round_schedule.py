"""The rounds of a recipe, led by who sees no update: what each is to be, and what can be said of it. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sartor.core import records
from sartor.core.config import REQUIRED, option
from sartor.federate.aggregate.tensors__updates import Update
from sartor.federate.privacy.accountant import Account, Budget
from sartor.federate.robust.rules import AnyRule, Pooled
from sartor.federate.rounds.coordinator import Coordinator, Plan
from sartor.federate.rounds.journal import Journal
from sartor.federate.rounds.manifest import Beside, Manifest
from sartor.federate.tuning import canaries, measures
from sartor.federate.tuning.measures import Line
from sartor.federate.tuning.noise import noise_of, values_of
from sartor.federate.tuning.recipe import MODES, ModeName
from sartor.models.lora_tensors import Tensors, norm, plus


@dataclass(frozen=True)
class LoraOptions:
    """Of the rounds of the task `lora`, what differs from round to round, or is the coordinator's alone."""

    mode: ModeName = option(REQUIRED, "what clients train and send")
    seed: int = option(0, "the recipe's: of the canary")
    privacy: Budget | None = option(None, "what the adapter may tell of one client")
    robust: AnyRule | None = option(None, "of inspectable rounds: how the updates become one")


class LoraCourse:
    """See `lead.Course`. plan: what all rounds have in common. account: where privacy that is spent is written."""

    def __init__(self, options: LoraOptions, plan: Plan, journal: Journal, account: Path) -> None:
        self._options, self._common, self._journal = options, plan, journal
        self._account = Account(account, options.privacy) if options.privacy else None
        self._coordinator: Coordinator | None = None
        self._seen: tuple[list[Update], Pooled] | None = None

    def plan(self, number: int, shared: Tensors) -> tuple[Plan, Sequence[Beside]]:
        """What the round trains follows from its mode; without noise a canary's responses go along in the sum."""
        trained = MODES[self._options.mode].sent(shared, number)
        plan = replace(self._common, trained=tuple(trained))
        if plan.rules.noise or plan.rules.mode != "private":
            return plan, ()
        canary = canaries.of_round(shared, self._options.seed, number)
        return plan, canaries.besides(canary, shared, trained, plan.rules.clip)

    def opened(self, coordinator: Coordinator) -> None:
        """Pay for the round's noise, before a noised number is seen. Raises BudgetError for a round that the budget lacks."""
        self._coordinator = coordinator
        if self._account and (manifest := coordinator.manifest):
            self._account.spend(noise_of(manifest).spending(f"round-{manifest.number}", values_of(manifest)))

    def pool(self, updates: Sequence[Update]) -> Tensors:
        """What the recipe's rule makes of the updates. Raises GuardError where it stops the run."""
        assert self._options.robust
        self._seen = list(updates), self._options.robust.pool(updates)
        return self._seen[1].tensors

    def merged(self, shared: Tensors, mean: Tensors) -> Tensors:
        """The next shared adapter. The round's line is in the journal before the round's end is: once, whatever is killed."""
        assert self._coordinator and self._coordinator.manifest
        line = self._line(self._coordinator.manifest, self._coordinator.active, shared, mean)
        if self._seen:
            updates, pooled = self._seen
            verdicts = tuple(f"{one.client} {one.action}: {one.reason}" for one in pooled.verdicts)
            error = measures.exactness_error(shared, updates, self._options.seed + line.round)
            line = replace(line, exactness_error=error, quantisation_error=0.0, verdicts=verdicts)
        self._journal.keep(line_place(line.round), records.canonical(line.as_json()))
        return plus(shared, mean)

    def _line(self, manifest: Manifest, active: Sequence[str], shared: Tensors, mean: Tensors) -> Line:
        change = {name: value for name, value in mean.items() if name in shared}
        return Line(
            manifest.number,
            clients=len(active),
            clipped=None,
            update_norm=norm(change),
            exactness_error=canaries.error_of(shared, mean, self._options.seed, manifest.number),
            quantisation_error=None,
            uploaded_bytes=self._journal.bytes_of(manifest.digest, "answer"),
            loss_first=None,
            loss_last=None,
            epsilon=self._account.epsilon() if self._account else None,
        )


def lines_of(journal: Journal, run: str) -> list[dict[str, Any]]:
    """The line of each round that is done, in order."""
    done = (kept.number for kept in reversed(journal.rounds(run)) if kept.state == "done")
    return [json.loads(journal.kept(line_place(number)) or b"{}") for number in done]


def line_place(number: int) -> str:
    """Where a journal keeps the line of a round."""
    return f"line {number}"
