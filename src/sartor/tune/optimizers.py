"""AdamW and the gradient scaler, also without torch.optim.

`AdamW` takes the steps of `torch.optim.AdamW(fused=True)` to the same bits. Of torch's interface it has the part that
`training_loop.TrainingRun` uses.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sartor.core.errors import BudgetError
from sartor.core.installation import install_command
from sartor.tune.recipe import ResolvedOptimizer

# gradient and two AdamW moments per parameter, fp32
BYTES_PER_PARAMETER = 12


def make(
    factors: Sequence[torch.nn.Parameter],
    settings: ResolvedOptimizer,
    device: torch.device,
    projectors: Sequence[torch.nn.Parameter] = (),
    b_factors: Sequence[torch.nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Return an AdamW optimiser (Loshchilov & Hutter 2019, arXiv:1711.05101), fused except on MPS.

    On CUDA it is bitsandbytes' paged AdamW (Dettmers et al. 2023, arXiv:2305.14314) if gradients and state do not fit
    into the memory that is free now; CUDA moves the paged state to the host and back. Call it with the base loaded.
    factors, projectors, b_factors: parameters of any shape (...). Projectors have a rate of their own, the last
    parameter group, if there are any. b_factors: factors B with a rate of their own (LoRA+), the group before it.
    Raises BudgetError if bitsandbytes is needed and not installed, TypeError for parameters in low precision.
    """
    parameters = [*factors, *b_factors, *projectors]
    groups = [{"params": list(group)} for group in (factors, b_factors, projectors) if group]
    if low_precision := [
        parameter.dtype for parameter in parameters if parameter.dtype not in (torch.float32, torch.float64)
    ]:
        raise TypeError(f"AdamW's state has the dtype of the parameters, and one of them is {low_precision[0]}")
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "eps": settings.epsilon}
    if device.type == "cuda" and (problem := _beyond_memory(parameters, device)):
        try:
            return importlib.import_module("bitsandbytes.optim").PagedAdamW32bit(groups, **rates)
        except ImportError:
            raise BudgetError(problem, f"{install_command('quant')}, which pages it; or lower method.rank") from None
    return torch.optim.AdamW(groups, fused=device.type != "mps", **rates)


def _beyond_memory(parameters: Sequence[torch.nn.Parameter], device: torch.device) -> str:
    """Return a problem text if gradients and state exceed the device's free memory; empty if they fit."""
    needed_bytes = BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in parameters)
    free, _ = torch.cuda.mem_get_info(device)
    return (
        f"gradients and optimiser state want {needed_bytes:,} bytes of GPU memory, and {free:,} are free"
        if needed_bytes > free
        else ""
    )


def scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Return the gradient scaler: active for a base in fp16 (a GPU without bf16), else a pass-through.

    It keeps small gradients above fp16's least number (Micikevicius et al. 2018, arXiv:1710.03740).

    Call scale(loss).backward() for each micro-batch, unscale_(optimizer) before gradients are clipped,
    step(optimizer), which skips an update whose gradients overflowed, then update(). Its state_dict belongs in a
    checkpoint.
    """
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


BETAS = (0.9, 0.999)


class AdamW:
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).

    A parameter's moments are allocated at its first gradient. Each gradient is freed before the next parameter's step.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], settings: ResolvedOptimizer) -> None:
        self.param_groups: list[dict[str, Any]] = [
            {
                "params": list(parameters),
                "lr": settings.learning_rate,
                "weight_decay": settings.weight_decay,
                "eps": settings.epsilon,
            }
        ]
        self.state: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {parameter: {} for parameter in parameters}

    @torch.no_grad()
    def step(self) -> None:
        """Step every parameter that has a gradient, and free the gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
                    parameter.grad = None

    def _step(self, parameter: torch.nn.Parameter, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        state["step"] += 1
        # m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        # w = (1 - lr decay) w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps);  g, m, v, w: one shape;  t: steps
        torch._fused_adamw_(
            [parameter],
            [parameter.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            lr=group["lr"],
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=None,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Free all gradients."""
        for parameter in self.state:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return {state: {index: {name: tensor}}}, in torch's form."""
        return {"state": dict(enumerate(self.state.values()))}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned. A parameter that is absent from it starts without moments."""
        for index, parameter in enumerate(self.state):
            self.state[parameter] = dict(state_dict["state"].get(index, {}))


class Still(AdamW):
    """Optimiser without moments and steps, for zeroth-order training."""

    def step(self) -> None:
        """Do nothing."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Ignore the moments of a run that had some."""
