"""The optimiser of a run, for the device that it runs on: AdamW with fp32 state everywhere, and fp16's gradient scale."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from sartor.core.errors import BudgetError
from sartor.tune.recipe import Optimizer

# a gradient and AdamW's two moments of each parameter, fp32
BYTES_PER_PARAMETER = 12


def make(
    factors: Sequence[torch.nn.Parameter],
    settings: Optimizer,
    device: torch.device,
    projectors: Sequence[torch.nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) in one kernel a step, or on MPS in torch's plain form.

    On CUDA, if gradients and state would not fit in what memory is free now, bitsandbytes' paged AdamW (Dettmers et al.
    2023, arXiv:2305.14314), whose state CUDA moves to the host and back. Call it with the base loaded. Raises BudgetError
    when it is needed and not installed. projectors: parameters with a rate of their own, the second group if there are any.
    """
    parameters = [*factors, *projectors]
    given = [{"params": list(group)} for group in (factors, projectors) if group]
    if narrow := [parameter.dtype for parameter in parameters if parameter.dtype not in (torch.float32, torch.float64)]:
        raise TypeError(f"AdamW's state has the dtype of the parameters, and one of them is {narrow[0]}")
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if device.type == "cuda" and (problem := _beyond_memory(parameters, device)):
        try:
            return importlib.import_module("bitsandbytes.optim").PagedAdamW32bit(given, **rates)
        except ImportError:
            raise BudgetError(problem, "pip install 'sartor[quant]', which pages it; or lower method.rank") from None
    return torch.optim.AdamW(given, fused=device.type != "mps", **rates)


def _beyond_memory(parameters: Sequence[torch.nn.Parameter], device: torch.device) -> str:
    """By how much gradients and state exceed the device's free memory; empty if they do not."""
    needed = BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in parameters)
    free, _ = torch.cuda.mem_get_info(device)
    return f"gradients and optimiser state want {needed:,} bytes of GPU memory, and {free:,} are free" if needed > free else ""


def scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """The scale of the loss: for a base in fp16 (a GPU without bf16) that which keeps small gradients above fp16's least
    number (Micikevicius et al. 2018, arXiv:1710.03740), for any other none: every call then passes its argument through.

    scale(loss).backward() each micro-batch; unscale_(optimizer) before gradients are clipped; step(optimizer), which
    leaves an update out whose gradients overflowed; update(). Its state_dict belongs in a checkpoint.
    """
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
