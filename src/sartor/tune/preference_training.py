"""Training loop for DPO, KTO, ORPO and SimPO.

ORPO and SimPO need no reference. That of DPO and KTO is the model before its first update: the base under a new
adapter, or the adapter that tuning starts from. Its log-probabilities are one number per reply. They are computed
once, before the first update, and kept in every checkpoint. So no second model is loaded, and no update needs a
forward pass of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path as Folder
from typing import Any, NamedTuple

import torch

from sartor.core.processes import DeferredSignals
from sartor.models.packing import TokenizedExample
from sartor.tune import objectives, sampler
from sartor.tune.recipe import PAIRED, REFERENCED, Dpo, Kto, Orpo, ResolvedRecipe, Sft
from sartor.tune.tokenized_dataset import PreferenceExample, TokenizedDataset, all_sequences, lessons, micro_batches
from sartor.tune.training_loop import Counters, TrainingRun

REFERENCE = "reference"


class PreferenceLosses(NamedTuple):
    """Losses of a micro-batch of N preference examples.

    losses, weights: (N,).
    agree: (N,) whether the model moved in the direction of the rating or preference.
    replies: for pairs, the (S,) losses and weights of the preferred replies' tokens.
    """

    losses: torch.Tensor
    weights: torch.Tensor
    agree: torch.Tensor
    replies: tuple[torch.Tensor, torch.Tensor] | None = None


class PreferenceRun(TrainingRun):
    """TrainingRun for DPO, KTO, ORPO and SimPO.

    An update's loss is the weighted mean over its preference examples, plus `plain_weight` times the sft loss of its
    plain rows. For pairs it adds `sft_weight` times the sft loss of the preferred replies.
    """

    reference: torch.Tensor | None = None

    @property
    def _objective(self) -> Any:
        assert not isinstance(self.recipe.objective, Sft)
        return self.recipe.objective

    def train(self, signals: DeferredSignals) -> None:
        """Compute the reference log-probabilities unless a checkpoint held them, then train."""
        self.prepare_reference()
        super().train(signals)

    def prepare_reference(self) -> None:
        """Compute the reference log-probabilities of the rows that the run will read, if they are needed."""
        if self.reference is None and isinstance(self._objective, REFERENCED):
            rows = [
                *reached_pairs(self.recipe, self.data),
                *(lessons(self.data.held_out) if self.evaluation_points else []),
            ]
            self.reference = self._compute_reference(rows)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the state of the TrainingRun with the (N, 2) reference log-probabilities."""
        tensors, facts = super().state()
        return ({**tensors, REFERENCE: self.reference} if self.reference is not None else tensors), facts

    def _load_state(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], source: Folder) -> None:
        self.reference = tensors[REFERENCE].to(self.base.device) if REFERENCE in tensors else None
        super()._load_state(tensors, facts, source)

    @torch.no_grad()
    def _compute_reference(self, rows: Sequence[PreferenceExample]) -> torch.Tensor:
        """Return (N, 2) log-probabilities of the replies under the reference model, by the examples' `number`.

        Column 0 is the example's own reply, column 1 the other one; nan where none is needed. Every preference example
        of the run has a row. Call it before the first update.
        """
        numbers = [row.number for row in lessons([*self.data.train, *self.data.held_out])]
        table = torch.full((max(numbers) + 1, 2), math.nan, device=self.base.device)
        cells: dict[int, tuple[int, int]] = {}
        for lesson in rows:
            cells[id(lesson)] = lesson.number, 0
            if lesson.other:
                cells[id(lesson.other)] = lesson.number, 1
        self.model.eval()
        for micro in self._cut(all_sequences(rows)):
            for row, log_probability in zip(micro, self._log_probabilities(micro), strict=True):
                table[cells[id(row)]] = log_probability
        self.journal.note(reference_rows=len(cells))
        return table

    def _log_probabilities(self, rows: Sequence[TokenizedExample]) -> torch.Tensor:
        losses, _ = self.path.losses(rows)
        return objectives.log_probabilities(losses, [row.supervised_tokens for row in rows])

    def _backward(self, rows: Sequence[TokenizedExample], weight: float = 1.0) -> float:
        preferences, plain_rows = split_preference_rows(rows)
        loss = super()._backward(plain_rows, weight * self._objective.plain_weight) if plain_rows else 0.0
        divergence = self._divergence(preferences)
        total = sum(row.weight for row in preferences) or 1.0
        replies = sum(row.weight * row.supervised_tokens for row in preferences) or 1.0
        agree = 0
        for micro in self._micro_batches(preferences):
            batch_losses = self._judge(micro, divergence)
            objective = weight * self._sum(batch_losses, total, replies)
            self.scaler.scale(objective).backward()
            loss, agree = loss + float(objective.detach()), agree + int(batch_losses.agree.sum())
        self.objective_facts = self._report(preferences, agree, divergence)
        return loss

    def _loss_of(self, rows: Sequence[TokenizedExample]) -> tuple[float, dict[str, float]]:
        preferences, plain_rows = split_preference_rows(rows)
        loss = self._objective.plain_weight * super()._loss_of(plain_rows)[0] if plain_rows else 0.0
        divergence = self._divergence(preferences)
        total = sum(row.weight for row in preferences) or 1.0
        replies = sum(row.weight * row.supervised_tokens for row in preferences) or 1.0
        agree = 0
        for micro in self._micro_batches(preferences):
            batch_losses = self._judge(micro, divergence)
            loss, agree = loss + float(self._sum(batch_losses, total, replies)), agree + int(batch_losses.agree.sum())
        return loss, {f"eval_{name}": value for name, value in self._report(preferences, agree, divergence).items()}

    def _micro_batches(self, rows: Sequence[PreferenceExample]) -> list[list[PreferenceExample]]:
        share = self.recipe.compute.share_prefixes and self.path.name != "one-row"
        return micro_batches(rows, self.resolved.micro_batch_tokens, share=share) if rows else []

    def _judge(self, rows: Sequence[PreferenceExample], divergence: torch.Tensor) -> PreferenceLosses:
        if isinstance(self._objective, PAIRED):
            return self._judge_pairs(rows)
        assert self.reference is not None
        objective, reference = self._objective, self.reference[[row.number for row in rows]]
        weights = torch.tensor([row.weight for row in rows], device=self.base.device)
        is_good = torch.tensor([row.term == "good" for row in rows], device=self.base.device)
        policy = self._log_probabilities(rows)
        row_losses = objectives.kto(
            policy,
            reference[:, 0],
            is_good,
            divergence,
            beta=objective.beta,
            desirable_weight=objective.desirable_weight,
            undesirable_weight=objective.undesirable_weight,
        )
        return PreferenceLosses(row_losses, weights, (policy - reference[:, 0] > divergence) == is_good)

    def _judge_pairs(self, rows: Sequence[PreferenceExample]) -> PreferenceLosses:
        """Return the losses of pairs.

        They agree if the preferred reply gained more than the other one on the reference, or, where there is none,
        has the higher mean log-probability of a token.
        """
        objective = self._objective
        sequences = all_sequences(rows)
        losses, token_weights = self.path.losses(sequences)
        lengths = [row.supervised_tokens for row in sequences]
        sums = objectives.log_probabilities(losses, lengths)
        if isinstance(objective, Dpo):
            assert self.reference is not None
            chosen, rejected = sums.view(-1, 2).unbind(1)
            of_chosen, of_rejected = self.reference[[row.number for row in rows]].unbind(1)
            row_losses = objectives.dpo(
                chosen,
                rejected,
                of_chosen,
                of_rejected,
                beta=objective.beta,
                label_smoothing=objective.label_smoothing,
            )
            agree = chosen - of_chosen > rejected - of_rejected
        else:
            chosen, rejected = (sums / torch.tensor(lengths, device=sums.device)).view(-1, 2).unbind(1)
            if isinstance(objective, Orpo):
                row_losses = objective.odds_weight * objectives.orpo(chosen, rejected)
            else:
                row_losses = objectives.simpo(chosen, rejected, beta=objective.beta, margin=objective.margin)
            agree = chosen > rejected
        weights = torch.tensor([row.weight for row in rows], device=self.base.device)
        reply_parts = [pair[::2] for pair in (losses.split(lengths), token_weights.split(lengths))]
        return PreferenceLosses(row_losses, weights, agree, (torch.cat(reply_parts[0]), torch.cat(reply_parts[1])))

    def _sum(self, batch_losses: PreferenceLosses, total: float, replies: float) -> torch.Tensor:
        """Return a micro-batch's part of an update's loss.

            sum_i w_i l_i / total [+ sft_weight * sum_j u_j n_j / replies]

        total: sum of the weights of the update's preference examples.
        replies: sum of the weights of their tokens.
        """
        loss = (batch_losses.losses * batch_losses.weights).sum() / total
        if batch_losses.replies and self._objective.sft_weight:
            loss = loss + self._objective.sft_weight * objectives.sft(*batch_losses.replies, replies)
        return loss

    @torch.no_grad()
    def _divergence(self, rows: Sequence[PreferenceExample]) -> torch.Tensor:
        """Return z_0 of an update's rated rows, a scalar; 0 for pairs."""
        other_replies = [(row.number, row.other) for row in rows if row.term != "pair" and row.other]
        if not other_replies:
            return torch.zeros((), device=self.base.device)
        assert self.reference is not None
        reference = {id(row): self.reference[number, 1] for number, row in other_replies}
        policy, references = [], []
        for micro in self._cut([row for _, row in other_replies]):
            policy.append(self._log_probabilities(micro))
            references += [reference[id(row)] for row in micro]
        return objectives.divergence(torch.cat(policy), torch.stack(references))

    def _report(self, rows: Sequence[PreferenceExample], agree: int, divergence: torch.Tensor) -> dict[str, float]:
        """Return the fraction of preference examples that `agree`, and under kto the divergence; empty for none."""
        if not rows:
            return {}
        is_kto = isinstance(self._objective, Kto)
        return {"agreement": round(agree / len(rows), 4), **({"divergence": float(divergence)} if is_kto else {})}


def split_preference_rows(rows: Iterable[TokenizedExample]) -> tuple[list[PreferenceExample], list[TokenizedExample]]:
    """Return the preference examples and the plain rows."""
    all_rows = list(rows)
    return lessons(all_rows), [row for row in all_rows if not isinstance(row, PreferenceExample)]


def reached_pairs(recipe: ResolvedRecipe, data: TokenizedDataset) -> list[PreferenceExample]:
    """Return the preference examples that the budget reaches; all of them if only minutes limit the run."""
    lengths, counters, reached = [row.tokens for row in data.train], Counters(), set[int]()
    for indices in sampler.iterate_updates(lengths, recipe.optimizer.batch_tokens, recipe.seed):
        reached.update(indices)
        counters.updates += 1
        counters.tokens += sum(lengths[index] for index in indices)
        if len(reached) == len(lengths) or counters.fraction(recipe.budget, sum(lengths), 0.0) >= 1:
            break
    return lessons(data.train[index] for index in sorted(reached))
