"""AdamW on torch's own fused kernel, without `torch.optim`: making one of those loads torch's compiler, and that is 70 MB.

It takes the steps of `torch.optim.AdamW(fused=True)` to the same bits, and has of its interface what `tune.run.Run` uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sartor.tune.recipe import Optimizer

BETAS, EPSILON = (0.9, 0.999), 1e-8


class AdamW:
    """Loshchilov & Hutter 2019, arXiv:1711.05101. A parameter's moments are made at its first gradient.

    A parameter is stepped and its gradient let go before the next one's turn.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], settings: Optimizer) -> None:
        self.param_groups: list[dict[str, Any]] = [
            {"params": list(parameters), "lr": settings.learning_rate, "weight_decay": settings.weight_decay}
        ]
        self.state: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {part: {} for part in parameters}

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
                    parameter.grad = None

    def _step(self, parameter: torch.nn.Parameter, group: Mapping[str, Any]) -> None:
        held = self.state[parameter]
        if not held:
            held["step"] = torch.zeros((), dtype=torch.float32)
            held |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        held["step"] += 1
        torch._fused_adamw_(
            [parameter], [parameter.grad], [held["exp_avg"]], [held["exp_avg_sq"]], [], [held["step"]],
            lr=group["lr"], beta1=BETAS[0], beta2=BETAS[1], weight_decay=group["weight_decay"], eps=EPSILON,
            amsgrad=False, maximize=False, grad_scale=None, found_inf=None,
        )  # fmt: skip

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let gradients go."""
        for parameter in self.state:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """{state: {place: {name: tensor}}}, as torch's."""
        return {"state": dict(enumerate(self.state.values()))}

    def load_state_dict(self, said: Mapping[str, Any]) -> None:
        """What `state_dict` gave. A parameter of which nothing is said begins without moments."""
        for place, parameter in enumerate(self.state):
            self.state[parameter] = dict(said["state"].get(place, {}))


class Still(AdamW):
    """No moments and no step: what zeroth-order learning has in the optimiser's place."""

    def step(self) -> None:
        """Nothing."""

    def load_state_dict(self, said: Mapping[str, Any]) -> None:
        """Moments of a run that had some are let go."""
