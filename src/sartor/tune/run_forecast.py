"""Forecast of a running tune, compared with its cost.

Time is forecast from the run's own first updates and not from a calibration. They cost nothing extra, and the later
updates are like them (docs/decisions/004-forecast.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sartor.models.losses.loss_backend import LossBackend
from sartor.models.packing import TokenizedExample
from sartor.tune import checkpoint_selection, cost_model, preflight
from sartor.tune.cost_model import (
    FORWARD_FRACTION,
    TIME_ALLOWANCE,
    BatchLoad,
    Interval,
    MicroBatchChoice,
    RunCounters,
    TimingProbe,
    load_of,
    take,
)
from sartor.tune.recipe import ResolvedRecipe
from sartor.tune.tokenized_dataset import TokenizedDataset, all_sequences

# Largest fraction of the run's tokens that a calibration may read
PROBE_FRACTION = 0.03
# Number of first updates from which the rest is forecast; the very first is slower and left out
TIMED_UPDATES = 4


@dataclass
class RunForecast:
    """Expected cost of a run of `tune`: memory before its first update, time after a few updates.

    course_tokens: tokens that the whole run reads; None if minutes are its only limit.
    evaluated_tokens: tokens that all evaluations read.
    limit_s: limit of the budget in seconds; None without one.
    updates: of the whole run; None if minutes are its only limit.
    """

    settled: MicroBatchChoice
    memory: Interval
    course_tokens: int | None
    evaluated_tokens: int
    limit_s: float | None
    time: Interval | None = None
    updates: int | None = None

    def __post_init__(self) -> None:
        self._seconds: list[float] = []
        self._tokens: list[int] = []

    @property
    def line(self) -> str:
        """Summary for a reader, before the first update."""
        settled, peak = self.settled, self.memory * 1e-9
        # `MemoryModel.peak` is at least what the process has held by now: above the interval, its ends meet there
        interval = "reached before the first update"
        if peak.low < peak.high:
            interval = f"90 % in {peak.low:.2f}..{peak.high:.2f}"
        return (
            f"micro-batch {settled.micro_batch_tokens:,} tokens ({settled.reason}); "
            f"peak memory {peak.estimate:.2f} GB, {interval}"
        )

    def observe(self, tokens: int, seconds: float, read_tokens: int, wall_s: float) -> bool:
        """Record an update; return true if it is the one that completes the forecast of time.

        tokens, seconds: of the update.
        read_tokens, wall_s: of the whole run so far.
        """
        self._seconds.append(seconds)
        self._tokens.append(tokens)
        if len(self._seconds) != TIMED_UPDATES:
            return False
        token_s = sum(self._seconds[1:]) / sum(self._tokens[1:])
        rates = [spent / read for spent, read in zip(self._seconds[1:], self._tokens[1:], strict=True)]
        # 90 % interval of a normal mean of n rates: 1.645 s / sqrt(n), relative, plus the allowance
        spread = float(np.std(rates, ddof=1)) / token_s
        half_width = 1.645 * spread / len(rates) ** 0.5 + TIME_ALLOWANCE
        if self.course_tokens is not None:
            rest_s = (self.course_tokens - read_tokens + self.evaluated_tokens * FORWARD_FRACTION) * token_s
            self.time = Interval(rest_s, rest_s * (1 - half_width), rest_s * (1 + half_width)).at_least(0) + wall_s
        if self.limit_s is not None:
            unbounded = self.time or Interval(self.limit_s, self.limit_s, self.limit_s)
            # beyond the limit, the run finishes its current update and makes the last evaluation
            over_s = (self._tokens[-1] + self.evaluated_tokens * FORWARD_FRACTION) * token_s
            self.time = replace(unbounded.at_most(self.limit_s), high=min(unbounded.high, self.limit_s) + over_s)
        return self.time is not None

    def as_json(self) -> dict[str, Any]:
        """Return the forecast as in the manifest."""
        time_s = self.time.as_json(3) if self.time else None
        return {"time_s": time_s, "peak_memory_bytes": self.memory.as_json()}

    def errors(self, wall_s: float, peak_bytes: int) -> dict[str, float | None]:
        """Return actual / estimate - 1 of time and memory; None without a forecast."""
        time = round(wall_s / self.time.estimate - 1, 4) if self.time else None
        return {"time": time, "memory": round(peak_bytes / self.memory.estimate - 1, 4)}


def calibration_batches(rows: Sequence[TokenizedExample], max_tokens: float | None) -> list[list[TokenizedExample]]:
    """Return two micro-batches to measure memory with, the second of up to three times the tokens.

    Empty if the second would have no more rows, or if both together have more than `max_tokens` tokens.
    """
    small = take(rows, 128)
    large = take(rows, 3 * sum(len(row.ids) for row in small))
    cost = sum(len(row.ids) for row in [*small, *large])
    return [] if len(large) == len(small) or (max_tokens is not None and cost > max_tokens) else [small, large]


def calibrate(probe: TimingProbe, rows: Sequence[TokenizedExample], max_tokens: float | None) -> None:
    """Measure the memory of `calibration_batches`; the first only warms up."""
    for index, group in enumerate(calibration_batches(rows, max_tokens)):
        probe.run(group, warm_up=not index)
    probe.settle()


def unmeasured(micro_batch_tokens: int, reason: str) -> RunForecast:
    """Return a forecast that states a micro-batch size and nothing else.

    A size that depended on free memory would change the last bits of a run's result.
    """
    return RunForecast(
        MicroBatchChoice(micro_batch_tokens, BatchLoad(), fits=True, reason=reason),
        memory=Interval(0.0, 0.0, 0.0),
        course_tokens=None,
        evaluated_tokens=0,
        limit_s=None,
    )


def foresee(
    recipe: ResolvedRecipe,
    path: LossBackend,
    model: Any,
    device: torch.device,
    data: TokenizedDataset,
    counters: RunCounters,
) -> RunForecast:
    """Return the forecast of a run, with its micro-batch size chosen.

    counters: new ones, used to simulate the run.
    No trained state changes. Raises BudgetError if memory cannot hold the run, with changes of the recipe that would
    fit.
    """
    beginning = cost_model.common_beginning(recipe, path, all_sequences(data.train))
    loads = [load_of(row, beginning) for row in data.train]
    rehearsal_loads = [load_of(row, beginning) for row in data.rehearsal]
    is_counted = cost_model.simulate_updates(recipe, loads, counters, rehearsal_loads) is not None
    loads += rehearsal_loads
    probe = TimingProbe(path, model, device, beginning)
    calibrate(probe, all_sequences(data.train), PROBE_FRACTION * counters.tokens if is_counted else None)
    memory = cost_model.memory_model(cost_model.shape_of(model, recipe), probe)
    for refusal in preflight.check_memory(memory, recipe, loads):
        raise refusal.error
    settled = cost_model.choose_micro_batch(memory, recipe, loads)
    passes = recipe.evaluations * checkpoint_selection.passes(recipe, data.held_out)
    return RunForecast(
        settled,
        memory=memory.peak(settled.load),
        course_tokens=counters.tokens if is_counted else None,
        evaluated_tokens=passes * sum(row.tokens for row in data.held_out),
        limit_s=recipe.budget.minutes and recipe.budget.minutes * 60,
        updates=counters.updates if is_counted else None,
    )
