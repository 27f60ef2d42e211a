"""Tuning of a traced adapter made again in fp32, with any row left out.

Rows, order, batches, schedule, clipping, weight decay and seed are those of the recorded run. A run that computed in
bf16, or elsewhere, ends at other weights than its replay; `Replay.difference` measures by how much.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sartor.core import catalogue, trace_store
from sartor.core.errors import ArtifactError, ConfigError
from sartor.models import adapters
from sartor.models.base import Base
from sartor.models.packing import TokenizedExample
from sartor.trace.attribution import Method
from sartor.trace.query_encoding import encode_query
from sartor.trace.replay_run import Course, PreferenceReplayRun, ReplayRun, RowWeights, RunState, SharedBeginning
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery
from sartor.tune import resume
from sartor.tune.dataset_encoding import encode_rows
from sartor.tune.model_setup import calibrate, inject_recipe_adapter, open_recipe_base, start_of
from sartor.tune.recipe import SAMPLED, ResolvedRecipe, Sft
from sartor.tune.rehearsal import hold_at_base, rehearsal_of
from sartor.tune.tokenized_dataset import TokenizedDataset, all_sequences

Notice = Callable[[str], object]
# Above this difference of a reply's loss between the replay and the Adapter, nats, scores are called approximate
MAX_DIFFERENCE_NATS = 0.02
# Micro-batches of up to so many tokens are repeated as they were, whatever the dtype: halves would be slow
_SMALL_MICRO_BATCH = 512
# States of a run that later ones go on from: so many at most of a seed, of so many seeds, in so many bytes
_MOST_STATES = 16
_MOST_SEEDS = 2
_STATES_BYTES = 2**30


@dataclass(frozen=True)
class ReplayDifference:
    """Distance of a replay from the Adapter on disk, both with the base in fp32.

    replay_losses, adapter_losses: (Q,) nats of each reply, summed over its tokens.
    recorded_dtype: dtype in which the recorded run computed.
    """

    replay_losses: tuple[float, ...]
    adapter_losses: tuple[float, ...]
    recorded_dtype: str

    @property
    def nats(self) -> float:
        """Largest difference of a reply's loss, nats."""
        pairs = zip(self.replay_losses, self.adapter_losses, strict=True)
        return max((abs(first - second) for first, second in pairs), default=0.0)

    @property
    def approximate(self) -> str:
        """Reason why the replay's results hold for the Adapter only about; empty if they differ by little."""
        if self.nats <= MAX_DIFFERENCE_NATS:
            return ""
        by = f"by up to {self.nats:.4f} nats"
        if self.recorded_dtype == "float32":
            return (
                f"the tuning was not repeated exactly: the replay gives a reply another loss, {by}. It was not "
                "deterministic, or ran on another machine or with other versions; --method gradient and --method "
                "retrieval need no replay"
            )
        return f"the tuning ran in {self.recorded_dtype}; its replay in fp32 gives a reply another loss, {by}"

    def as_json(self) -> dict[str, Any]:
        """Return the losses and likelihoods of each reply, by the replay and by the Adapter."""
        return {
            **asdict(self),
            "nats": self.nats,
            "replay_likelihoods": [math.exp(-loss) for loss in self.replay_losses],
            "adapter_likelihoods": [math.exp(-loss) for loss in self.adapter_losses],
        }


class Replay:
    """Recorded tuning that can be made again on this machine.

    rows: (N,) tokens of `TracedAdapter.rows`, in their order; of a preference pair the preferred side.
    recipe: that of the tuning, with the base in fp32.
    run: the run of `seed`, in its last state.
    """

    def __init__(self, traced: TracedAdapter, base: Base, data: TokenizedDataset) -> None:
        self.traced, self.base, self.data = traced, base, data
        self.recipe = _fp32_recipe(traced)
        self.recorded: dict[str, Any] = traced.manifest["run"]
        self._rates = _recorded_rates(traced)
        self.rows, indices = match_rows(traced, data, base)
        self._row_weights = RowWeights(indices, torch.ones(len(self.rows) + 1, device=base.device))
        self.seed = self.recipe.seed
        self.run = self._begin(self.recipe.seed)
        self._start: RunState = self.run.snapshot()
        # by seed
        self._beginnings: dict[int, SharedBeginning] = {}

    @classmethod
    def open(cls, traced: TracedAdapter, *, notice: Notice = lambda line: None) -> Replay:
        """Open the base in fp32 and encode the rows, with the adapter as before its first update.

        Raises ConfigError for an adapter that was not tuned by `sartor tune` alone, ArtifactError if the base, the
        rows or the start are not those of the recorded run, and what opening them raises.
        """
        check_replayable(traced)
        recipe = _fp32_recipe(traced)
        base = open_recipe_base(recipe, notice)
        rehearsal, start = rehearsal_of(recipe), start_of(recipe, base)
        data = encode_rows(traced.dataset, recipe, base.chat, rehearsal)
        current = resume.fingerprint(recipe, traced.dataset, base, data=data, start=start)
        # a manifest has no recipe among these, and one of an older Sartor lacks some of them
        recorded = {**current, **traced.manifest["fingerprint"]}
        if differing := resume.differences(recorded, current):
            problem = f"the tuning of {traced.artifact.path} cannot be repeated here: {'; '.join(differing)}"
            raise ArtifactError(problem, _other_methods(traced))
        calibrate(base, data)
        hold_at_base(recipe, base, data)
        for line in describe_differences(traced):
            notice(line)
        return cls(traced, base, data)

    @property
    def course(self) -> Course:
        """Number of updates and learning rates of the recorded run."""
        updates = int(self.recorded["updates"])
        chosen = int(self.recorded.get("selection", {}).get("update", updates))
        return Course(chosen, updates, self._rates)

    def _begin(self, seed: int) -> ReplayRun:
        """Inject the adapter and return its run before the first update."""
        recipe, course = replace(self.recipe, seed=seed), self.course
        if seed != self.recipe.seed and recipe.budget.minutes is None:
            # another order of rows has other updates, and so other rates
            is_last = course.last_update == course.updates
            course = replace(course, last_update=None if is_last else course.last_update, rates={})
        kind = ReplayRun if isinstance(recipe.objective, Sft) else PreferenceReplayRun
        return kind.begin(
            recipe,
            self.base,
            inject_recipe_adapter(recipe, self.base),
            self.data,
            micro_batch_tokens=self._micro_batch_tokens,
            course=course,
            row_weights=self._row_weights,
        )

    @property
    def _micro_batch_tokens(self) -> int:
        tokens = int(self.recorded["micro_batch_tokens"])
        if self.traced.manifest["base"]["dtype"] == "float32":
            return tokens
        # an activation in fp32 has twice the bytes of one in 16 bits
        return max(min(tokens, _SMALL_MICRO_BATCH), tokens // 2)

    def restart(self, weights: np.ndarray[Any, Any] | None = None, *, seed: int | None = None) -> ReplayRun:
        """Return the run before its first update.

        weights: (N,) weight of each row, by default 1. A row of weight 0 is left out; the divisor stays.
        seed: of row order, new factors and dropout, by default the recorded one. The split of the rows stays.
        """
        if weights is not None and np.shape(weights) != (len(self.rows),):
            raise ConfigError(f"weights has the shape {np.shape(weights)}", f"one weight for each of {len(self.rows)}")
        seed = self.recipe.seed if seed is None else seed
        self.run.go_back(self._start)
        if seed != self.seed:
            self.base.model = adapters.undo(self.run.model)
            self.run, self.seed = self._begin(seed), seed
            self._start = self.run.snapshot()
        self.run.beginning = None
        values = self._row_weights.values
        values[:-1] = 1.0 if weights is None else torch.as_tensor(weights, dtype=values.dtype, device=values.device)
        return self.run

    def retrain(
        self,
        weights: np.ndarray[Any, Any] | None = None,
        *,
        seed: int | None = None,
        notice: Notice = lambda line: None,
    ) -> dict[str, torch.Tensor]:
        """Repeat the tuning and return the trained parameters (...) by name.

        After the first call, the updates before one that reads a row of another weight than 1 are not made again.

        weights, seed: as for `restart`.
        notice: receives a line when the tuning is done.
        Raises ModelError if the loss explodes.
        """
        run = self.restart(weights, seed=seed)
        run.beginning = self._beginning()
        if run.beginning and (state := run.beginning.latest(self._row_weights.reweighted)):
            run.go_back(state)
        run.go_on()
        notice(f"repeated {run.counters.updates} updates, {run.counters.tokens:,} tokens")
        return self.parameters()

    def _beginning(self) -> SharedBeginning | None:
        """Return the place for states of the run of this seed; None where they would take too much memory."""
        # a state has the parameters and, after the first update, AdamW's two moments of each
        most = min(_MOST_STATES, _STATES_BYTES // (_MOST_SEEDS * 3 * self._start.bytes))
        if most < 2:
            return None
        if self.seed not in self._beginnings:
            if len(self._beginnings) == _MOST_SEEDS:
                del self._beginnings[next(iter(self._beginnings))]
            self._beginnings[self.seed] = SharedBeginning(math.ceil(self.course.updates / most))
        return self._beginnings[self.seed]

    def parameters(self) -> dict[str, torch.Tensor]:
        """Return copies of the current parameters (...) by name."""
        return {name: parameter.detach().clone() for name, parameter in self.run.named.items()}

    def adapter_parameters(self) -> dict[str, torch.Tensor]:
        """Return the parameters (...) of the Adapter on disk, by the names of `retrain`."""
        adapters.load_start(self.run.model, self.traced.artifact.path)
        return self.parameters()

    def put(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Make parameters (...) that `retrain` returned the current ones."""
        with torch.no_grad():
            for name, parameter in self.run.named.items():
                parameter.copy_(parameters[name])

    @torch.no_grad()
    def losses(
        self, parameters: Mapping[str, torch.Tensor], queries: Sequence[TraceQuery]
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return (Q,) losses of the replies in nats, summed over their tokens.

        parameters: as `retrain` returned them.
        Raises what `encode` raises.
        """
        self.put(parameters)
        self.run.model.eval()
        rows = [self.encode(query) for query in queries]
        result = np.zeros(len(rows))
        for index, row in enumerate(rows):
            losses, _ = self.run.path.losses([row])
            result[index] = float(losses.double().sum())
        return result

    def encode(self, query: TraceQuery) -> TokenizedExample:
        """Return the query as tokens, of which those of the reply are learnt.

        Raises as `encode_query` does.
        """
        return encode_query(self.base, self.traced, query)

    def difference(self, parameters: Mapping[str, torch.Tensor], queries: Sequence[TraceQuery]) -> ReplayDifference:
        """Return how far the replay is from the Adapter on disk.

        parameters: of a replay with all rows, which stay the current ones.
        """
        adapter_losses = self.losses(self.adapter_parameters(), queries)
        replay_losses = self.losses(parameters, queries)
        dtype = self.traced.manifest["base"]["dtype"]
        return ReplayDifference(tuple(replay_losses.tolist()), tuple(adapter_losses.tolist()), dtype)


def check_replayable(traced: TracedAdapter) -> None:
    """Raise ConfigError, naming the methods that still work, for a tuning that `sartor tune` alone cannot repeat."""
    if reason := traced.unrepeatable:
        problem = f"the tuning of {traced.artifact.path} cannot be repeated: {reason}"
        raise ConfigError(problem, _other_methods(traced))


def _other_methods(traced: TracedAdapter) -> str:
    """Return the remedy that names the methods without a replay."""
    recipe, command = traced.known_recipe, f"{traced.command} --prompt P --reply R --method"
    if recipe and isinstance(recipe.objective, SAMPLED):
        return f"{command} {Method.RETRIEVAL}"  # of a teacher's or a verifier's scores there are no gradients of rows
    return f"{command} {Method.GRADIENT}, or --method {Method.RETRIEVAL}: they need no replay"


def describe_differences(traced: TracedAdapter) -> Iterator[str]:
    """Yield lines on what a replay of the adapter's tuning cannot repeat exactly."""
    base, recipe, run = traced.manifest["base"], traced.recipe, traced.manifest["run"]
    if base["dtype"] != "float32":
        yield f"the tuning ran in {base['dtype']}; it is repeated in fp32"
    if base.get("quantisation", "none") != "none":
        yield f"its base was held as {base['quantisation']}; it is repeated with the base as published"
    if recipe.budget.minutes is not None:
        yield f"its budget was in minutes; its {run['updates']:,} updates are repeated, whatever time they take"
    if dropout := getattr(recipe.method, "dropout", 0.0):
        yield f"its dropout of {dropout:g} is drawn again, and in another dtype differently"


def match_rows(
    traced: TracedAdapter, data: TokenizedDataset, base: Base
) -> tuple[list[TokenizedExample], dict[int, int]]:
    """Return the (N,) traced rows as tokens, and the index of each sequence of `data` by the `id` of its object.

    Raises ArtifactError for a training row that is not among the traced ones.
    """
    positions = {(row.is_rehearsal, row.example.id): index for index, row in enumerate(traced.rows)}
    rows: dict[int, TokenizedExample] = {}
    indices: dict[int, int] = {}
    for is_rehearsal, part in ((False, data.train), (True, data.rehearsal)):
        for row in part:
            index = positions.get((is_rehearsal, row.example_id))
            if index is None:
                problem = (
                    f"the tuning read the row {row.example_id}, which is not among the rows of {traced.dataset.path}"
                )
                raise ArtifactError(problem, _other_methods(traced))
            rows.setdefault(index, row)
            indices |= {id(sequence): index for sequence in all_sequences([row])}
    # a rehearsal row that equals a held-out one is never read
    for index in set(range(len(traced.rows))) - rows.keys():
        unread = traced.rows[index]
        rows[index] = base.chat.encode(unread.example, unread.dataset.path)
    return [rows[index] for index in range(len(traced.rows))], indices


def _fp32_recipe(traced: TracedAdapter) -> ResolvedRecipe:
    return replace(traced.recipe, base=replace(traced.recipe.base, bits=32))


def _recorded_rates(traced: TracedAdapter) -> dict[int, tuple[float, float]]:
    """Return the rates of factors and projectors by the number of earlier updates, as the Adapter's log has them.

    A Release has no log: that of its Adapter is read, if it is here. Raises ArtifactError if the rates are known from
    no log and depend on the clock of the run.
    """
    adapter: Path | None = traced.artifact.path
    if traced.artifact.kind == "release":
        adapter = catalogue.locate(
            trace_store.adapter_id(traced.artifact), str(traced.artifact.path.parent / "adapter")
        )
    rates: dict[int, tuple[float, float]] = {}
    if adapter is not None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            for text in (adapter / "log.jsonl").read_text(encoding="utf-8").splitlines():
                line = json.loads(text)
                if "learning_rate" in line:
                    rate = float(line["learning_rate"])
                    rates[int(line["update"]) - 1] = (rate, float(line.get("projector_rate", rate)))
    if not rates and traced.recipe.budget.minutes is not None:
        raise ArtifactError(
            f"the tuning of {traced.artifact.path} had a budget in minutes, and its learning rates stand in log.jsonl "
            "of its Adapter, which is not on this machine",
            f"sartor index DIR finds the Adapter; or {_other_methods(traced)}",
        )
    return rates
