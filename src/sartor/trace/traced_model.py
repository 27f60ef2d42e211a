"""Tuned model of a traced adapter, with the gradients of rows and of replies as sketches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from sartor.core import reply_markup
from sartor.core.errors import ConfigError, ModelError, SourceError
from sartor.models import adapters, packing
from sartor.models.base import Base
from sartor.models.losses.loss_backend import PACK_TOKENS, LossBackend, LossOptions
from sartor.models.losses.row_gradients import RowGradientObserver
from sartor.models.packing import SoftTargets, TokenizedExample
from sartor.models.reasoning_rules import with_reasoning_rule
from sartor.models.tuned_model import open_tuned
from sartor.trace.query_encoding import encode_query
from sartor.trace.traced_adapter import TracedAdapter, TraceQuery, TrainingRow
from sartor.tune.dataset_encoding import encode_preference
from sartor.tune.gradient_features import GradientSketcher, Moments, SketchLayout, factor_moments, lora_factors
from sartor.tune.model_setup import open_recipe_base
from sartor.tune.recipe import SAMPLED, Objective, Sft
from sartor.tune.rehearsal import with_soft_targets
from sartor.tune.tokenized_dataset import PreferenceExample

Notice = Callable[[str], object]
Array = np.ndarray[Any, np.dtype[Any]]
# batches, and rows of each, from which a second moment is estimated where none was kept
MOMENT_BATCHES, MOMENT_BATCH_ROWS = 32, 8
# rows among which the loss backend looks for those by which it is checked
_CHECKED_ROWS = 64


@dataclass(frozen=True)
class SignedSequence:
    """Sequence of a row, and whether tuning made it likelier (1) or less likely (-1)."""

    tokens: TokenizedExample
    sign: float = 1.0


def _encode(traced: TracedAdapter, base: Base, row: TrainingRow) -> list[TokenizedExample]:
    """Return a training row's tokens, as its tuning learnt them; empty if the template refuses it."""
    recipe, chat = traced.known_recipe, base.chat
    objective: Objective = Sft()
    try:
        example = reply_markup.read_example(row.example, chat.markup.spelt, keep_id=True)
        if recipe is not None:
            example = with_reasoning_rule(example, recipe.data.reasoning, chat, Counter())
            chat = chat.without_empty_think() if recipe.data.empty_think == "drop" else chat
            objective = Sft() if row.is_rehearsal else recipe.objective
        return [tokens for tokens, _ in encode_preference(example, objective, chat, row.dataset.path)]
    except SourceError:
        return []


class TracedModel:
    """Base and adapter of a traced adapter in memory, with gradients of the factors that are sketched.

    factors: LoRA factors by name. final: their values in the adapter.
    soft: soft targets of rows of rehearsal, by their ids.
    """

    def __init__(
        self, traced: TracedAdapter, base: Base, model: Any, soft: Mapping[str, SoftTargets | None] | None = None
    ) -> None:
        self.traced, self.base, self.model, self.soft = traced, base, model, soft or {}
        self.factors = lora_factors(model)
        if not self.factors:
            method = "retrieval" if traced.unrepeatable else "unrolled"
            raise ModelError(
                f"{traced.artifact.path} has no LoRA factors, whose gradients are compared",
                f"{traced.command} --method {method} --prompt P --reply R, which needs none",
            )
        self.final = {name: factor.detach().clone() for name, factor in self.factors.items()}
        layers = model.config.get_text_config().num_hidden_layers
        shapes = {name: tuple(factor.shape) for name, factor in self.factors.items()}
        self.layout = SketchLayout.of(shapes, seed=self.seed, layers=layers)
        sketched = {factor.name for factor in self.layout.factors}
        for name, factor in self.factors.items():
            factor.requires_grad_(name in sketched)

    @classmethod
    def open(cls, traced: TracedAdapter, notice: Notice = lambda line: None) -> TracedModel:
        """Open base and adapter.

        Raises ConfigError for an adapter that learnt from a teacher or a verifier, and what `open_recipe_base`,
        `open_tuned` and `adapters.open_adapter` raise.
        """
        if traced.known_recipe is not None and isinstance(traced.known_recipe.objective, SAMPLED):
            raise ConfigError(
                f"{traced.artifact.path} was tuned by {traced.known_recipe.objective.kind}: it learnt from scores of "
                "replies, of which gradients are not traced",
                f"{traced.command} --method retrieval --prompt P --reply R",
            )
        if traced.known_recipe is None:  # tuned elsewhere, or by federated rounds
            return cls(traced, *open_tuned(traced.artifact, notice))
        base = open_recipe_base(traced.known_recipe, notice)
        held: list[TokenizedExample] = []
        if traced.known_recipe.data.rehearsal.loss == "kl":
            rows = [row for row in traced.rows if row.is_rehearsal]
            held = with_soft_targets(base, [tokens for row in rows for tokens in _encode(traced, base, row)])
        soft = {row.example_id: row.soft for row in held}
        return cls(traced, base, adapters.open_adapter(base.model, traced.artifact.path), soft)

    @property
    def seed(self) -> int:
        """Seed of the projections: the tuning's, 0 if it is not known."""
        return self.traced.known_recipe.seed if self.traced.known_recipe else 0

    @cached_property
    def backend(self) -> LossBackend:
        """Fastest loss backend that is right, checked by some of the rows."""
        checked = []
        for index in range(min(_CHECKED_ROWS, len(self.traced.rows))):
            checked += [sequence.tokens for sequence in self.row(index)]
        self.model.eval()
        return self.base.path(self.model, checked, LossOptions(identity=self.base.ref.digest))

    def put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the factors these values, (...) by name."""
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.copy_(tensors[name])

    def row(self, index: int) -> list[SignedSequence]:
        """Return the sequences of a training row; empty if the template refuses it."""
        row = self.traced.rows[index]
        sequences = []
        for tokens in _encode(self.traced, self.base, row):
            if row.is_rehearsal:
                weight = tokens.weight * self.traced.manifest["run"].get("rehearsal_factor", 1.0)
                tokens = replace(tokens, weight=weight, soft=self.soft.get(tokens.example_id))
            if not isinstance(tokens, PreferenceExample):
                sequences.append(SignedSequence(tokens))
                continue
            sequences.append(SignedSequence(tokens, -1.0 if tokens.term == "bad" else 1.0))
            if tokens.term == "pair" and tokens.other:
                sequences.append(SignedSequence(tokens.other, -1.0))
        return sequences

    def query(self, query: TraceQuery) -> list[SignedSequence]:
        """Return a reply to explain as a sequence of which the reply alone is learnt.

        Raises as `encode_query` does.
        """
        return [SignedSequence(encode_query(self.base, self.traced, query))]

    def sketcher(self, moments: Moments) -> GradientSketcher:
        """Return a sketcher of the factors' gradients, preconditioned by second moments."""
        sketcher = GradientSketcher(self.layout, self.factors, self.base.device)
        sketcher.precondition(moments)
        return sketcher

    def sketches(self, items: Sequence[Sequence[SignedSequence]], sketcher: GradientSketcher) -> Array:
        """Return (n, K) sketches of the gradients of each item's summed loss, at the current factors.

        items: sequences of each row or reply. An item without sequences has zeros.
        """
        observer = RowGradientObserver(sketcher)
        result = np.zeros((len(items), sketcher.size), np.float32)
        with observer.attached(self.backend):
            for micro, signs in self._micro_batches(items):
                losses, weights = self.backend.losses(micro)
                self._gradients((losses * weights * signs).sum())
                ids, sketches = observer.take()
                np.add.at(result, [int(id) for id in ids], sketches.cpu().numpy())
        return result

    def estimate_moments(self) -> Moments:
        """Return factored second moments of the gradients of random small batches at the current factors.

        AdamW's own are not in an Adapter. Its v is a running mean of squared gradients of batches, as this is.
        """
        count = len(self.traced.rows)
        order = random.Random(self.seed).sample(range(count), min(count, MOMENT_BATCHES * MOMENT_BATCH_ROWS))
        sums = {name: torch.zeros_like(factor) for name, factor in self._trained.items()}
        batches = 0
        for start in range(0, len(order), MOMENT_BATCH_ROWS):
            items = [self.row(index) for index in order[start : start + MOMENT_BATCH_ROWS]]
            total: dict[str, torch.Tensor] = {}
            for micro, signs in self._micro_batches(items):
                losses, weights = self.backend.losses(micro)
                for name, gradient in self._gradients((losses * weights * signs).sum()).items():
                    total[name] = total[name] + gradient if name in total else gradient
            for name, gradient in total.items():
                sums[name] += gradient.square()
            batches += 1
        return factor_moments({name: moment / max(batches, 1) for name, moment in sums.items()})

    @property
    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: factor for name, factor in self.factors.items() if factor.requires_grad}

    def _gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the gradients of a loss, a scalar, for each factor that is sketched."""
        trained = self._trained
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return {name: value for name, value in zip(trained, gradients, strict=True) if value is not None}

    def _micro_batches(
        self, items: Sequence[Sequence[SignedSequence]]
    ) -> list[tuple[list[TokenizedExample], torch.Tensor]]:
        """Return the sequences in micro-batches, each with the (S,) signs of its supervised tokens.

        The id of a sequence is its item's index.
        """
        signs: dict[int, float] = {}
        sequences = []
        for index, item in enumerate(items):
            for sequence in item:
                sequences.append(replace(sequence.tokens, example_id=str(index)))
                signs[id(sequences[-1])] = sequence.sign
        if not sequences:
            return []
        capacity = min(int(self.traced.manifest.get("run", {}).get("micro_batch_tokens", PACK_TOKENS)), PACK_TOKENS)
        result = []
        for micro in packing.micro_batches(sequences, capacity, share=self.backend.name != "one-row"):
            values = torch.tensor([signs[id(row)] for row in micro])
            counts = torch.tensor([row.supervised_tokens for row in micro])
            result.append((micro, torch.repeat_interleave(values, counts).to(self.base.device)))
        return result
