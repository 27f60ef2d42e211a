"""One open base on which adapters are swapped."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sartor.core import config, records
from sartor.core.errors import ConfigError, RoundError
from sartor.core.model_refs import BaseRef
from sartor.core.processes import DeferredSignals
from sartor.models import adapters, packing
from sartor.models.base import Base
from sartor.models.lora_tensors import A, Array, Tensors, alpha_of, modules
from sartor.models.losses.loss_backend import LossBackend, LossOptions
from sartor.tune.checkpoint import Saver
from sartor.tune.cost_model import BatchLoad, Interval, MicroBatchChoice
from sartor.tune.model_setup import inject_recipe_adapter, open_recipe_base
from sartor.tune.recipe import ResolvedRecipe
from sartor.tune.run_forecast import RunForecast
from sartor.tune.sampler import SchedulePart
from sartor.tune.tokenized_dataset import TokenizedDataset
from sartor.tune.training_log import TrainingLog
from sartor.tune.training_loop import TrainingRun, learning_rate


def recipe_digest(recipe: ResolvedRecipe, template_digest: str) -> str:
    """sha256 of what client and coordinator must have in common beside the base: method, optimiser, rows' form, seed.

    The learning rate and the length of the work are each round's own.
    """
    optimizer = {name: value for name, value in config.dump(recipe.optimizer).items() if name != "learning_rate"}
    fields = {
        "method": config.dump(recipe.method),
        "optimizer": optimizer,
        "template": template_digest,
        "seed": recipe.seed,
    }
    return records.digest({**fields, "max_length_tokens": recipe.data.max_length_tokens})


Notice = Callable[[str], object]


class SharedBase:
    """The base of a recipe with fresh factors: see `training_loop.TrainingBase` for what a run asks of it.

    Raises what opening a base raises, and ConfigError for one that reads media: its projectors are no factors.
    """

    def __init__(self, recipe: ResolvedRecipe, base: Base) -> None:
        if base.media is not None:
            raise ConfigError(f"the base {base.ref.name} reads media; rounds tune text bases", "base: starter")
        self.recipe, self.base = recipe, base
        self.digest = recipe_digest(recipe, base.chat.template_digest)
        self.model: Any = None
        self._inject()

    def _inject(self) -> None:
        self.model = inject_recipe_adapter(self.recipe, self.base)
        # PEFT's files leave the adapter's name out
        named_parameters = self.model.named_parameters()
        self.factors = {
            name.replace(".default.", "."): parameter
            for name, parameter in named_parameters
            if parameter.requires_grad
        }
        modules(self.factors)
        self._path: LossBackend | None = None
        self._masks: list[Any] = []

    @classmethod
    def open(cls, recipe: ResolvedRecipe, notice: Notice = lambda line: None) -> SharedBase:
        """Open the base that the recipe names."""
        return cls(recipe, open_recipe_base(recipe, notice))

    @property
    def rank(self) -> int:
        """R, of the factors as they stand."""
        return self.recipe.method.rank

    def refit(self, rank: int) -> None:
        """Have fresh factors of this rank, on the same scale, alpha / R; nothing changes where it is the rank already.

        For ranks that are held still beside those that the recipe trains: its digest stays.
        """
        method = self.recipe.method
        if rank == method.rank:
            return
        method_at_rank = replace(method, rank=rank, alpha=alpha_of(method.alpha, method.rank, rank))
        self.recipe = replace(self.recipe, method=method_at_rank)
        self.base.model = adapters.undo(self.model)
        self._inject()

    @property
    def ref(self) -> BaseRef:
        """See Ground."""
        return self.base.ref

    @property
    def device(self) -> torch.device:
        """See Ground."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """See Ground."""
        return self.base.dtype

    def path(self, model: Any, rows: Sequence[packing.TokenizedExample], wish: LossOptions) -> LossBackend:
        """See Ground: chosen once, by the rows of whoever comes first, with every factor learning."""
        if self._path is None:
            frozen = [factor for factor in self.factors.values() if not factor.requires_grad]
            for parameter in frozen:
                parameter.requires_grad_(True)
            self._path = self.base.path(model, rows, wish)
            for parameter in frozen:
                parameter.requires_grad_(False)
        return self._path

    def put(self, shared: Tensors) -> None:
        """Become the shared adapter. Raises RoundError where its tensors are not those of the recipe's method."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.factors.items()}
        if {name: tuple(value.shape) for name, value in shared.items()} != shapes:
            first = next(iter(sorted(set(shapes) ^ set(shared))), "a tensor of another shape")
            problem = f"the shared adapter is not that of this client's recipe: {first}"
            raise RoundError(problem, "the method of the recipe that the coordinator has", "manifest")
        with torch.no_grad():
            for name, parameter in self.factors.items():
                parameter.copy_(torch.from_numpy(shared[name]))

    def current_factors(self) -> dict[str, Array]:
        """The factors as they stand, fp32, by PEFT's names."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self.factors.items()}

    def hold(self, trains: Callable[[str], bool], ranks: slice = slice(None)) -> None:
        """Let those factors learn whose names `trains` says, of them those ranks, and nothing else.

        The gradient of the other ranks is zero, so that AdamW without weight decay does not move them.
        """
        for mask in self._masks:
            mask.remove()
        self._masks = []
        for name, parameter in self.factors.items():
            parameter.requires_grad_(trains(name))
            if trains(name) and len(range(self.rank)[ranks]) < self.rank:
                self._masks.append(parameter.register_hook(_mask_gradient(ranks, by_row=name.endswith(A))))

    @torch.no_grad()
    def loss(self, shared: Tensors, rows: Sequence[packing.TokenizedExample]) -> float | None:
        """Nats per supervised token of rows under an adapter; None of no rows."""
        if not rows:
            return None
        self.put(shared)
        self.model.eval()
        path, total, count = self.path(self.model, rows, LossOptions()), 0.0, 0
        longest = max(len(row.ids) for row in rows)
        micro_batch_tokens = self.recipe.compute.micro_batch_tokens
        capacity = max(longest, micro_batch_tokens if isinstance(micro_batch_tokens, int) else longest)
        for micro in packing.micro_batches(rows, capacity, share=path.name != "one-row"):
            losses, _ = path.losses(micro)
            total, count = total + float(losses.sum()), count + len(losses)
        return total / count

    def write(self, shared: Tensors, folder: Any) -> None:
        """The PEFT directory of an adapter."""
        self.put(shared)
        adapters.write_adapter(self.model, folder, self.base.ref.name)


def _mask_gradient(ranks: slice, *, by_row: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """The gradient of these ranks, which are rows of A and columns of B; zero elsewhere."""

    def masked(gradient: torch.Tensor) -> torch.Tensor:
        masked_gradient = torch.zeros_like(gradient)
        index = (ranks,) if by_row else (slice(None), ranks)
        masked_gradient[index] = gradient[index]
        return masked_gradient

    return masked


# a round keeps no log of its own, and saves nothing on its way
_NOWHERE = Path(os.devnull)
_WHOLE = SchedulePart()


class LocalRun(TrainingRun):
    """A run of `tune` within one round: part is the round, of all."""

    part = SchedulePart()

    def save(self) -> None:
        """Nothing: what a killed client did is done again."""

    def _foresee(self, recipe: ResolvedRecipe) -> RunForecast:
        """Nothing is measured: a micro-batch that depended on free memory would change the last bits."""
        micro_batch_tokens, longest = recipe.compute.micro_batch_tokens, max(len(row.ids) for row in self.data.train)
        no_memory, capacity = (
            Interval(0.0, 0.0, 0.0),
            max(longest, micro_batch_tokens if isinstance(micro_batch_tokens, int) else longest),
        )
        return RunForecast(MicroBatchChoice(capacity, BatchLoad(), True, "the recipe's"), no_memory, None, 0, None)

    def _rates(self) -> tuple[float, float]:
        rate = learning_rate(self.recipe.optimizer, self.part.course(self._fraction()))
        return rate, rate


def train(
    resident: SharedBase, rows: TokenizedDataset, recipe: ResolvedRecipe, part: SchedulePart = _WHOLE
) -> LocalRun:
    """Train what of the resident may learn, from where it stands, for the recipe's budget. Raises ModelError."""
    with TrainingLog(_NOWHERE, show=False) as journal:
        saver = Saver(_NOWHERE, recipe.checkpoints, {}, None)
        run = LocalRun(recipe, resident, resident.model, rows, journal, saver, None)
        run.part, run.position = part, part.start(recipe, [len(row.ids) for row in rows.train])
        run.train(DeferredSignals())
    return run
