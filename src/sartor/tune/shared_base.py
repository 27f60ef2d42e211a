"""Open base on which adapters are swapped, for rounds of federated tuning."""

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
from sartor.tune.methods.lora import Lora
from sartor.tune.model_setup import inject_recipe_adapter, open_recipe_base
from sartor.tune.recipe import ResolvedRecipe
from sartor.tune.run_forecast import RunForecast, unmeasured
from sartor.tune.sampler import SchedulePart
from sartor.tune.tokenized_dataset import TokenizedDataset
from sartor.tune.training_log import TrainingLog
from sartor.tune.training_loop import TrainingRun, learning_rate


def recipe_digest(recipe: ResolvedRecipe, template_digest: str) -> str:
    """Return the sha256 of what client and coordinator must share besides the base.

    That is method, optimiser, template, seed and row length. Learning rate and budget may differ by round.
    """
    optimizer = {name: value for name, value in config.dump(recipe.optimizer).items() if name != "learning_rate"}
    if optimizer["b_rate_ratio"] == 1:
        del optimizer["b_rate_ratio"]  # older clients and coordinators have no such option
    fields = {
        "method": config.dump(recipe.method),
        "optimizer": optimizer,
        "template": template_digest,
        "seed": recipe.seed,
    }
    return records.digest({**fields, "max_length_tokens": recipe.data.max_length_tokens})


Notice = Callable[[str], object]


class SharedBase:
    """Base of a recipe with LoRA factors that are replaced each round: a `training_loop.TrainingBase`.

    Raises what opening a base raises, and ConfigError for a method other than `lora`, and for a base that reads media:
    its projectors are no factors.
    """

    def __init__(self, recipe: ResolvedRecipe, base: Base) -> None:
        if base.media is not None:
            raise ConfigError(f"the base {base.ref.name} reads media; rounds tune text bases", "base: starter")
        if not isinstance(recipe.method, Lora):
            problem = f"method.kind is {recipe.method.kind}; only factors of plain LoRA can be averaged and stacked"
            raise ConfigError(problem, "method: {kind: lora}")
        self.recipe, self.base = recipe, base
        self.digest = recipe_digest(recipe, base.chat.template_digest)
        self.model: Any = None
        self._kept_rows: tuple[packing.TokenizedExample, ...] = ()
        self._kept_bytes = 0
        self._inject()

    def _inject(self) -> None:
        self.model = inject_recipe_adapter(self.recipe, self.base)
        # names as in PEFT's files, which omit the adapter's name
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
        """Rank R of the current factors."""
        return self._method.rank

    @property
    def _method(self) -> Lora:
        assert isinstance(self.recipe.method, Lora)  # __init__ refuses others
        return self.recipe.method

    def refit(self, rank: int) -> None:
        """Replace the factors by new ones of this rank, on the same scale alpha / R; do nothing if it is the rank.

        It makes room for frozen ranks beside those that the recipe trains. The recipe's digest stays the same.
        """
        method = self._method
        if rank == method.rank:
            return
        method_at_rank = replace(method, rank=rank, alpha=alpha_of(method.alpha, method.rank, rank))
        self.recipe = replace(self.recipe, method=method_at_rank)
        self.base.model = adapters.undo(self.model)
        self._inject()

    @property
    def ref(self) -> BaseRef:
        """Reference of the base, with its name and digest."""
        return self.base.ref

    @property
    def device(self) -> torch.device:
        """Device on which the base computes."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the base."""
        return self.base.dtype

    def keep_frozen(self, rows: Sequence[packing.TokenizedExample], cache_bytes: int) -> None:
        """Keep the activations below the lowest trained layer of these rows on disk, for all rounds and clients.

        rows: of every client, and those whose loss is measured. Call before the first loss is computed.
        """
        self._kept_rows, self._kept_bytes = tuple(rows), cache_bytes

    def path(self, model: Any, rows: Sequence[packing.TokenizedExample], wish: LossOptions) -> LossBackend:
        """Return the loss backend, chosen at the first call by its rows, with every factor trainable."""
        if self._path is None:
            if self._kept_rows:
                rows = self._kept_rows
                wish = replace(wish, reuse_bytes=self._kept_bytes, identity=self.ref.digest)
            frozen = [factor for factor in self.factors.values() if not factor.requires_grad]
            for parameter in frozen:
                parameter.requires_grad_(True)
            self._path = self.base.path(model, rows, wish)
            for parameter in frozen:
                parameter.requires_grad_(False)
        return self._path

    def put(self, shared: Tensors) -> None:
        """Copy the shared adapter into the factors; the shape of each tensor (...) must be the factor's.

        Raises RoundError if names or shapes are not those of the recipe's method.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in self.factors.items()}
        if {name: tuple(value.shape) for name, value in shared.items()} != shapes:
            first = next(iter(sorted(set(shapes) ^ set(shared))), "a tensor of another shape")
            problem = f"the shared adapter is not that of this client's recipe: {first}"
            raise RoundError(problem, "start the client with the coordinator's recipe", "manifest")
        with torch.no_grad():
            for name, parameter in self.factors.items():
                parameter.copy_(torch.from_numpy(shared[name]))

    def current_factors(self) -> dict[str, Array]:
        """Return copies of the factors, fp32, by PEFT's names: A is (R, D_in), B is (D_out, R)."""
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self.factors.items()}

    def hold(self, trains: Callable[[str], bool], ranks: slice = slice(None)) -> None:
        """Make only some factors trainable: those whose names `trains` accepts, and of them only `ranks`.

        The gradient of other ranks is zero, so AdamW without weight decay does not move them.
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
        """Return the loss of rows under an adapter, in nats per supervised token; None without rows.

        shared: A of shape (R, D_in) and B of shape (D_out, R), by name.
        """
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
        """Write an adapter as a PEFT directory.

        shared: A of shape (R, D_in) and B of shape (D_out, R), by name.
        """
        self.put(shared)
        adapters.write_adapter(self.model, folder, self.base.ref.name)


def _mask_gradient(ranks: slice, *, by_row: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a hook that sets the gradient of other ranks to zero. Ranks are rows of A and columns of B."""

    def masked(gradient: torch.Tensor) -> torch.Tensor:
        masked_gradient = torch.zeros_like(gradient)
        index = (ranks,) if by_row else (slice(None), ranks)
        masked_gradient[index] = gradient[index]
        return masked_gradient

    return masked


# a round writes no log and no checkpoints
_NOWHERE = Path(os.devnull)
_WHOLE = SchedulePart()


class LocalRun(TrainingRun):
    """Training run of one client in one round.

    part: the round among all rounds, for the learning-rate schedule.
    """

    part = SchedulePart()

    def save(self) -> None:
        """Do nothing: a client that is killed repeats its round."""

    def _foresee(self, recipe: ResolvedRecipe) -> RunForecast:
        """Return a forecast without measuring."""
        micro_batch_tokens = recipe.compute.micro_batch_tokens
        capacity = max(len(row.ids) for row in self.data.train)
        if isinstance(micro_batch_tokens, int):
            capacity = max(capacity, micro_batch_tokens)
        return unmeasured(capacity, "the recipe's")

    def _rates(self) -> tuple[float, float]:
        rate = learning_rate(self.recipe.optimizer, self.part.course(self._fraction()))
        return rate, rate


def train(
    resident: SharedBase, rows: TokenizedDataset, recipe: ResolvedRecipe, part: SchedulePart = _WHOLE
) -> LocalRun:
    """Train the trainable factors of a SharedBase from their current values, for the recipe's budget.

    part: the round among all rounds.
    Raises ModelError.
    """
    with TrainingLog(_NOWHERE, show=False) as journal:
        saver = Saver(_NOWHERE, recipe.checkpoints, {}, None)
        run = LocalRun(recipe, resident, resident.model, data=rows, journal=journal, saver=saver, resolved=None)
        run.part, run.position = part, part.start(recipe, [len(row.ids) for row in rows.train])
        run.train(DeferredSignals())
    return run
