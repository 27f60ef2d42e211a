"""tune(recipe) -> Adapter: one loop.

    Dataset --encode--> rows --order--> updates --pack--> micro-batches --loss--> gradients --AdamW--> Adapter

The base is frozen; only the adapter's fp32 factors have gradients and optimiser state.
"""

from __future__ import annotations

import importlib.metadata
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sartor.core import catalogue, config, lineage, rows
from sartor.core.artifacts import Artifact, check_free, open_artifact, write_artifact
from sartor.core.errors import ModelError, SourceError
from sartor.core.holdout import held_out_groups
from sartor.core.records import Example
from sartor.models import adapters, batches, memory, paths
from sartor.models.base import Base, machine, open_base
from sartor.models.chat import Chat
from sartor.tune import objectives, order, outlook, refusals
from sartor.tune.journal import Journal, plot_losses
from sartor.tune.recipe import Budget, Data, Optimizer, Recipe
from sartor.tune.recipe import load as load_recipe

Notice = Callable[[str], object]


@dataclass(frozen=True)
class Tuned:
    """What `tune` made: the Adapter, and what it cost."""

    adapter: Artifact

    def as_json(self) -> dict[str, Any]:
        """The command's JSON."""
        run = self.adapter.manifest["run"]
        return {"adapter": str(self.adapter.path), **run}


@dataclass
class Rows:
    """A Dataset as tokens: what is trained on, what is held out, and what was left out with the reason."""

    train: list[batches.Encoded] = field(default_factory=list)
    held_out: list[batches.Encoded] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)  # tokens of every row that could be encoded

    @property
    def tokens(self) -> int:
        """Tokens of the training rows."""
        return sum(len(row.ids) for row in self.train)

    @property
    def supervised_tokens(self) -> int:
        """Tokens of the training rows that get a loss."""
        return sum(row.supervised_tokens for row in self.train)


@dataclass
class Counters:
    """How far a run has come."""

    updates: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    def fraction(self, budget: Budget, epoch_tokens: int, wall_s: float) -> float:
        """How much of the budget is used, 0..1: of its limits the one that is nearest."""
        limits = [
            (self.updates, budget.updates),
            (self.tokens, budget.tokens),
            (self.tokens / epoch_tokens, budget.epochs),
            (wall_s / 60, budget.minutes),
        ]
        return max(used / limit for used, limit in limits if limit is not None)


def tune(
    recipe: Recipe | Mapping[str, Any] | Path | str,
    out: Path | str,
    *,
    replace: bool = False,
    show: bool = True,
    notice: Notice = lambda line: None,
) -> Tuned:
    """Fine-tune a base on a Dataset and write the Adapter to `out`.

    `recipe` is a Recipe, a mapping in its form, or the path of a YAML file. `notice` is told, in lines, what is about to
    be trained. Raises ConfigError (recipe, taken `out`), ArtifactError (Dataset), ModelError (base; a loss that is not
    finite), SourceError (no row that could be learnt from).
    """
    recipe = load_recipe(recipe)
    out = Path(out)
    check_free(out.absolute(), replace=replace)
    dataset = open_artifact(recipe.data.path, "dataset")
    chosen = recipe.base
    for refusal in refusals.of_base(recipe):
        raise refusal.error
    base = open_base(chosen.name, revision=chosen.revision, licence=chosen.licence, bits=chosen.bits, notice=notice)
    data = encode_rows(dataset, recipe, base.chat)
    model = adapters.inject_lora(
        base.model,
        rank=recipe.method.rank,
        alpha=recipe.method.alpha,
        dropout=recipe.method.dropout,
        targets=recipe.method.targets.modules,
        top_layers=recipe.method.targets.top,
        seed=recipe.seed,
    )
    for line in describe(data, base, model):
        notice(line)
    for refusal in (*refusals.of_lengths(data.lengths, recipe), *refusals.of_ends(base.chat, data.train)):
        raise refusal.error

    def fill(part: Path) -> Mapping[str, Any]:
        with Journal(part / "log.jsonl", show=show) as journal:
            run = Run(recipe, base, model, data, journal)
            notice(run.outlook.line)
            run.train()
            facts = _facts(recipe, dataset, base, data, run)  # here, since drawing and writing are no part of the tuning
        plot_losses(journal.lines, part / "loss.png")
        adapters.write_adapter(model, part, base.ref.name)
        return facts

    adapter = write_artifact(out, "adapter", fill, replace=replace)
    catalogue.register(adapter)
    return Tuned(adapter)


def encode_rows(dataset: Artifact, recipe: Recipe, chat: Chat) -> Rows:
    """The Dataset's rows as tokens. A row that is too long, refused by the template or without a supervised token is
    left out and counted. Raises SourceError when nothing is left to learn from.
    """
    examples = _hold_out(list(rows.read_examples(dataset)), recipe.data, recipe.seed)
    data = Rows()
    for example in examples:
        try:
            row = chat.encode(example)
        except SourceError as error:
            data.left_out.setdefault(f"template: {error.problem[:120]}", []).append(example.id)
            continue
        data.lengths.append(len(row.ids))
        if len(row.ids) > recipe.data.max_length_tokens:
            data.left_out.setdefault("too_long", []).append(example.id)
        elif not row.supervised_tokens:
            data.left_out.setdefault("nothing_supervised", []).append(example.id)
        else:
            (data.train if example.split == "train" else data.held_out).append(row)
    if recipe.data.rows:
        beyond = data.train[recipe.data.rows :]
        data.train = data.train[: recipe.data.rows]
        if beyond:
            data.left_out["beyond_data_rows"] = [row.example_id for row in beyond]
    # A fixed sample, so that the held-out loss of two runs on one Dataset compares
    data.held_out = random.Random(0).sample(data.held_out, min(recipe.data.eval_rows, len(data.held_out)))
    if not data.supervised_tokens:
        reasons = ", ".join(f"{reason}: {len(ids)}" for reason, ids in data.left_out.items()) or "the Dataset has none"
        remedy = f"look at the rows of {dataset.path}"
        if "too_long" in data.left_out:
            remedy = f"data.max_length_tokens={refusals.length_that_keeps(data.lengths)} (now {recipe.data.max_length_tokens})"
        raise SourceError(f"no training row with a supervised token is left ({reasons})", remedy)
    return data


def _hold_out(examples: list[Example], data: Data, seed: int) -> list[Example]:
    """Split by group as `data` says, if the Dataset itself holds out nothing."""
    if not data.eval_fraction or any(example.split == "eval" for example in examples):
        return examples
    held_out = held_out_groups((example.group for example in examples), data.eval_fraction, seed)
    return [replace(example, split="eval") if example.group in held_out else example for example in examples]


def describe(data: Rows, base: Base, model: Any) -> Iterator[str]:
    """What is about to be trained, before a second is spent on it."""
    trained, everything = adapters.trainable(model)
    yield (
        f"{len(data.train):,} rows, {data.tokens:,} tokens, {data.supervised_tokens:,} supervised "
        f"({data.supervised_tokens / data.tokens:.0%}); {len(data.held_out):,} held-out rows watched; "
        f"{trained:,} of {everything:,} parameters trained ({trained / everything:.2%}); "
        f"base {base.ref.name} in {str(base.dtype).removeprefix('torch.')} on {base.device.type}"
    )
    for reason, ids in data.left_out.items():
        yield f"left out: {len(ids):,} rows, {reason}"
    if not base.chat.has_template:
        yield "the base has no chat template; a plain one is used (models/chat.py)"


class Run:
    """The state of one run: model, optimiser, counters. `train` goes through the budget."""

    def __init__(self, recipe: Recipe, base: Base, model: Any, data: Rows, journal: Journal) -> None:
        self.recipe, self.base, self.model, self.data, self.journal = recipe, base, model, data, journal
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        settings = recipe.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=base.device.type != "mps"
        )
        self.counters = Counters()
        self.losses: dict[str, float | None] = {"first": None, "last": None, "eval": None}
        model.eval()  # a fresh adapter comes in training mode, and dropout would look like a leak between rows
        self.path = paths.choose(model, data.train, base.device)
        if recipe.compute.recompute:
            self.path = paths.with_recompute(self.path)
        self.outlook = outlook.foresee(recipe, self.path, model, base.device, data.train, data.held_out, Counters())
        self.micro_batch_tokens = self.outlook.settled.micro_batch_tokens

    def train(self) -> None:
        """Update until the budget is spent."""
        self.journal.note(path=self.path.name, reason=self.path.reason, packing_difference_nats=self.path.packing_difference)
        torch.manual_seed(self.recipe.seed)
        next_evaluation = self._evaluation_points()
        self.model.train()
        lengths = [len(row.ids) for row in self.data.train]
        for chosen in order.updates(lengths, self.recipe.optimizer.batch_tokens, self.recipe.seed):
            self._update([self.data.train[index] for index in chosen])
            fraction = self._fraction()
            if next_evaluation and fraction >= next_evaluation[0]:
                next_evaluation = [point for point in next_evaluation if point > fraction]
                self._evaluate()
            if fraction >= 1:
                break
        self.model.eval()

    def _fraction(self) -> float:
        return self.counters.fraction(self.recipe.budget, self.data.tokens, self.journal.wall_s)

    def _evaluation_points(self) -> list[float]:
        count = self.recipe.evaluations if self.data.held_out else 0
        return [(place + 1) / count for place in range(count)]

    def _update(self, chosen: Sequence[batches.Encoded]) -> None:
        """One optimiser update over whole rows, computed in micro-batches."""
        began = time.monotonic()
        settings = self.recipe.optimizer
        rate = learning_rate(settings, self._fraction())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total_weight = sum(row.weight * row.supervised_tokens for row in chosen)
        loss_sum = 0.0
        for micro in _micro_batches(chosen, self.micro_batch_tokens):
            losses, weights = self.path.losses(micro)
            objective = objectives.sft(losses, weights, total_weight or 1.0)
            objective.backward()  # type: ignore[no-untyped-call]
            loss_sum += float(objective.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm))
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            ids = ", ".join(row.example_id for row in chosen[:8])
            raise ModelError(
                f"update {self.counters.updates + 1}: the loss is {loss_sum}, the gradient's norm {norm}; rows {ids}",
                f"look at these rows, or lower optimizer.learning_rate (now {settings.learning_rate:g})",
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._count(chosen, loss_sum, norm, rate, time.monotonic() - began)

    def _count(self, chosen: Sequence[batches.Encoded], loss: float, norm: float, rate: float, seconds: float) -> None:
        counters = self.counters
        tokens = sum(len(row.ids) for row in chosen)
        counters.updates += 1
        counters.tokens += tokens
        counters.supervised_tokens += sum(row.supervised_tokens for row in chosen)
        if self.losses["first"] is None:
            self.losses["first"] = loss
        self.losses["last"] = loss
        self.journal.note(
            update=counters.updates,
            loss=loss,
            grad_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            tokens_per_s=round(tokens / seconds, 1),
            memory_bytes=memory.peak_bytes(),
        )
        self.journal.show(self._fraction(), loss, counters.tokens / self.journal.wall_s)
        if self.outlook.observe(tokens, seconds, counters.tokens, self.journal.wall_s):
            self.journal.note(forecast=self.outlook.as_json())

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Loss per supervised token on the held-out rows."""
        self.model.eval()
        total, count = 0.0, 0
        for micro in _micro_batches(self.data.held_out, self.micro_batch_tokens):
            losses, _ = self.path.losses(micro)
            total, count = total + float(losses.sum()), count + len(losses)
        self.model.train()
        self.losses["eval"] = total / count
        self.journal.note(update=self.counters.updates, eval_loss=total / count)


def learning_rate(settings: Optimizer, fraction: float) -> float:
    """The rate at a fraction (0..1) of the budget: linear warm-up, then a half cosine to 0 (or constant)."""
    warm = settings.warmup_fraction
    if fraction < warm:
        # begins above 0: the first update must not be a no-op
        return settings.learning_rate * max(fraction / warm, 0.05)
    if settings.schedule == "constant":
        return settings.learning_rate
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min((fraction - warm) / (1 - warm), 1)))


def _micro_batches(chosen: Sequence[batches.Encoded], capacity: int) -> Iterator[list[batches.Encoded]]:
    lengths = [len(row.ids) for row in chosen]
    for group in batches.fill(lengths, max(capacity, *lengths)):
        yield [chosen[index] for index in group]


def _facts(recipe: Recipe, dataset: Artifact, base: Base, data: Rows, run: Run) -> dict[str, Any]:
    """The manifest of the Adapter."""
    trained, everything = adapters.trainable(run.model)
    counters, wall_s = run.counters, run.journal.wall_s
    peak_bytes = memory.peak_bytes(base.device)
    return {
        "base": base.as_manifest(),
        "recipe": config.dump(recipe),
        "parents": [dataset.as_parent()],
        "sources": dataset.manifest["sources"],
        "licence": lineage.combine([dataset.licence, base.ref.licence]),
        "left_out": data.left_out,
        "run": {
            "updates": counters.updates,
            "tokens": counters.tokens,
            "supervised_tokens": counters.supervised_tokens,
            "tokens_per_s": round(counters.tokens / wall_s, 1),
            "peak_memory_bytes": peak_bytes,
            "forecast": run.outlook.as_json(),
            "forecast_error": run.outlook.errors(wall_s, peak_bytes),
            "micro_batch_tokens": run.micro_batch_tokens,
            "micro_batch_reason": run.outlook.settled.reason,
            "loss": run.losses,
            "trainable": trained,
            "trainable_fraction": trained / everything,
            "wall_s": round(wall_s, 2),
            "path": run.path.name,
            "path_reason": run.path.reason,
            "packed": run.path.name != "one-row",
            "packing_difference_nats": run.path.packing_difference,
        },
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("sartor", "torch", "transformers", "peft")},
    }
