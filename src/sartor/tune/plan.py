"""Verb plan: forecast of time and memory, and reasons for a refusal.

It writes no artefact and trains nothing. Files that are fetched, converted or compiled for the first time stay in
SARTOR_HOME.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sartor.core.artifacts import Artifact, open_artifact
from sartor.core.errors import BudgetError, ConfigError, SartorError, SourceError
from sartor.core.row_warnings import DataWarning
from sartor.inference.generate import context_tokens
from sartor.models import hardware, kernels
from sartor.models.base import Base, machine_facts
from sartor.models.hardware import best_device
from sartor.models.losses.loss_backend import LossBackend
from sartor.tune import (
    auto_settings,
    checkpoint_selection,
    cost_model,
    distil_cost,
    plan_warnings,
    preflight,
    run_forecast,
    sampler,
)
from sartor.tune.auto_settings import Setting, value_text
from sartor.tune.cost_model import (
    BatchLoad,
    Interval,
    MemoryModel,
    MicroBatchChoice,
    TimeModel,
    TimingProbe,
    load_of,
    take,
    total,
)
from sartor.tune.dataset_encoding import NoRowsError, encode_rows
from sartor.tune.distil_teachers import DistilTeacher, open_teacher
from sartor.tune.evaluation_forecast import EVALUATED_ROWS, forecast_evaluation
from sartor.tune.grpo_training import open_grpo
from sartor.tune.model_setup import calibrate, inject_recipe_adapter, open_recipe_base
from sartor.tune.preference_training import reached_pairs
from sartor.tune.recipe import REFERENCED, Distil, Grpo, Recipe, ResolvedRecipe
from sartor.tune.recipe import load as load_recipe
from sartor.tune.rehearsal import rehearsal_of
from sartor.tune.tokenized_dataset import TokenizedDataset, all_sequences
from sartor.tune.training_loop import Counters, loss_options

Notice = Callable[[str], object]
_HOURS = {"h": 1.0, "d": 24.0, "min": 1 / 60, "s": 1 / 3600}
# Approximate total seconds of timed micro-batches
_PROBE_S = 8.0
_SMALL_TOKENS = 128
# Most passes over the sizes, of at least two; another one follows while the relative half-width is over _WIDE
_MOST_PASSES, _WIDE = 5, 0.3


@dataclass(frozen=True)
class PlanAdvice:
    """Values of the `auto` options, and warnings of a disappointing result."""

    settings: Mapping[str, Setting] = field(default_factory=dict)
    warnings: Sequence[DataWarning] = ()


@dataclass(frozen=True)
class PlanMeasurement:
    """What a plan measured of the recipe's own base on this machine.

    load: the heaviest micro-batch.
    seconds: of all updates, without start and evaluations.
    half_width: of the seconds, relative.
    tokens, supervised_tokens: of the run.
    mean_row_tokens: length of the row that a token is in, averaged over the tokens.
    """

    memory: MemoryModel
    load: BatchLoad
    seconds: float
    half_width: float
    tokens: int
    supervised_tokens: int
    mean_row_tokens: float


@dataclass(frozen=True)
class TuningPlan:
    """Forecast of a tuning run.

    Intervals are None if a refusal left nothing to time; cost is None without a price.
    evaluation_s: of `sartor evaluate` on the held-out rows; None if `evaluation_forecast.py` returns none.
    """

    time_s: Interval | None = None
    evaluation_s: Interval | None = None
    peak_memory_bytes: Interval | None = None
    cost: Interval | None = None
    counters: Counters = field(default_factory=Counters)
    trainable: int = 0
    settled: MicroBatchChoice | None = None
    path: LossBackend | None = None
    device: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    reasoning: Mapping[str, int] = field(default_factory=dict)
    refusals: Sequence[preflight.Refusal] = ()
    advice: PlanAdvice = field(default_factory=PlanAdvice)
    measurement: PlanMeasurement | None = field(default=None, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return the command's JSON.

        tokens, supervised_tokens: those that the run reads, as `tune` counts them.
        """
        return {
            "time_s": self.time_s and self.time_s.as_json(3),
            "evaluation_s": self.evaluation_s and self.evaluation_s.as_json(3),
            "peak_memory_bytes": self.peak_memory_bytes and self.peak_memory_bytes.as_json(),
            "cost": self.cost and self.cost.as_json(6),
            "updates": self.counters.updates,
            "tokens": self.counters.tokens,
            "supervised_tokens": self.counters.supervised_tokens,
            "trainable": self.trainable,
            "micro_batch_tokens": self.settled and self.settled.micro_batch_tokens,
            "micro_batch_reason": self.settled and self.settled.reason,
            "path": self.path and self.path.name,
            "path_reason": self.path and self.path.reason,
            "left_out": dict(self.left_out),
            **({"reasoning": dict(self.reasoning)} if self.reasoning else {}),
            "machine": {**machine_facts(), "device": self.device},
            "settings": {name: setting.as_json() for name, setting in self.advice.settings.items()},
            "warnings": [vars(warning) for warning in self.advice.warnings],
            "refusals": [vars(refusal) for refusal in self.refusals],
        }

    def table(self) -> list[tuple[str, Any]]:
        """Return the forecast as (label, text) lines for a reader."""
        counters = self.counters
        return [
            ("time", _format_interval(self.time_s, "s")),
            ("evaluation", _format_interval(self.evaluation_s, "s")),
            ("peak memory", _format_interval(self.peak_memory_bytes and self.peak_memory_bytes * 1e-9, "GB")),
            *([("cost", _format_interval(self.cost, ""))] if self.cost else []),
            (
                "reads",
                f"{counters.tokens:,} tokens, {counters.supervised_tokens:,} supervised, {counters.updates:,} updates",
            ),
            ("trains", f"{self.trainable:,} parameters"),
            *(
                [("micro-batch", f"{self.settled.micro_batch_tokens:,} tokens: {self.settled.reason}")]
                if self.settled
                else []
            ),
            *([("path", f"{self.path.name}: {self.path.reason}")] if self.path else []),
            *(
                (f"auto {name}", f"{value_text(setting.value)}: {setting.reason}")
                for name, setting in self.advice.settings.items()
            ),
            *(("left out", f"{count:,} rows, {reason}") for reason, count in self.left_out.items()),
            *(("reasoning", f"{count:,} rows, {name}") for name, count in self.reasoning.items()),
            *(("warning", f"{warning.problem}\n  try: {warning.remedy}") for warning in self.advice.warnings),
            *(("refused", f"{refusal.problem}\n  try: {refusal.remedy}") for refusal in self.refusals),
        ]


def plan(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    *,
    device: str = "",
    price: str | float = "",
    notice: Notice = lambda line: None,
) -> TuningPlan:
    """Forecast `tune(recipe)` on this machine, from the real rows and a few timed micro-batches of them.

    device: `cpu`, `cuda` or `mps`; by default the one that `tune` would take.
    price: of the machine, `0.45/h` (also /d, /min, /s) or a number per hour.
    Raises ConfigError (recipe, device, price), ArtifactError (Dataset), ModelError (base). A problem that would stop
    the run is not raised but listed in `refusals`.
    """
    recipe = load_recipe(recipe)
    price_h = hourly(price)
    dataset = open_artifact(recipe.data.path, "dataset")
    torch_device = device_named(device) if device else None
    if refusals := list(preflight.of_base(recipe, torch_device)):
        return TuningPlan(device=str(torch_device or best_device()), refusals=refusals)
    # memory that this process held before, such as for the plan of a larger base, must not count in this run's peak
    gc.collect()
    hardware.release_free_memory()
    is_peak_restarted = hardware.restart_peak(torch_device or best_device())
    base = open_recipe_base(recipe, notice, torch_device)
    try:
        recipe, rehearsal_setting = auto_settings.choose_rehearsal(recipe, dataset, base)
        data = encode_rows(dataset, recipe, base.chat, rehearsal_of(recipe))
    except SourceError as error:
        unsupervised = preflight.Refusal(preflight.UNSUPERVISED, error.problem, error.remedy)
        left_out = error.left_out if isinstance(error, NoRowsError) else {}
        return TuningPlan(device=str(base.device), left_out=left_out, refusals=[unsupervised])
    calibrate(base, data)
    resolved, settings = auto_settings.resolve(recipe, data, base, rehearsal_setting)
    if no_room := list(preflight.of_room(resolved, context_tokens(base.model), data)):
        return TuningPlan(device=str(base.device), left_out=data.left_out_counts, refusals=no_room)
    # its weights are part of the memory that is held from here on
    teacher = open_teacher(resolved, base, notice)
    verifier_refusals = []
    try:
        open_grpo(resolved, base, data, notice)
    except SartorError as error:
        verifier_refusals.append(preflight.Refusal(preflight.VERIFIER, error.problem, error.remedy))
    try:
        model = inject_recipe_adapter(resolved, base)
    except BudgetError as error:
        oversized = preflight.Refusal(preflight.MEMORY, error.problem, error.remedy)
        refusals = [oversized, *verifier_refusals]
        return TuningPlan(device=str(base.device), left_out=data.left_out_counts, refusals=refusals)
    forecast = _forecast(
        resolved,
        dataset,
        base=base,
        model=model,
        data=data,
        price_h=price_h,
        teacher=teacher,
        is_peak_restarted=is_peak_restarted,
    )
    forecast = replace(forecast, refusals=[*forecast.refusals, *verifier_refusals])
    forecast = replace(forecast, advice=replace(forecast.advice, settings=settings))
    if forecast.time_s is None:
        return forecast
    held_out = dataset.manifest["counts"]["splits"].get("eval", 0) or len(data.held_out)
    rows = min(held_out, EVALUATED_ROWS)
    return replace(forecast, evaluation_s=forecast_evaluation(model, base.chat, data.held_out, rows))


def _forecast(
    recipe: ResolvedRecipe,
    dataset: Artifact,
    base: Base,
    model: Any,
    data: TokenizedDataset,
    price_h: float | None,
    teacher: DistilTeacher | None = None,
    *,
    is_peak_restarted: bool,
) -> TuningPlan:
    """Return the plan of a run: its updates are counted, and a few of its micro-batches are timed.

    price_h: of an hour of this machine; None for a plan without cost. is_peak_restarted: as of
    `TimingProbe`.
    """
    # kernels are compiled once per machine: `tune` will find them, so their compilation is not part of its time
    if recipe.compute.path == "auto":
        kernels.choose_kernels(base.device)
    began = time.monotonic()
    model.eval()
    # no activations are stored on disk: a plan leaves no file behind
    options = replace(loss_options(recipe, data, base), reuse_bytes=0)
    sequences = all_sequences(data.train)
    path = base.path(model, sequences, options)
    start_s = time.monotonic() - began
    beginning = cost_model.common_beginning(recipe, path, sequences)
    loads = [load_of(row, beginning) for row in data.train]
    rehearsal_loads = [load_of(row, beginning) for row in data.rehearsal]
    counters = Counters()
    updates = cost_model.simulate_updates(recipe, loads, counters, rehearsal_loads)
    loads += rehearsal_loads
    probe = TimingProbe(path, model, base.device, beginning, is_peak_restarted=is_peak_restarted)
    shape = cost_model.shape_of(model, recipe)
    refusals = list(preflight.of_rows(recipe, base.chat, data))
    memory = cost_model.memory_model(shape, probe)
    smallest = take(sequences, 1)
    # if not even one row fits, the system would kill a probe
    can_time = memory.fits(probe.load_of(smallest))
    if can_time:
        memory = _probe(probe, memory, recipe=recipe, data=data, loads=loads)
    settled = cost_model.choose_micro_batch(memory, recipe, loads)
    refusals.extend(preflight.check_memory(memory, recipe, loads))
    duration, measurement, warnings = None, None, list[DataWarning]()
    replies_s = Interval(0.0, 0.0, 0.0)
    if can_time:
        times = cost_model.time_model(probe.samples, probe.optimizer_seconds())
        if updates is None:
            _count_by_minutes(counters, times, recipe, loads)
        began = time.monotonic()
        warnings = plan_warnings.run_warnings(
            recipe,
            dataset,
            base=base,
            path=path,
            updates=counters.updates,
            row_tokens=[row.tokens for row in data.train],
        )
        start_s += time.monotonic() - began  # `tune` computes the warnings too
        if isinstance(recipe.objective, REFERENCED):
            # reference log-probabilities are computed once, before the first update
            reference_load = probe.load_of(all_sequences(reached_pairs(recipe, data)))
            start_s += times.seconds(reference_load) * cost_model.FORWARD_FRACTION
        if isinstance(recipe.objective, Distil) and teacher is not None:
            cost = distil_cost.measure(recipe.objective, teacher, counters, base=base, model=model, data=data)
            replies_s = cost.seconds(recipe, counters, times, data)
            warnings = [*warnings, *cost.warnings]
        if isinstance(recipe.objective, Grpo):
            replies_s = distil_cost.grpo_seconds(recipe, counters, times, base=base, model=model, data=data)
        # micro-batches by which `tune` measures its memory
        max_tokens = run_forecast.PROBE_FRACTION * counters.tokens if updates is not None else None
        calibration_batches = run_forecast.calibration_batches(sequences, max_tokens)
        start_s += sum(times.seconds(probe.load_of(group)) for group in calibration_batches)
        duration = run_seconds(
            times,
            recipe,
            updates=updates,
            micro_batch_tokens=settled.micro_batch_tokens,
            data=data,
            start_s=replies_s + start_s,
            beginning=beginning,
        )
        all_rows = total(loads)
        minutes_s = (recipe.budget.minutes or 0) * 60
        measurement = PlanMeasurement(
            memory=memory,
            load=settled.load,
            seconds=minutes_s if updates is None else update_seconds(times, updates, settled.micro_batch_tokens),
            half_width=times.half_width,
            tokens=counters.tokens,
            supervised_tokens=counters.supervised_tokens,
            mean_row_tokens=all_rows.pairs / max(all_rows.tokens, 1),
        )
    return TuningPlan(
        time_s=duration,
        peak_memory_bytes=memory.peak(settled.load, is_other_process=True),
        cost=duration * (price_h / 3600) if duration and price_h is not None else None,
        counters=counters,
        trainable=shape.trainable,
        settled=settled,
        path=path,
        device=str(base.device),
        left_out=data.left_out_counts,
        reasoning=data.reasoning,
        refusals=refusals,
        advice=PlanAdvice(warnings=warnings),
        measurement=measurement,
    )


def _probe(
    probe: TimingProbe,
    memory: cost_model.MemoryModel,
    recipe: ResolvedRecipe,
    data: TokenizedDataset,
    loads: Sequence[BatchLoad],
) -> cost_model.MemoryModel:
    """Time micro-batches and return the memory model that is calibrated by them.

    It times two sizes, and one batch of the longest row if the rows differ in length.
    """
    shuffled = next(sampler.iterate_updates([load.tokens for load in loads], 1 << 40, recipe.seed))
    rows = all_sequences(data.train[index] for index in shuffled if index < len(data.train))
    small = take(rows, _SMALL_TOKENS)
    probe.run(small, warm_up=True)
    second_s = probe.run(small)
    memory = cost_model.memory_model(memory.shape, probe)
    tokens = sum(len(row.ids) for row in small)
    micro = cost_model.choose_micro_batch(memory, recipe, loads).micro_batch_tokens
    # a quarter of the time for each of two passes of the large size; the rest for its warm-up and the small size
    large = take(rows, max(2 * tokens, min(micro, int(tokens * _PROBE_S / 4 / second_s))))
    groups = [small, large] if len(large) > len(small) else [small]
    longest = max(rows, key=lambda row: len(row.ids))
    if len(longest.ids) > 2 * tokens / len(small) and len(longest.ids) * second_s / tokens < _PROBE_S / 4:
        groups.append([longest])
    groups = [group for group in groups if memory.fits(probe.load_of(group))]
    for group in groups[1:]:
        probe.run(group, warm_up=True)
    for index in range(_MOST_PASSES):
        if index >= 2 and cost_model.time_model(probe.samples, 0.0).half_width <= _WIDE:
            break
        # each sample takes other rows, as updates do: oneDNN prepares kernel code for each new length
        first = index * len(large) % len(rows)
        shifted = [*rows[first:], *rows[:first]]
        for group in groups:
            is_longest = len(group) == 1 and group[0] is longest
            sample = group if is_longest else take(shifted, sum(len(row.ids) for row in group))
            if memory.fits(probe.load_of(sample)):
                probe.run(sample)
    probe.settle()
    return cost_model.memory_model(memory.shape, probe)


def run_seconds(
    times: TimeModel,
    recipe: ResolvedRecipe,
    updates: list[list[BatchLoad]] | None,
    micro_batch_tokens: int,
    data: TokenizedDataset,
    start_s: float | Interval,
    beginning: Sequence[int] = (),
) -> Interval:
    """Return the seconds of the tuning loop: start, updates and evaluations, capped by the budget's minutes."""
    held_out = total(load_of(row, beginning) for row in data.held_out)
    passes = recipe.evaluations * checkpoint_selection.passes(recipe, data.held_out)
    evaluations_s = passes * times.seconds(held_out) * cost_model.FORWARD_FRACTION if data.held_out else 0.0
    limit_s = recipe.budget.minutes and recipe.budget.minutes * 60
    if updates is None:
        assert limit_s is not None
        return Interval(limit_s, limit_s, limit_s + evaluations_s)
    total_s = cost_model.RUN_PACE * (update_seconds(times, updates, micro_batch_tokens) + evaluations_s)
    loop_s = Interval(total_s, low=total_s * (1 - times.half_width), high=total_s * (1 + times.half_width))
    duration = (loop_s.at_least(0) + start_s).at_least(0)
    return duration.at_most(limit_s + evaluations_s) if limit_s else duration


def update_seconds(times: TimeModel, updates: Sequence[Sequence[BatchLoad]], micro_batch_tokens: int) -> float:
    """Return the seconds of these updates, without start and evaluations."""
    seconds = 0.0
    for update in updates:
        micro_batches = cost_model.micro_batches(update, micro_batch_tokens)
        seconds += times.update_s + sum(times.seconds(micro) for micro in micro_batches)
    return seconds


def _count_by_minutes(
    counters: Counters, times: TimeModel, recipe: ResolvedRecipe, loads: Sequence[BatchLoad]
) -> None:
    """Estimate the counters of a run that only minutes limit."""
    total_load = total(loads)
    epochs = (recipe.budget.minutes or 0) * 60 / times.seconds(total_load)
    counters.updates = max(round(epochs * len(cost_model.epoch(recipe, loads))), 1)
    counters.tokens = round(epochs * total_load.tokens)
    counters.supervised_tokens = round(epochs * total_load.supervised)


def hourly(price: str | float) -> float | None:
    """Return a price per hour from `0.45/h` or a number; None for an empty text. Raises ConfigError."""
    if price == "":
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*(h|d|min|s))?\s*", str(price))
    if not match:
        raise ConfigError(f"the price is {price!r}; it must be a number per time", "--price 0.45/h (or /d, /min, /s)")
    return float(match[1]) / _HOURS[match[2] or "h"]


def device_named(name: str) -> torch.device:
    """Return the device of that name. Raises ConfigError if this machine has none."""
    available = [
        "cpu",
        *(["cuda"] if torch.cuda.is_available() else []),
        *(["mps"] if torch.backends.mps.is_available() else []),
    ]
    if name.partition(":")[0] not in available:
        raise ConfigError(f"there is no device {name!r} on this machine", f"--device {' or '.join(available)}")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"{name!r} is no device: {str(error).splitlines()[0]}", f"--device {' or '.join(available)}"
        ) from None


def _format_interval(interval: Interval | None, unit: str) -> str:
    if interval is None:
        return "not forecast"
    if unit == "s" and interval.high >= _MINUTES_FROM_S:
        interval, unit = interval * (1 / 60), "min"
    return f"{interval.estimate:.3g} {unit}, 90 % in {interval.low:.3g}..{interval.high:.3g}"


# Longer times are shown in minutes
_MINUTES_FROM_S = 180
