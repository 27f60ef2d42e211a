"""Memory and time model fitted on timed micro-batches.

    peak memory = what is held now + gradients and moments of the adapter + activations of the heaviest micro-batch
    time        = sum over the run's real micro-batches of (a + b tokens [+ c token pairs]) + optimiser + evaluations

Activations follow a formula of the model's shape (`ModelShape.activation_bytes`), scaled by measured micro-batches. a,
b and c are fitted to timed micro-batches. The order of the rows is known, so the updates are counted exactly.
docs/decisions/004-forecast.md states the width of the allowances and the measurements behind them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from sartor.models import hardware
from sartor.models.losses.loss_backend import LossBackend
from sartor.models.packing import BLOCKED_ATTENTION_TOKENS, SHARED_TOKENS, TokenizedExample, group_by_capacity
from sartor.tune import objectives, sampler
from sartor.tune.recipe import ResolvedRecipe, StopCriteria
from sartor.tune.tokenized_dataset import PreferenceExample


@dataclass(frozen=True)
class BatchLoad:
    """Work of a micro-batch or a row: numbers of tokens and of token pairs in attention.

    pairs: token pairs, the sum of the squared row lengths.
    stored_pairs: pairs whose attention weights are kept for the backward pass. Above `BLOCKED_ATTENTION_TOKENS` the
    kernel keeps none.
    aside: tokens that have no backward pass.
    shared: tokens of the beginning that most rows have in common. A micro-batch computes the longest of these
    beginnings, `beginning` tokens, once.
    """

    tokens: int = 0
    supervised: int = 0
    pairs: int = 0
    stored_pairs: int = 0
    aside: int = 0
    shared: int = 0
    beginning: int = 0

    @property
    def computed(self) -> int:
        """Tokens that are computed: shared beginnings count once."""
        return self.tokens - self.shared + self.beginning

    def __add__(self, other: BatchLoad) -> BatchLoad:
        return BatchLoad(
            tokens=self.tokens + other.tokens,
            supervised=self.supervised + other.supervised,
            pairs=self.pairs + other.pairs,
            stored_pairs=self.stored_pairs + other.stored_pairs,
            aside=self.aside + other.aside,
            shared=self.shared + other.shared,
            beginning=max(self.beginning, other.beginning),
        )


@dataclass(frozen=True)
class TimedBatch:
    """Timed micro-batch: seconds of forward and backward pass, and growth of memory at the peak.

    growth_bytes: above what is held between two micro-batches; None if the system does not report it.
    """

    load: BatchLoad
    seconds: float
    growth_bytes: int | None


def load_of(row: TokenizedExample, beginning: Sequence[int] = ()) -> BatchLoad:
    """Return the load of a row, including the other reply of a preference example.

    beginning: tokens that rows share (`common_beginning`).
    """
    length = len(row.ids)
    pairs, shared = length * length, _common(row.ids, beginning)
    stored_pairs = pairs if length <= BLOCKED_ATTENTION_TOKENS else 0
    load = BatchLoad(length, row.supervised_tokens, pairs, stored_pairs, shared=shared, beginning=shared)
    if not isinstance(row, PreferenceExample) or row.other is None:
        return load
    other = load_of(row.other, beginning)
    return load + (other if row.term == "pair" else replace(other, stored_pairs=0, aside=other.tokens))


def _common(ids: Sequence[int], beginning: Sequence[int]) -> int:
    """Return the length of the common prefix of `ids` and `beginning`; 0 if it is too short to share."""
    length = next((index for index, pair in enumerate(zip(ids, beginning, strict=False)) if pair[0] != pair[1]), None)
    length = min(len(ids), len(beginning)) if length is None else length
    return length if length >= SHARED_TOKENS else 0


def common_beginning(recipe: ResolvedRecipe, path: LossBackend, rows: Sequence[TokenizedExample]) -> Sequence[int]:
    """Return the tokens that nine of ten rows begin with, such as a template's system prompt.

    Empty if nothing is shared. `packing.micro_batches` cuts by computed tokens, and a shared beginning is computed
    once.
    """
    if not rows or not recipe.compute.share_prefixes or path.name == "one-row":
        return ()
    ordered = sorted(row.ids for row in rows)
    low, high = ordered[len(ordered) // 20], ordered[len(ordered) - 1 - len(ordered) // 20]
    return low[: _common(low, high)]


def total(loads: Iterable[BatchLoad]) -> BatchLoad:
    """Return the sum of the loads."""
    return sum(loads, BatchLoad())


def take(rows: Sequence[TokenizedExample], tokens: int) -> list[TokenizedExample]:
    """Return the longest prefix of the rows with at most `tokens` tokens, but at least one row."""
    selected: list[TokenizedExample] = []
    n_tokens = 0
    for row in rows:
        if selected and n_tokens + len(row.ids) > tokens:
            break
        selected.append(row)
        n_tokens += len(row.ids)
    return selected


class TimingProbe:
    """Timed forward and backward passes of micro-batches.

    Gradients, random numbers and the model's mode are restored afterwards.
    """

    def __init__(
        self,
        path: LossBackend,
        model: Any,
        device: torch.device,
        beginning: Sequence[int] = (),
        *,
        is_peak_restarted: bool = False,
    ) -> None:
        """Release free heap memory and record what the process holds.

        beginning: tokens that rows share (`common_beginning`).
        is_peak_restarted: whether `hardware.restart_peak` was called before the base was opened. Then `peak_bytes`
        leaves out what the process held before.
        """
        self.path, self.model, self.device, self.beginning = path, model, device, beginning
        self.is_peak_restarted, self._past_peak_bytes = is_peak_restarted, 0
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # the choice of the loss backend leaves free memory in the heap; a micro-batch that filled it would show no
        # growth
        hardware.release_free_memory()
        self.resident_bytes = hardware.resident_bytes(device)
        # memory that the last micro-batch did not release: kernel code for its length, buffers that grew
        self.left_bytes = 0
        self.samples: list[TimedBatch] = []
        self._most_tokens = 0

    def peak_bytes(self) -> int:
        """Return the most memory held since the peak was restarted for the base, else by this process."""
        if not self.is_peak_restarted:
            return hardware.peak_bytes(self.device)
        return max(self._past_peak_bytes, hardware.recent_peak_bytes(self.device))

    def settle(self) -> None:
        """Count what the last micro-batch left behind as resident memory instead of as its activations."""
        hardware.release_free_memory()
        before_bytes, self.resident_bytes = self.resident_bytes, hardware.resident_bytes(self.device)
        self.left_bytes = max(self.resident_bytes - before_bytes, 0)
        if self.samples and (growth := self.samples[-1].growth_bytes) is not None:
            self.samples[-1] = replace(self.samples[-1], growth_bytes=growth - self.left_bytes)

    def run(self, rows: Sequence[TokenizedExample], *, warm_up: bool = False) -> float:
        """Return the seconds of one micro-batch over `rows`. `warm_up` leaves it out of `samples`.

        The memory of a micro-batch that follows a larger one is not measured: the heap still holds the larger one's.
        """
        load = self.load_of(rows)
        is_largest = load.computed >= LARGEST_FRACTION * self._most_tokens
        self._most_tokens = max(load.computed, self._most_tokens)
        with self._untouched():
            self._past_peak_bytes = self.peak_bytes()
            is_measured = hardware.restart_peak(self.device)
            start_s = time.monotonic()
            losses, weights = self.path.losses(rows)
            objectives.sft(losses, weights, float(max(len(rows), 1))).backward()  # type: ignore[no-untyped-call]
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.monotonic() - start_s
            growth = None
            if is_measured and is_largest:
                growth = hardware.recent_peak_bytes(self.device) - self.resident_bytes
        if warm_up and not self.samples:
            self.settle()
        elif not warm_up:
            self.samples.append(TimedBatch(load, seconds, growth))
        return seconds

    def load_of(self, rows: Sequence[TokenizedExample]) -> BatchLoad:
        """Return the load of `rows` together."""
        return total(load_of(row, self.beginning) for row in rows)

    def optimizer_seconds(self) -> float:
        """Return the seconds of one optimiser step over the adapter.

        It uses an optimiser of its own at rate 0, so no weight moves.
        """
        optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0, fused=self.device.type != "mps")
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # allocates the moments
        start_s = time.monotonic()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.monotonic() - start_s
        optimizer.zero_grad(set_to_none=True)
        return seconds

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        was_training = self.model.training
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self.model.train()
            try:
                yield
            finally:
                self.model.train(was_training)
                for parameter in self.parameters:
                    parameter.grad = None


# Updates of a budget with minutes that are counted one by one; a limit beyond is one that minutes come before
MOST_COUNTED_UPDATES = 100_000
# Micro-batch sizes, in tokens, that `auto` chooses from
LADDER = (128, 256, 512, 1024, 2048)
# Half-widths of the 90 % intervals beyond the spread of the samples
TIME_ALLOWANCE, MEMORY_ALLOWANCE = 0.3, 0.15
# A run lasts minutes and the samples before it seconds, while the processor is at its fastest: the seconds of a run
# over what its samples say were 0.72 to 1.67 in 30 runs of benchmarks/forecast.py on one machine, the median 1.12
RUN_PACE = 1.12
# Limit of the half-width: an interval whose high end is over twice its low end is of no use for a decision
MOST_HALF_WIDTH = 0.33
# By how much less and more another process may hold, relative, while it opens a base and chooses its loss backend:
# pages of the weights' file are held beside the weights for a shorter or longer time (2 of 33 runs: 12 and 22 % more)
PAST_PEAK_ALLOWANCE = (0.03, 0.25)
# Scale (low, estimate, high) of the formula if nothing was measured: the spread between architectures
UNMEASURED = (0.6, 1.0, 1.6)
# The same for the fast path. Per token and layer it keeps 3 widths (input, output of attention, middle), queries, keys
# and values (1.2 to 3 widths), gate and up (2 inner widths). That is 0.35 to 0.5 of the formula, plus the backward
# pass of one layer
UNMEASURED_FAST = (0.3, 0.5, 0.8)
# Memory that the process will still take (low, estimate, high): libraries that load at first use, allocator arenas
SETTLING_BYTES = (0.0, 16e6, 64e6)
# A micro-batch with at least this part of the tokens of the largest before it is measured
LARGEST_FRACTION = 0.9
# Smaller growth is noise of the allocator and says nothing about the activations
NOISE_BYTES = 16 * 2**20
# Number of micro-batch lengths for which oneDNN has kernel code after a probe
PROBED_SHAPES = 2
# Time of a forward pass without gradients over that of forward and backward
FORWARD_FRACTION = 0.4


@dataclass(frozen=True)
class Interval:
    """Estimate with the ends of its 90 % interval."""

    estimate: float
    low: float
    high: float

    def as_json(self, digits: int | None = None) -> dict[str, float]:
        """Return `{estimate, low, high}`, rounded to `digits` (None: whole numbers)."""
        return {name: round(value, digits) for name, value in vars(self).items()}

    def __mul__(self, factor: float) -> Interval:
        return Interval(self.estimate * factor, self.low * factor, self.high * factor)

    def times(self, other: Interval) -> Interval:
        """Return the product end by end, of two intervals above 0."""
        return Interval(self.estimate * other.estimate, self.low * other.low, self.high * other.high)

    def __add__(self, other: float | Interval) -> Interval:
        if isinstance(other, Interval):
            return Interval(self.estimate + other.estimate, self.low + other.low, self.high + other.high)
        return Interval(self.estimate + other, self.low + other, self.high + other)

    def at_most(self, limit: float) -> Interval:
        """Return the interval with each number capped at `limit`."""
        return Interval(min(self.estimate, limit), min(self.low, limit), min(self.high, limit))

    def at_least(self, limit: float) -> Interval:
        """Return the interval with each number raised to at least `limit`."""
        return Interval(max(self.estimate, limit), max(self.low, limit), max(self.high, limit))


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that decide its memory.

    layers, width, inner, heads, vocabulary: in elements, as in the model's config.
    linear_bytes: frozen weight matrices without the embeddings, as they are stored.
    linear_weights: number of weights of the linear modules of all layers, however they are stored.
    trainable: number of trained parameters.
    adapted: layers next to the head that have a backward pass.
    """

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int
    element_bytes: int
    linear_bytes: int
    trainable: int
    adapted: int
    recompute: bool
    linear_weights: int

    def activation_bytes(self, load: BatchLoad) -> float:
        """Return the approximate bytes that one micro-batch keeps for the backward pass.

        Elements per token and layer: 12 widths (norms and their fp32 copies, queries, keys, values, the gathered ones,
        inputs of projections) and 4 inner widths (gate, up, their product). Elements per token pair and head: 3
        (scores, weights). The head keeps the logits in fp32, their log-softmax and its gradient.
        """
        token_bytes = (12 * self.width + 4 * self.inner) * self.element_bytes
        tokens = max(load.computed - load.aside, 0)
        layer_bytes = tokens * token_bytes + load.stored_pairs * self.heads * 3 * self.element_bytes
        head_bytes = load.supervised * self.vocabulary * 3 * 4
        if not self.recompute:
            return layer_bytes * self.adapted + head_bytes
        # with recompute: one tensor per layer, and all tensors of one layer at a time. The head is finished before the
        # first layer's backward pass starts, so only the larger of both counts
        return tokens * self.width * self.element_bytes * self.adapted + max(layer_bytes, head_bytes)

    @property
    def state_bytes(self) -> int:
        """Bytes of the adapter's gradients and two moments, fp32."""
        return self.trainable * 12


def shape_of(model: Any, recipe: ResolvedRecipe) -> ModelShape:
    """Return the ModelShape of a model with its adapter. Values that the config lacks are Llama's."""
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    width, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_width = getattr(config, "head_dim", None) or width // heads
    weights = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    embedding_ids = {
        id(getattr(module, "original_module", module).weight)  # `full` keeps it beside the trained copy
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    return ModelShape(
        layers=layers,
        width=width,
        inner=inner,
        heads=heads,
        vocabulary=config.vocab_size,
        element_bytes=next((parameter.element_size() for parameter in weights if parameter.is_floating_point()), 4),
        linear_bytes=sum(
            parameter.nbytes for parameter in weights if parameter.ndim == 2 and id(parameter) not in embedding_ids
        ),
        trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        adapted=min(recipe.method.targets.top or layers, layers),
        recompute=recipe.compute.recompute,
        linear_weights=layers * (2 * width * head_width * (heads + groups) + 3 * width * inner),
    )


@dataclass(frozen=True)
class MemoryModel:
    """Peak memory as a function of the micro-batch and the recipe.

    resident_bytes: held between two micro-batches, with base and adapter open.
    past_peak_bytes: peak so far, including the opening of the base.
    scale: measured activations over the formula's.
    limit_bytes: what this process can hold at all.
    bound: name of what sets the limit.
    kernel_bytes: code of matrix products that oneDNN will still cache, for micro-batches of new lengths.
    excess_bytes: growth of a small micro-batch above the scaled formula; it does not grow with the micro-batch.
    """

    shape: ModelShape
    resident_bytes: int
    past_peak_bytes: int
    scale: Interval
    limit_bytes: int
    bound: str
    kernel_bytes: int = 0
    excess_bytes: float = 0.0

    def growth(self, load: BatchLoad, shape: ModelShape | None = None) -> Interval:
        """Return the bytes above `resident_bytes` during a micro-batch, under this or another shape."""
        shape = shape or self.shape
        weight_change_bytes = (
            shape.linear_bytes - self.shape.linear_bytes + 4 * (shape.trainable - self.shape.trainable)
        )
        grown = self.scale * shape.activation_bytes(load) + (shape.state_bytes + weight_change_bytes)
        # low end: if an update is one micro-batch, gradients (fp32) are allocated while its activations are freed
        return replace(grown, low=grown.low - 4 * shape.trainable, high=grown.high + self.excess_bytes)

    def needs(self, load: BatchLoad, shape: ModelShape | None = None) -> Interval:
        """Return the bytes held at once from here on, which have to fit."""
        grown, (low, estimate, high) = self.growth(load, shape) + self.resident_bytes, SETTLING_BYTES
        estimate, high = estimate + self.kernel_bytes / 2, high + self.kernel_bytes
        return Interval(grown.estimate + estimate, grown.low + low, grown.high + high)

    def peak(self, load: BatchLoad, *, is_other_process: bool = False) -> Interval:
        """Return the peak of the whole process, including what was held while the base was opened.

        is_other_process: whether another process opens the base again, with a difference of up to PAST_PEAK_ALLOWANCE.
        """
        needs, (less, more) = self.needs(load), PAST_PEAK_ALLOWANCE if is_other_process else (0.0, 0.0)
        ends = (self.past_peak_bytes * factor for factor in (1, 1 - less, 1 + more))
        return Interval(*map(max, (needs.estimate, needs.low, needs.high), ends))

    def fits(self, load: BatchLoad, shape: ModelShape | None = None) -> bool:
        """Return whether the high end stays within the limit."""
        return self.needs(load, shape).high <= self.limit_bytes


def memory_model(shape: ModelShape, probe: TimingProbe) -> MemoryModel:
    """Return the memory model fitted to a probe's samples; without samples, the formula with wide ends."""
    available = hardware.available_bytes(probe.device)
    resident_bytes = hardware.resident_bytes(probe.device)
    measured = [
        (shape.activation_bytes(sample.load) + 4 * shape.trainable, sample.growth_bytes)
        for sample in sorted(probe.samples, key=lambda sample: shape.activation_bytes(sample.load))
        if sample.growth_bytes is not None and sample.growth_bytes > NOISE_BYTES
    ]
    low, estimate, high = UNMEASURED_FAST if probe.path.name == "fast" else UNMEASURED
    excess_bytes = 0.0
    if measured:
        # the heaviest sample is the nearest to the run's own micro-batches
        heaviest, growth = measured[-1]
        estimate = growth / heaviest
        ratios = [growth / expected for expected, growth in measured]
        heavy_ratios = [growth / expected for expected, growth in measured if 2 * expected >= heaviest]
        low, high = min(ratios) * (1 - MEMORY_ALLOWANCE), max(heavy_ratios) * (1 + MEMORY_ALLOWANCE)
        # what a small sample needs above the formula is held once (buffers, code) and must not be scaled up
        excess_bytes = max(max(growth - estimate * expected for expected, growth in measured), 0.0)
    kernel_bytes = 0
    if probe.device.type == "cpu":
        kernel_bytes = probe.left_bytes * max(hardware.cached_batch_shapes() - PROBED_SHAPES, 0)
    return MemoryModel(
        shape,
        resident_bytes=probe.resident_bytes,
        past_peak_bytes=probe.peak_bytes(),
        scale=Interval(estimate, low, high),
        limit_bytes=resident_bytes + available.bytes,
        bound=available.bound,
        kernel_bytes=kernel_bytes,
        excess_bytes=excess_bytes,
    )


@dataclass(frozen=True)
class TimeModel:
    """Seconds of a micro-batch: base_s + token_s * tokens + pair_s * token pairs.

    update_s: seconds of an optimiser step.
    half_width: of the 90 % interval, relative.
    """

    base_s: float
    token_s: float
    pair_s: float
    update_s: float
    half_width: float

    def seconds(self, load: BatchLoad, micro_batches: float = 1) -> float:
        """Return the seconds of `micro_batches` micro-batches that hold `load` together."""
        # seconds = base_s m + w (token_s tokens + pair_s pairs); w = 1 for tokens with a backward pass,
        # FORWARD_FRACTION for those without. The same mean w serves for pairs, as if all rows had one length
        work_fraction = 1 - (1 - FORWARD_FRACTION) * load.aside / max(load.tokens, 1)
        return self.base_s * micro_batches + work_fraction * (self.token_s * load.computed + self.pair_s * load.pairs)


def time_model(samples: Sequence[TimedBatch], update_s: float) -> TimeModel:
    """Return the time model fitted by least squares to at least one sample.

    Terms with a negative coefficient are dropped: first the pairs, then the base.
    """
    seconds = np.array([sample.seconds for sample in samples])
    columns = {
        "base_s": np.ones(len(samples)),
        "token_s": np.array([float(sample.load.computed) for sample in samples]),
        "pair_s": np.array([float(sample.load.pairs) for sample in samples]),
    }
    fitted: dict[str, float] = {}
    for names in (("base_s", "token_s", "pair_s"), ("base_s", "token_s"), ("token_s",)):
        table = np.stack([columns[name] for name in names], axis=1)
        # with fewer distinct loads than terms the fit is not determined
        if len(np.unique(table, axis=0)) < len(names):
            continue
        # minimise sum_i ((x_i . c) / t_i - 1)^2: relative errors. table: (samples, terms); seconds t: (samples,)
        coefficients = np.linalg.lstsq(table / seconds[:, None], np.ones(len(samples)), rcond=None)[0]
        fitted = dict(zip(names, (float(value) for value in coefficients), strict=True))
        if min(fitted.values()) >= 0:
            break
    model = TimeModel(
        base_s=fitted.get("base_s", 0.0),
        token_s=fitted["token_s"],
        pair_s=fitted.get("pair_s", 0.0),
        update_s=update_s,
        half_width=0.0,
    )
    residuals = [sample.seconds / model.seconds(sample.load) - 1 for sample in samples]
    freedom = max(len(samples) - len(fitted), 1)
    spread = float(np.sqrt(sum(residual**2 for residual in residuals) / freedom))
    # half-width = 1.645 s / sqrt(n) + allowance: the 90 % interval of a normal mean, and an allowance for what the
    # samples cannot show
    half_width = 1.645 * spread / len(samples) ** 0.5 + TIME_ALLOWANCE
    return replace(model, half_width=min(half_width, max(MOST_HALF_WIDTH, TIME_ALLOWANCE)))


class RunCounters(Protocol):
    """Counters of a run that the simulation of its updates needs."""

    updates: int
    tokens: int
    supervised_tokens: int
    rehearsal_tokens: int

    def fraction(self, budget: StopCriteria, epoch_tokens: int, wall_s: float) -> float:
        """Return the used fraction of the budget, 0..1."""
        ...


def simulate_updates(
    recipe: ResolvedRecipe, loads: Sequence[BatchLoad], counters: RunCounters, rehearsal: Sequence[BatchLoad] = ()
) -> list[list[BatchLoad]] | None:
    """Return the rows' loads of each update that the run will make; `counters` is moved to their end.

    rehearsal: loads of the rehearsal rows.
    None if only minutes limit the run, or are sure to end it before the other limits: then the time is known, but not
    the updates.
    """
    budget = recipe.budget
    if budget.epochs is None and budget.updates is None and budget.tokens is None:
        return None
    lengths = [load.tokens for load in loads]
    epoch_tokens = sum(lengths)
    result: list[list[BatchLoad]] = []
    rehearsal_position, rehearsal_lengths = sampler.RehearsalPosition(), [load.tokens for load in rehearsal]
    for indices in sampler.iterate_updates(lengths, recipe.optimizer.batch_tokens, recipe.seed):
        update_tokens = sum(lengths[index] for index in indices)
        rehearsal_indices, rehearsal_position = rehearsal_position.after(
            rehearsal_lengths, update_tokens, recipe.data.rehearsal.fraction, recipe.seed
        )
        if budget.minutes is not None and len(result) == MOST_COUNTED_UPDATES:
            return None
        update = [*(loads[index] for index in indices), *(rehearsal[index] for index in rehearsal_indices)]
        result.append(update)
        load = total(update)
        counters.updates += 1
        counters.tokens += load.tokens
        counters.supervised_tokens += load.supervised
        counters.rehearsal_tokens += load.tokens - update_tokens
        if counters.fraction(budget, epoch_tokens, 0.0) >= 1:
            break
    return result


def micro_batches(update: Sequence[BatchLoad], capacity: int) -> Iterator[BatchLoad]:
    """Yield the load of each micro-batch of an update, cut by computed tokens as the trainer does."""
    shared = max(load.beginning for load in update)
    lengths = [load.tokens - load.shared for load in update]
    for group in group_by_capacity(lengths, max(capacity - shared, *lengths)):
        yield total(update[index] for index in group)


def epoch(recipe: ResolvedRecipe, loads: Sequence[BatchLoad]) -> list[list[BatchLoad]]:
    """Return the rows' loads of each update of the first epoch, or of the part that the budget reads.

    With rehearsal, whose rows are among `loads`, the run's order differs, so the whole epoch counts.
    """
    lengths, n_rows, n_tokens, result = [load.tokens for load in loads], 0, 0, []
    budget, is_ordered = recipe.budget, not recipe.data.rehearsal.path
    max_updates, max_tokens = budget.updates or math.inf, budget.tokens or math.inf
    for indices in sampler.iterate_updates(lengths, recipe.optimizer.batch_tokens, recipe.seed):
        result.append([loads[index] for index in indices])
        n_rows += len(indices)
        n_tokens += sum(lengths[index] for index in indices)
        if n_rows == len(loads) or (is_ordered and (len(result) >= max_updates or n_tokens >= max_tokens)):
            break
    return result


def heaviest(recipe: ResolvedRecipe, loads: Sequence[BatchLoad], capacity: int, shape: ModelShape) -> BatchLoad:
    """Return the load of the first epoch's micro-batch that needs most memory."""
    batch_loads = (micro for update in epoch(recipe, loads) for micro in micro_batches(update, capacity))
    return max(batch_loads, key=shape.activation_bytes)


def micro_batch_sizes(recipe: ResolvedRecipe, loads: Sequence[BatchLoad]) -> list[int]:
    """Return the micro-batch sizes to try, ascending.

    None is larger than an update or smaller than the longest row.
    """
    longest = max(load.tokens for load in loads)
    top = max(recipe.optimizer.batch_tokens, longest)
    return sorted({max(longest, min(size, top)) for size in LADDER})


@dataclass(frozen=True)
class MicroBatchChoice:
    """Micro-batch size of a run, with its heaviest load, whether that fits, and the reason for the size."""

    micro_batch_tokens: int
    load: BatchLoad
    fits: bool
    reason: str


def choose_micro_batch(
    model: MemoryModel, recipe: ResolvedRecipe, loads: Sequence[BatchLoad], shape: ModelShape | None = None
) -> MicroBatchChoice:
    """Return `compute.micro_batch_tokens` as a number: the recipe's, or the largest size whose high end fits."""
    micro_batch_tokens = recipe.compute.micro_batch_tokens
    shape = shape or model.shape
    sizes = micro_batch_sizes(recipe, loads) if micro_batch_tokens == "auto" else [micro_batch_tokens]
    for size in reversed(sizes):
        load = heaviest(recipe, loads, size, shape)
        if model.fits(load, shape):
            reason = "set by the recipe" if micro_batch_tokens != "auto" else "the largest that helps"
            if micro_batch_tokens == "auto" and size < sizes[-1]:
                reason = f"the largest that fits in {model.limit_bytes / 1e9:.1f} GB"
            return MicroBatchChoice(size, load, True, reason)
    return MicroBatchChoice(
        sizes[0], heaviest(recipe, loads, sizes[0], shape), False, f"does not fit in {model.limit_bytes / 1e9:.1f} GB"
    )
