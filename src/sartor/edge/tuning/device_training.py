"""Training loop on a device, also zeroth order.

Memory is planned before the process starts (`memory_plan.py`), so nothing is measured here: the micro-batch is the
recipe's.
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

# Micro-batch of `auto` without a plan
MICRO_BATCH_TOKENS = 512
# Distance epsilon of the two points of zeroth-order learning (MeZO, arXiv:2305.17333, table 15)
STEP = 1e-3
_STILL = "still."


class DeviceRun(TrainingRun):
    """Run on a device. A checkpoint holds the factors of all layers, so that the next run may let others learn."""

    part = SchedulePart()

    def take(self, part: SchedulePart) -> None:
        """Take this part of a longer course, from its beginning unless a checkpoint is restored."""
        self.part, self.position = part, part.start(self.recipe, [len(row.ids) for row in self.data.train])

    def _rates(self) -> tuple[float, float]:
        """Return the learning rate twice: a device has no projectors."""
        rate = learning_rate(self.recipe.optimizer, self.part.course(self._fraction()))
        return rate, rate

    def _optimizer(self) -> Any:
        return AdamW(self.parameters, self.recipe.optimizer)

    def _foresee(self, recipe: ResolvedRecipe) -> RunForecast:
        """Return the forecast of the run, with the planned micro-batch."""
        rows, micro_batch_tokens = self.data.train, recipe.compute.micro_batch_tokens
        longest = max(len(row.ids) for row in rows)
        if micro_batch_tokens == "auto":
            max_tokens = max(longest, min(recipe.optimizer.batch_tokens, MICRO_BATCH_TOKENS))
        else:
            max_tokens = max(longest, micro_batch_tokens)
        minutes = recipe.budget.minutes
        return RunForecast(
            settled=MicroBatchChoice(max_tokens, BatchLoad(), True, "planned"),
            memory=Interval(0.0, 0.0, 0.0),
            course_tokens=self._course_tokens(recipe),
            evaluated_tokens=recipe.evaluations * sum(len(row.ids) for row in self.data.held_out),
            limit_s=minutes and minutes * 60,
        )

    def _course_tokens(self, recipe: ResolvedRecipe) -> int | None:
        """Return about how many tokens the budget allows; None if only minutes limit it."""
        budget, tokens = recipe.budget, self.data.tokens
        per_update = min(recipe.optimizer.batch_tokens, tokens)
        limits = [
            budget.tokens,
            budget.epochs and budget.epochs * tokens,
            budget.updates and budget.updates * per_update,
        ]
        return int(min(limit for limit in limits if limit)) if any(limits) else None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors (...) and facts of `TrainingRun.state`, with the frozen factors too."""
        tensors, facts = super().state()
        return {
            **tensors,
            **{f"{_STILL}{name}": parameter.data for name, parameter in self._frozen_factors().items()},
        }, facts

    def _frozen_factors(self) -> dict[str, torch.nn.Parameter]:
        """Return the factors that do not learn, by name."""
        factors = {id(parameter) for parameter in self.model.factors().values()}
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if id(parameter) in factors and not parameter.requires_grad
        }

    def _load_state(self, tensors: dict[str, torch.Tensor], facts: dict[str, Any], source: Path) -> None:
        """Restore a state, whichever factors learnt in it.

        Factors that learn here continue, and the others are frozen as they were.
        """
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
        super()._load_state(own_tensors, facts, source)


class ZerothRun(DeviceRun):
    """Run that learns from two losses an update, without gradients and moments.

    SPSA (Spall 1992) as in MeZO (Malladi et al. 2023, arXiv:2305.17333, algorithm 1). The direction z is drawn again
    from its seed whenever it is needed, and never stored. The slope along it takes the place of the gradient's norm:
    it is logged, and clipped to `optimizer.clip_norm`.
    """

    def _optimizer(self) -> Any:
        return Still(self.parameters, self.recipe.optimizer)

    @torch.no_grad()
    def _update(self, rows: Sequence[TokenizedExample]) -> None:
        """Update every factor along a random direction by the slope of the loss."""
        start_s = time.monotonic()
        settings, rates = self.recipe.optimizer, self._rates()
        # slope g = (L(theta + eps z) - L(theta - eps z)) / (2 eps), z ~ N(0, I) over all factors
        # theta <- (1 - rate * decay) theta - rate * clip(g) z
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
        self._record_update(rows, loss, abs(slope), rates=rates, seconds=time.monotonic() - start_s)

    def _move(self, distance: float) -> None:
        """Move every factor by `distance` along this update's direction."""
        seed_digest = hashlib.sha256(f"{self.recipe.seed} {self.counters.updates}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed_digest[:4], "big"))
        for parameter in self.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=distance)

    def _loss(self, rows: Sequence[TokenizedExample]) -> float:
        """Return the weighted mean loss of the rows."""
        weight = sum(row.loss_weight for row in rows) or 1.0
        return sum(float(objectives.sft(*self.path.losses(micro), weight)) for micro in self._cut(rows))


def _is_factor(name: str) -> bool:
    return name.startswith(("adapter.", _STILL))
