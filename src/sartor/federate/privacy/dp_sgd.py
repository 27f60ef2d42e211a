"""DP-SGD of a client's rows, through opacus.

Abadi et al. 2016, arXiv:1607.00133, algorithm 1. With gradients g_i of the drawn rows, clip norm C, noise multiplier z
and L = `batch_rows`, the optimiser's gradient is

    g = (sum_i g_i min(1, C / ||g_i||) + N(0, (z C)^2 I)) / L

It needs the gradient of each row alone. Rows are therefore not packed and share no prefixes: one row of the batch is
one row of the data. Each row is drawn independently (Poisson), which is what the accountant assumes. What the client
sends is then private towards everybody, without a secure sum. The many rows of one client are not protected together.

opacus computes and clips the gradients of single rows. The noise is Sartor's: that of opacus comes from PyTorch's
Mersenne twister. Here it comes from the system's randomness. The noisy sum is rounded to a grid of sigma / 2^20, so
that a float's low bits reveal nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from sartor.core.config import REQUIRED, option
from sartor.core.errors import ConfigError, ModelError, missing_package
from sartor.federate.privacy.accountant import Spending
from sartor.federate.privacy.client_noise import Source, gaussian

T = TypeVar("T")
Losses = Callable[[Sequence[T]], torch.Tensor]
GRID = 2.0**-20


@dataclass(frozen=True)
class RowNoise:
    """Clipping and noise with which a client's updates protect its rows."""

    clip_norm: float = option(REQUIRED, "the Euclidean norm that one row's gradient has at most")
    noise_multiplier: float = option(REQUIRED, "standard deviation of the noise over clip_norm")
    batch_rows: int = option(REQUIRED, "rows of an update on average; the sum of gradients is divided by it")

    def __post_init__(self) -> None:
        if self.clip_norm <= 0 or self.noise_multiplier < 0 or self.batch_rows < 1:
            raise ConfigError(
                f"{self} is no noise", "clip_norm above 0, noise_multiplier at least 0, batch_rows at least 1"
            )

    def fraction(self, rows: int) -> float:
        """Return the fraction of `rows` that an update draws on average.

        Raises ConfigError for fewer rows than batch_rows.
        """
        if rows < self.batch_rows:
            raise ConfigError(
                f"batch_rows is {self.batch_rows}, and there are {rows} rows", f"batch_rows: {max(1, rows // 2)}"
            )
        return self.batch_rows / rows

    def spending(self, name: str, rows: int, updates: int) -> Spending:
        """Return the spending of `updates` updates on `rows` rows."""
        return Spending(name, self.noise_multiplier, self.fraction(rows), updates)


def poisson_sample(rows: Sequence[T], row_noise: RowNoise, source: Source = os.urandom) -> list[T]:
    """Draw the rows of an update: each independently, with the same probability. Their number may be 0."""
    chances = np.frombuffer(source(8 * len(rows)), np.uint64) / 2.0**64
    return [row for row, chance in zip(rows, chances, strict=True) if chance < row_noise.fraction(len(rows))]


@contextmanager
def private_updates(
    model: Any,
    optimizer: Any,
    losses: Losses[T],
    row_noise: RowNoise,
    *,
    micro_rows: int = 8,
    source: Source = os.urandom,
) -> Iterator[Callable[[Sequence[T]], None]]:
    """Yield a function that makes one update from the rows it is given (`poisson_sample`).

    On exit the hooks are removed and the training modes restored.
    model: a torch module, as from `adapters.inject_lora`; its parameters that require a gradient are trained.
    losses: rows -> (B,), a row's loss depending on that row alone; it calls `model`.
    micro_rows: number of rows computed at once.
    Raises ExtraError without opacus, ModelError where a gradient is not that of single rows.
    """
    try:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer
    except ImportError:
        raise missing_package("opacus", "federated") from None
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _check(model, trainable, optimizer)
    modes = [(module, module.training) for module in model.modules()]
    model.train()  # opacus hooks modules in training mode only
    hooks = GradSampleModule(model, loss_reduction="sum", strict=False)
    dp_optimizer = DPOptimizer(
        optimizer, noise_multiplier=0.0, max_grad_norm=row_noise.clip_norm, expected_batch_size=row_noise.batch_rows
    )
    dp_optimizer.attach_step_hook(lambda stepped: _noise(stepped.params, row_noise, source))

    def update(rows: Sequence[T]) -> None:
        dp_optimizer.zero_grad()
        micros = [rows[index : index + micro_rows] for index in range(0, len(rows), micro_rows)]
        for micro in micros:
            with warnings.catch_warnings():  # the input of the lowest adapted layer needs no gradient
                warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
                losses(micro).sum().backward()
            _check_rows(trainable, len(micro))
            dp_optimizer.signal_skip_step(micro is not micros[-1])
            dp_optimizer.step()
            dp_optimizer.zero_grad()
        if not micros:  # no row was drawn: noise alone
            for parameter in trainable:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
            dp_optimizer.step()
            dp_optimizer.zero_grad()

    try:
        yield update
    finally:
        hooks.to_standard_module()
        for module, mode in modes:
            module.training = mode


def _noise(parameters: Sequence[Any], row_noise: RowNoise, source: Source) -> None:
    """Add noise to the gradients, which are the clipped sum over batch_rows, and round them to the grid.

    g' = round((g + N(0, sigma^2)) / (sigma 2^-20)) sigma 2^-20, with sigma = z C / L.
    """
    sigma = row_noise.noise_multiplier * row_noise.clip_norm / row_noise.batch_rows
    if not sigma:
        return
    for parameter in parameters:
        noise = torch.from_numpy(gaussian(sigma, parameter.numel(), source)).reshape(parameter.shape)
        noisy = parameter.grad.double().cpu() + noise
        parameter.grad = ((noisy / (sigma * GRID)).round() * (sigma * GRID)).to(parameter.grad)


def _check(model: Any, trainable: Sequence[Any], optimizer: Any) -> None:
    if not trainable:
        raise ModelError("nothing of this model requires a gradient", "put an adapter on it: adapters.inject_lora")
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if optimized != {id(parameter) for parameter in trainable}:
        raise ModelError(
            f"the optimiser moves {len(optimized)} tensors, and {len(trainable)} of the model learn",
            "optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad])",
        )
    for name, module in model.named_modules():
        is_trainable = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if is_trainable and next(module.buffers(recurse=False), None) is not None:
            raise ModelError(
                f"{name} learns and keeps statistics of all rows, which nothing hides",
                f"model.get_submodule({name!r}).requires_grad_(False)",
            )


def _check_rows(trainable: Sequence[Any], rows: int) -> None:
    for parameter in trainable:
        sample = parameter.grad_sample
        if not isinstance(sample, torch.Tensor) or len(sample) != rows:
            actual = "no gradient" if sample is None else f"{len(sample)} gradients"
            problem = f"a tensor of shape {tuple(parameter.shape)} has {actual} for {rows} rows"
            raise ModelError(problem, "losses must call the model once, with one row of the batch for each row")
