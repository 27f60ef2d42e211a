"""Training loop with resumable state.

Everything that decides the next steps is in `TrainingRun.state`: factors, optimiser, generators, position in the rows,
counters, open evaluations. So a run restored from a checkpoint takes the same steps to the same bits.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path as Folder
from typing import Any, Protocol

import torch

from sartor.core.errors import ArtifactError, ModelError, SartorError, StoppedError
from sartor.core.model_refs import BaseRef
from sartor.core.processes import DeferredSignals
from sartor.models import hardware, packing
from sartor.models.losses.loss_backend import LossBackend, LossOptions, measure_savings_error
from sartor.models.media_tokens import embedding_of
from sartor.tune import objectives, optimizers, run_forecast, sampler
from sartor.tune.checkpoint import Checkpoint, RandomState, Saver, seed_all
from sartor.tune.checkpoint_selection import CheckpointScore, CheckpointSelection
from sartor.tune.gradient_features import FeatureRecorder
from sartor.tune.recipe import Grpo, ResolvedOptimizer, ResolvedRecipe, StopCriteria
from sartor.tune.remaining_time import RemainingTime
from sartor.tune.tokenized_dataset import TokenizedDataset, all_sequences, lessons
from sartor.tune.training_log import TrainingLog, TrainingStep

# A loss above both multiples has exploded. A uniform prediction has the loss ln V; a hard first update may have more.
EXPLODED_OVER_UNIFORM, EXPLODED_OVER_FIRST = 2.0, 4.0
# Tolerance for reordered sums: norm of the difference over norm, of losses and of each gradient
PROOF = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Part of the names of factors B, of peft's modules
B_FACTOR = ".lora_B."
# Most example ids of an update that an error names
IDS_NAMED = 32


@dataclass
class Counters:
    """Progress of a run."""

    updates: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    rehearsal_tokens: int = 0  # of the tokens; they are no part of an epoch

    def fraction(self, budget: StopCriteria, epoch_tokens: int, wall_s: float, set_up_s: float = 0.0) -> float:
        """Return the used fraction of the budget, from 0: the largest over its limits.

        wall_s: seconds of the run so far. set_up_s: those of them before its updates. A limit of minutes holds for
        both, and its fraction is that of the time for updates: a schedule over it begins with the first one.
        """
        limits = [
            (self.updates, budget.updates),
            (self.tokens, budget.tokens),
            ((self.tokens - self.rehearsal_tokens) / epoch_tokens, budget.epochs),
        ]
        fractions = [used / limit for used, limit in limits if limit is not None]
        if budget.minutes is not None:
            limit_s = 60 * budget.minutes - set_up_s
            fractions.append((wall_s - set_up_s) / limit_s if limit_s > 0 else 1.0)
        return max(fractions)


@dataclass(frozen=True)
class Resolved:
    """Resolved values of `auto` options of the computation.

    A resumed run takes them over: resolved again with the memory that is free then, they could differ.
    """

    micro_batch_tokens: int


class TrainingBase(Protocol):
    """Part of a base that a run needs: `models.base.Base`, or a torch-only one of a device."""

    @property
    def ref(self) -> BaseRef:
        """Reference of the base, with its name and digest."""
        ...

    @property
    def device(self) -> torch.device:
        """Device on which the base computes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the base."""
        ...

    def path(self, model: Any, rows: Sequence[packing.TokenizedExample], wish: LossOptions) -> LossBackend:
        """Return the fastest loss backend that is correct for `model`."""
        ...


class TrainingRun:
    """State of one run: model, optimiser, counters. `train` runs until the budget is spent."""

    def __init__(
        self,
        recipe: ResolvedRecipe,
        base: TrainingBase,
        model: Any,
        data: TokenizedDataset,
        journal: TrainingLog,
        saver: Saver,
        resolved: Resolved | None,
    ) -> None:
        self.recipe, self.base, self.model, self.data = recipe, base, model, data
        self.journal, self.saver = journal, saver
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        embedding = embedding_of(model)
        ids = {id(parameter) for parameter in embedding.parameters()} if embedding else set()
        self.projectors = [parameter for parameter in trainable.values() if id(parameter) in ids]
        self.factors = [parameter for parameter in trainable.values() if id(parameter) not in ids]
        # LoRA+ has a second rate, of the factors B; with one rate they stay among the others
        self.b_factors: list[torch.nn.Parameter] = []
        if recipe.optimizer.b_rate_ratio != 1:
            self.b_factors = [
                parameter
                for name, parameter in trainable.items()
                if id(parameter) not in ids and B_FACTOR in f"{name}."
            ]
        b_ids = {id(parameter) for parameter in self.b_factors}
        # in the optimiser's order
        factors = {name: parameter for name, parameter in trainable.items() if id(parameter) not in ids}
        self.named = {name: parameter for name, parameter in factors.items() if id(parameter) not in b_ids}
        self.named |= {name: parameter for name, parameter in factors.items() if id(parameter) in b_ids}
        self.named |= {name: parameter for name, parameter in trainable.items() if id(parameter) in ids}
        self.parameters = list(self.named.values())
        self.optimizer: Any = self._optimizer()
        self.scaler = optimizers.scaler(base.dtype, base.device)
        self.counters = Counters()
        self.losses: dict[str, float | None] = {"first": None, "last": None, "eval": None}
        # nats per supervised token of each held-out row at the last evaluation
        self.row_losses: list[float] = []
        self.proof: dict[str, float] | None = None
        self.position, self.rehearsal_position = sampler.START, sampler.RehearsalPosition()
        # seconds of the run that its calls took before they updated
        self.set_up_s = 0.0
        # seconds of the run up to the checkpoint that this call goes on from
        self.restored_at_s = 0.0
        # set by an evaluation that ends the run before its budget
        self.is_done = False
        # facts of the objective about the last update, besides its loss
        self.objective_facts: dict[str, float] = {}
        # of the last update, of the own rows alone; None where it has no rows of rehearsal
        self.own_loss: float | None = None
        self._rehearsal_ids = {id(row) for row in data.rehearsal}
        count = recipe.evaluations if data.held_out else 0
        self.evaluation_points = [(index + 1) / count for index in range(count)]
        # set if the run keeps the best weights; None keeps the last
        self.selection: CheckpointSelection | None = None
        # set if the run records sketches of its rows' gradients
        self.features: FeatureRecorder | None = None
        # on a busy machine MKL may use fewer threads, and then adds in another order; setting the number, even to its
        # current value, fixes it
        torch.set_num_threads(torch.get_num_threads())
        # a new adapter is in training mode, and dropout would look like a leak between rows to the backend's check
        model.eval()
        options = replace(loss_options(recipe, data, base), notice=lambda line: journal.note(notice=line))
        self.path = base.path(model, data.sequences, options)
        if resolved:
            recipe = replace(recipe, compute=replace(recipe.compute, micro_batch_tokens=resolved.micro_batch_tokens))
        self.forecast = self._foresee(recipe)
        self.resolved = Resolved(self.forecast.settled.micro_batch_tokens)
        self.remaining = RemainingTime(
            self.forecast.evaluated_tokens / max(recipe.evaluations, 1), self.forecast.limit_s, journal.lines
        )
        seed_all(recipe.seed)

    def _optimizer(self) -> Any:
        """Return the optimiser of the run."""
        b_ids = {id(parameter) for parameter in self.b_factors}
        factors = [parameter for parameter in self.factors if id(parameter) not in b_ids]
        return optimizers.make(
            factors, self.recipe.optimizer, self.base.device, projectors=self.projectors, b_factors=self.b_factors
        )

    def _foresee(self, recipe: ResolvedRecipe) -> run_forecast.RunForecast:
        """Return the forecast of the run, with its micro-batch size. Raises BudgetError if memory cannot hold it."""
        return run_forecast.foresee(
            recipe, self.path, self.model, device=self.base.device, data=self.data, counters=Counters()
        )

    def train(self, signals: DeferredSignals) -> None:
        """Update until the budget is spent.

        Raises StoppedError after a signal, ModelError if the loss explodes. In both cases a checkpoint exists from
        which the run can be resumed.
        """
        fields = {
            "path": self.path.name,
            "reason": self.path.reason,
            "packing_difference_nats": self.path.packing_difference,
        }
        self.journal.note(**fields, **({"resumed_at": self.counters.updates} if self.counters.updates else {}))
        self.set_up_s += self.journal.wall_s - self.restored_at_s
        with self.features.observing(self.path, self.optimizer) if self.features else contextlib.nullcontext():
            self._train(signals)

    def _train(self, signals: DeferredSignals) -> None:
        self.model.train()
        # an evaluation that failed after the last update of the run before; a new run makes one update at least, even
        # if its set-up took all the minutes
        is_resumed = self.counters.updates > 0
        if is_resumed and self._evaluate_if_due(self._fraction()) and (self.is_done or not self.evaluation_points):
            self.model.eval()
            return
        lengths = [row.tokens for row in self.data.train]
        rehearsal_lengths = [row.tokens for row in self.data.rehearsal]
        rehearsal_fraction = self.recipe.data.rehearsal.fraction
        settings = self.recipe.optimizer
        for indices in sampler.iterate_updates(lengths, settings.batch_tokens, self.recipe.seed, self.position):
            own_tokens = sum(lengths[index] for index in indices)
            rehearsal_indices, rehearsal_position = self.rehearsal_position.after(
                rehearsal_lengths, own_tokens, rehearsal_fraction, self.recipe.seed
            )
            rehearsal_rows = [self.data.rehearsal[index] for index in rehearsal_indices]
            self._update_or_save([*(self.data.train[index] for index in indices), *rehearsal_rows])
            self.rehearsal_position = rehearsal_position
            self.counters.rehearsal_tokens += sum(row.tokens for row in rehearsal_rows)
            self.position = self.position.after(len(indices), len(lengths))
            fraction = self._fraction()
            self._evaluate_if_due(fraction)
            if fraction >= 1 or self.is_done:
                break
            if signals.received or self.saver.is_due:
                self.save()
            if signals.received:
                problem = (
                    f"{signals.received.name} after update {self.counters.updates}, which is saved in "
                    f"{self.saver.folder}"
                )
                remedy = "the same command goes on there: without --replace, and sartor tune with --resume"
                raise StoppedError(problem, remedy, int(signals.received))
        self.model.eval()

    def keep_best_weights(self, notice: Callable[[str], object]) -> dict[str, Any] | None:
        """Load the weights of the chosen evaluation, and return the reasons; None if there is no choice."""
        if not self.selection or not self.selection.candidates:
            return None
        chosen, facts = self.selection.choose()
        if chosen is not self.selection.candidates[-1]:
            with torch.no_grad():
                for name, parameter in self.named.items():
                    parameter.copy_(self.selection.weights[name])
            self.losses["eval"] = chosen.loss
        notice(f"weights of update {chosen.update}: {facts['reason']}")
        return facts

    def prove(self) -> str:
        """Compare losses and gradients of the next update's rows with the plain computation; return a report line.

        Only the update's first micro-batch is compared.
        Raises ModelError if they differ by more than PROOF of the dtype, as norm of the difference over norm.
        """
        lengths = [row.tokens for row in self.data.train]
        indices = next(
            sampler.iterate_updates(lengths, self.recipe.optimizer.batch_tokens, self.recipe.seed, self.position)
        )
        rows = self._cut(all_sequences(self.data.train[index] for index in indices))[0]
        limit = PROOF[self.base.dtype]
        self.proof = {**measure_savings_error(self.path, rows), "limit": limit, "rows": len(rows)}
        text = f"loss {self.proof['loss']:.1e}, worst gradient {self.proof['gradient']:.1e} off the plain computation"
        if not (self.proof["loss"] <= limit and self.proof["gradient"] <= limit):
            raise ModelError(f"{text}, over {limit:g}", "compute: {share_prefixes: false, reuse_frozen: false}")
        return f"proved on {len(rows)} rows: {text} (norm of the difference over norm; at most {limit:g})"

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors (...), of any shape, and the facts from which `restore` makes this state again."""
        rng = RandomState.capture(self.base.device)
        tensors = {f"adapter.{name}": parameter.data for name, parameter in self.named.items()}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        facts = {
            "counters": asdict(self.counters),
            "position": asdict(self.position),
            "beside": asdict(self.rehearsal_position),
            "losses": dict(self.losses),
            "evaluation_points": list(self.evaluation_points),
            "wall_s": self.journal.wall_s,
            "set_up_s": self.set_up_s,
            "rng": rng.facts(),
            "scaler": self.scaler.state_dict(),
            "resolved": asdict(self.resolved),
            "path": self.path.name,
        }
        if self.selection:
            weights, facts["candidates"] = self.selection.state()
            tensors |= {f"best.{name}": tensor for name, tensor in weights.items()}
        return {**tensors, **rng.tensors()}, facts

    def save(self) -> None:
        """Write a checkpoint of the current state."""
        self.saver.save(*self.state(), self.journal.lines)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state of a checkpoint. Raises ArtifactError if its tensors do not fit this model."""
        self._load_state(checkpoint.tensors(), checkpoint.manifest, checkpoint.path)

    def _load_state(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], source: Folder) -> None:
        """Load a checkpoint's state into model, optimiser, counters and random generators.

        tensors, facts: of `state`. source: for an error.
        """
        shapes = {f"adapter.{name}": parameter.shape for name, parameter in self.named.items()}
        if {name: tensor.shape for name, tensor in tensors.items() if name.startswith("adapter.")} != shapes:
            problem = f"the factors in {source} do not fit this adapter"
            raise ArtifactError(problem, "start over with --replace")
        with torch.no_grad():
            for name, parameter in self.named.items():
                # in place, because optimiser and loss backend refer to this parameter
                parameter.copy_(tensors[f"adapter.{name}"])
        state = self.optimizer.state_dict()
        state["state"] = {}
        for index, name in enumerate(self.named):
            prefix = f"optimizer.{name}."
            values = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if values:
                state["state"][index] = values
        self.optimizer.load_state_dict(state)
        if facts["scaler"]:  # empty for a run in a dtype that needs no scale
            self.scaler.load_state_dict(facts["scaler"])
        self.counters = Counters(**facts["counters"])
        self.position = sampler.Position(**facts["position"])
        if rehearsal_fields := facts.get("beside"):  # a checkpoint of an older version has no rehearsal
            self.rehearsal_position = sampler.RehearsalPosition(
                sampler.Position(**rehearsal_fields["position"]), rehearsal_fields["owed"]
            )
        self.losses, self.evaluation_points = dict(facts["losses"]), list(facts["evaluation_points"])
        # not in the states of older runs, and of a replay
        self.restored_at_s, self.set_up_s = facts.get("wall_s", 0.0), facts.get("set_up_s", 0.0)
        if self.selection:
            weights = {name: tensors[f"best.{name}"] for name in self.named if f"best.{name}" in tensors}
            self.selection.restore(weights, facts["candidates"])
        RandomState.read(tensors, facts["rng"]).put_back(self.base.device)

    def _cut(self, rows: Sequence[packing.TokenizedExample]) -> list[list[packing.TokenizedExample]]:
        share = self.recipe.compute.share_prefixes and self.path.name != "one-row"
        return packing.micro_batches(rows, self.resolved.micro_batch_tokens, share=share)

    def _fraction(self) -> float:
        return self.counters.fraction(
            self.recipe.budget, self.data.tokens, wall_s=self.journal.wall_s, set_up_s=self.set_up_s
        )

    def _update_or_save(self, rows: Sequence[packing.TokenizedExample]) -> None:
        """Make one update; if it fails, save the state before it.

        By then nothing but the random generators has changed, and they are put back.
        """
        random_state = RandomState.capture(self.base.device)
        try:
            self._update(rows)
        except SartorError:
            random_state.put_back(self.base.device)
            self.save()
            raise

    def _evaluate_if_due(self, fraction: float) -> bool:
        """Evaluate if a point of evaluation is reached, and return whether it is.

        If the evaluation fails, save the state before it.
        """
        if not self.evaluation_points or fraction < self.evaluation_points[0]:
            return False
        due = self.evaluation_points
        self.evaluation_points = [point for point in due if point > fraction]
        try:
            self._evaluate()
        except SartorError:
            self.evaluation_points = due
            self.save()
            raise
        return True

    def _update(self, rows: Sequence[packing.TokenizedExample]) -> None:
        """Make one optimiser update over whole rows, computed in micro-batches."""
        start_s = time.monotonic()
        settings = self.recipe.optimizer
        rates = self._rates()
        group_rates = [rates[0], *([settings.b_rate_ratio * rates[0]] if self.b_factors else []), rates[1]]
        for group, rate in zip(self.optimizer.param_groups, group_rates, strict=False):
            group["lr"] = rate
        loss_sum = self._backward(rows)
        if not rates[0]:
            for parameter in self.factors:  # AdamW skips a parameter without a gradient, and its state
                parameter.grad = None
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm))
        self._check(rows, loss_sum, norm)
        # of the observed gradients, which are scaled and not clipped
        factor = min(1.0, settings.clip_norm / (norm + 1e-6)) / self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._record_update(rows, loss_sum, norm, rates=rates, seconds=time.monotonic() - start_s)
        if self.features:
            self.features.record(self.counters.updates, rates[0] * factor, self._fraction(), self.optimizer)

    def _backward(self, rows: Sequence[packing.TokenizedExample], weight: float = 1.0) -> float:
        """Compute the gradients of an update's loss times `weight`, and return that product.

        loss = sum_i w_i l_i / sum_i w_i over the update's supervised tokens, with w_i = row weight * turn weight.
        """
        total_weight = sum(row.loss_weight for row in rows)
        own_weight = sum(row.loss_weight for row in rows if id(row) not in self._rehearsal_ids)
        is_mixed = 0 < own_weight < total_weight
        loss_sum, own_sum = 0.0, 0.0
        for micro in self._cut(rows):
            losses, weights = self.path.losses(micro)
            objective = weight * objectives.sft(losses, weights, total_weight or 1.0)
            self.scaler.scale(objective).backward()
            loss_sum += float(objective.detach())
            if is_mixed:
                is_own = [id(row) not in self._rehearsal_ids for row in micro for _ in range(row.supervised_tokens)]
                own_sum += float((losses * weights).detach()[torch.tensor(is_own, device=losses.device)].sum())
        self.own_loss = own_sum / own_weight if is_mixed else None
        return loss_sum

    def _rates(self) -> tuple[float, float]:
        """Return the current learning rates of the factors and of the projectors.

        The alignment phase and the phase after it have a warm-up and a schedule each.
        """
        settings, align, fraction = self.recipe.optimizer, self.recipe.align, self._fraction()
        first = align.fraction if self.projectors else 0.0
        if fraction < first:
            return 0.0, learning_rate(replace(settings, learning_rate=align.learning_rate), fraction / first)
        rate = learning_rate(settings, (fraction - first) / (1 - first))
        return rate, rate * align.later

    def _check(self, rows: Sequence[packing.TokenizedExample], loss: float, norm: float) -> None:
        """Raise ModelError for a loss that is not finite or has exploded, with the ids of its rows."""
        first = self.losses["first"]
        uniform = math.log(self.model.get_input_embeddings().weight.shape[0])
        limit = math.inf if first is None else max(EXPLODED_OVER_UNIFORM * uniform, EXPLODED_OVER_FIRST * first)
        # an infinite norm with a scale above 1 is an overflow by the scale: the scaler skips this update and lowers
        # the scale. Without a scale the gradient itself has exploded
        overflowed = not math.isfinite(norm) and self.scaler.get_scale() > 1
        if math.isfinite(loss) and (math.isfinite(norm) or overflowed) and loss <= limit:
            return
        ids = ", ".join(row.example_id for row in rows[:IDS_NAMED])
        rest = f" and {len(rows) - IDS_NAMED} more" if len(rows) > IDS_NAMED else ""
        over = f" (over the limit of {limit:.3g})" if loss > limit else ""
        brief = f"update {self.counters.updates + 1}: the loss is {loss:.6g}{over}, the gradient's norm {norm:.6g}"
        problem = f"{brief}; the state before it is saved in {self.saver.folder}; rows {ids}{rest}"
        if not self.counters.updates and not math.isfinite(loss):  # nothing has been learnt yet
            remedy = "the base itself computes no finite loss: base: starter, or another; or look at these rows"
            raise ModelError(problem, remedy, brief)
        rate = self.recipe.optimizer.learning_rate
        raise ModelError(
            problem,
            f"look at these rows; or lower optimizer.learning_rate (now {rate:g}) and start over with --replace",
            brief,
        )

    def _record_update(
        self,
        rows: Sequence[packing.TokenizedExample],
        loss: float,
        norm: float,
        rates: tuple[float, float],
        seconds: float,
    ) -> None:
        """Add an update to the counters, the log and the forecast.

        norm: of the gradient. rates: learning rates of the method and of the projectors.
        """
        counters = self.counters
        tokens = sum(row.tokens for row in rows)
        counters.updates += 1
        counters.tokens += tokens
        counters.supervised_tokens += sum(row.supervised_tokens for row in all_sequences(rows))
        shown_loss = loss if self.own_loss is None else self.own_loss
        if self.losses["first"] is None:
            self.losses["first"] = shown_loss
        self.losses["last"] = shown_loss
        self.remaining.observe_update(self._fraction(), counters.tokens, self.journal.wall_s)
        step = self._step(shown_loss, rates[0])
        self.journal.note(
            update=counters.updates,
            loss=loss,
            **({"own_loss": self.own_loss} if self.own_loss is not None else {}),
            grad_norm=norm if math.isfinite(norm) else None,
            learning_rate=rates[0],
            **self.objective_facts,
            **({"projector_rate": rates[1]} if self.projectors else {}),
            tokens=tokens,
            tokens_per_s=round(tokens / seconds, 1),
            memory_bytes=hardware.peak_bytes(),
            progress={
                "fraction": round(step.fraction, 6),
                "left_s": round(step.seconds_left, 2) if math.isfinite(step.seconds_left) else None,
            },
        )
        self.journal.show(step)
        if self.forecast.observe(tokens, seconds, counters.tokens, self.journal.wall_s):
            self.journal.note(forecast=self.forecast.as_json())

    def _step(self, loss: float, rate: float) -> TrainingStep:
        """Return the facts of the last update, for the progress line and the caller of the run."""
        left_s = self.remaining.seconds(len(self.evaluation_points))
        return TrainingStep(
            update=self.counters.updates,
            fraction=min(self._fraction(), 1.0),
            loss=loss,
            learning_rate=rate,
            tokens_per_s=self.counters.tokens / (self.journal.wall_s - self.set_up_s),
            seconds_left=math.inf if left_s is None else left_s,
            eval_loss=self.losses["eval"],
        )

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Compute the loss on the held-out rows, and score the replies to them if those choose the weights."""
        start_s = time.monotonic()
        self.model.eval()
        loss, facts = self._loss_of(self.data.held_out)
        if not math.isfinite(loss):
            problem = f"after update {self.counters.updates} the loss of the held-out rows is {loss}"
            raise ModelError(problem, "lower optimizer.learning_rate and start over with --replace")
        self.losses["eval"] = loss
        if self.selection:
            is_reply_scored = self.selection.metric == "exact_match"
            scores = (
                self.selection.score_replies(self.model) if is_reply_scored else [-loss for loss in self.row_losses]
            )
            candidate = CheckpointScore(self.counters.updates, loss, scores)
            self.selection.add(candidate, self.named)
            facts |= {"exact_match": candidate.score} if is_reply_scored else {}
        self.model.train()
        self.remaining.observe_evaluation(time.monotonic() - start_s)
        self.journal.note(update=self.counters.updates, eval_loss=loss, **facts)

    def _loss_of(self, rows: Sequence[packing.TokenizedExample]) -> tuple[float, dict[str, float]]:
        """Return the rows' loss per supervised token, and further facts for the log. Call under no_grad."""
        total, count = 0.0, 0
        self.row_losses = []
        for micro in self._cut(rows):
            losses, _ = self.path.losses(micro)
            total, count = total + float(losses.sum()), count + len(losses)
            row_lengths = [row.supervised_tokens for row in micro]
            self.row_losses += [float(row.mean()) for row in losses.split(row_lengths)]
        return total / max(count, 1), {}


def loss_options(recipe: ResolvedRecipe, data: TokenizedDataset, base: TrainingBase) -> LossOptions:
    """Return a recipe's options of the loss backend."""
    compute, budget = recipe.compute, recipe.budget
    is_one_epoch = (budget.epochs or math.inf) <= 1 or (budget.tokens or math.inf) <= data.tokens
    is_read_once = isinstance(recipe.objective, Grpo) or (is_one_epoch and not lessons(data.train))
    return LossOptions(
        fast=compute.path == "auto",
        recompute=compute.recompute,
        share=compute.share_prefixes,
        # rows that are read once are not worth storing; preference examples are read once more, for the reference, and
        # sampled replies are new ones at each update
        reuse_bytes=int(compute.cache_gb * 1e9) if compute.reuse_frozen and not is_read_once else 0,
        identity=base.ref.digest,
    )


def learning_rate(settings: ResolvedOptimizer, fraction: float) -> float:
    """Return the rate at a fraction (0..1) of the budget: linear warm-up, then half a cosine to 0 (or constant)."""
    warm = settings.warmup_fraction
    if fraction < warm:
        # the warm-up starts above 0, so that the first update is not a no-op
        return settings.learning_rate * max(fraction / warm, 0.05)
    if settings.schedule == "constant":
        return settings.learning_rate
    # rate / 2 * (1 + cos(pi * (f - w) / (1 - w)))
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min((fraction - warm) / (1 - warm), 1)))
