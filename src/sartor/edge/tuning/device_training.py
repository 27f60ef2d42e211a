"""Training loop on a device, also zeroth order.

Memory is planned before the process starts (`plan.py`), so nothing is measured here: the micro-batch is the recipe's.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sartor.core.errors import ArtifactError
from sartor.models.packing import TokenizedExample
from sartor.tune import objectives
from sartor.tune.cost_model import BatchLoad, Interval, MicroBatchChoice
from sartor.tune.optimizers import AdamW, Still
from sartor.tune.recipe import ResolvedRecipe
from sartor.tune.run_forecast import RunForecast
from sartor.tune.sampler import SchedulePart
from sartor.tune.training_loop import TrainingRun, learning_rate

# `auto` without a plan
MICRO_BATCH_TOKENS = 512
# How far the two looks of zeroth-order learning are from where it stands (MeZO, arXiv:2305.17333, table 15)
STEP = 1e-3
_STILL = "still."


class DeviceRun(TrainingRun):
    """A run on a device. A checkpoint holds the factors of all layers, so that the next run may let others learn."""

    part = SchedulePart()

    def take(self, part: SchedulePart) -> None:
        """Be this part of a longer course; from its beginning, unless a checkpoint is restored."""
        self.part, self.position = part, part.start(self.recipe, [len(row.ids) for row in self.data.train])

    def _rates(self) -> tuple[float, float]:
        """A device has no projectors."""
        rate = learning_rate(self.recipe.optimizer, self.part.course(self._fraction()))
        return rate, rate

    def _optimizer(self) -> Any:
        return AdamW(self.parameters, self.recipe.optimizer)

    def _foresee(self, recipe: ResolvedRecipe) -> RunForecast:
        rows, micro_batch_tokens = self.data.train, recipe.compute.micro_batch_tokens
        longest = max(len(row.ids) for row in rows)
        max_tokens = max(
            longest,
            min(recipe.optimizer.batch_tokens, MICRO_BATCH_TOKENS)
            if micro_batch_tokens == "auto"
            else micro_batch_tokens,
        )
        no_memory = Interval(0.0, 0.0, 0.0)
        course = self._course_tokens(recipe)
        evaluated_tokens = recipe.evaluations * sum(len(row.ids) for row in self.data.held_out)
        minutes = recipe.budget.minutes
        return RunForecast(
            MicroBatchChoice(max_tokens, BatchLoad(), True, "planned"),
            no_memory,
            course,
            evaluated_tokens,
            minutes and minutes * 60,
        )

    def _course_tokens(self, recipe: ResolvedRecipe) -> int | None:
        """Tokens until the budget is spent, about; None where only minutes limit it."""
        budget, tokens = recipe.budget, self.data.tokens
        per_update = min(recipe.optimizer.batch_tokens, tokens)
        limits = [
            budget.tokens,
            budget.epochs and budget.epochs * tokens,
            budget.updates and budget.updates * per_update,
        ]
        return int(min(limit for limit in limits if limit)) if any(limits) else None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """See `Run`; the factors that are held still too."""
        tensors, facts = super().state()
        return {
            **tensors,
            **{f"{_STILL}{name}": parameter.data for name, parameter in self._frozen_factors().items()},
        }, facts

    def _frozen_factors(self) -> dict[str, torch.nn.Parameter]:
        factors = {id(parameter) for parameter in self.model.factors().values()}
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if id(parameter) in factors and not parameter.requires_grad
        }

    def _become(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], source: Path) -> None:
        """See `Run`: of whatever learnt there, what learns here goes on, and what does not is held as it was."""
        factors = {
            name.removeprefix("adapter.").removeprefix(_STILL): tensor
            for name, tensor in tensors.items()
            if _is_factor(name)
        }
        frozen = self._frozen_factors()
        if set(factors) != {*self.named, *frozen} or any(
            factors[name].shape != tensor.shape for name, tensor in frozen.items()
        ):
            raise ArtifactError(
                f"the factors in {source} do not fit this adapter", f"rm -r {source}, then the same command again"
            )
        with torch.no_grad():
            for name, tensor in frozen.items():
                tensor.copy_(factors[name])
        own_tensors = {f"adapter.{name}": factors[name] for name in self.named}
        own_tensors |= {name: tensor for name, tensor in tensors.items() if not _is_factor(name)}
        super()._become(own_tensors, facts, source)


class ZerothRun(DeviceRun):
    """Learns from two losses an update, on either side of where it stands along a random direction: no gradient, no
    moments.

    SPSA (Spall 1992) as MeZO does it (Malladi et al. 2023, arXiv:2305.17333): the direction is drawn again from its
    seed each time that it is needed, and never held. The slope along it is what the gradient's norm is in the other
    runs: logged, and clipped to `optimizer.clip_norm`.
    """

    def _optimizer(self) -> Any:
        return Still(self.parameters, self.recipe.optimizer)

    @torch.no_grad()
    def _update(self, rows: Sequence[TokenizedExample]) -> None:
        start_s = time.monotonic()
        settings, rates = self.recipe.optimizer, self._rates()
        self._move(STEP)
        loss_above = self._loss(rows)
        self._move(-2 * STEP)
        loss_below = self._loss(rows)
        self._move(STEP)
        slope, loss = (loss_above - loss_below) / (2 * STEP), (loss_above + loss_below) / 2
        self._check(rows, loss, abs(slope))
        if settings.weight_decay:
            for parameter in self.parameters:
                parameter.mul_(1 - rates[0] * settings.weight_decay)
        self._move(-rates[0] * max(-settings.clip_norm, min(slope, settings.clip_norm)))
        self._count(rows, loss, abs(slope), rates, time.monotonic() - start_s)

    def _move(self, distance: float) -> None:
        """Every factor, along this update's direction."""
        seed_digest = hashlib.sha256(f"{self.recipe.seed} {self.counters.updates}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed_digest[:4], "big"))
        for parameter in self.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=distance)

    def _loss(self, rows: Sequence[TokenizedExample]) -> float:
        weight = sum(row.weight * row.supervised_tokens for row in rows) or 1.0
        return sum(float(objectives.sft(*self.path.losses(micro), weight)) for micro in self._cut(rows))


def _is_factor(name: str) -> bool:
    return name.startswith(("adapter.", _STILL))
