"""Forward pass of a 16-bit model in fp32, the reference for 16-bit passes that round differently.

Neither of two such passes can judge the other. `in_fp32` makes transformers' own module compute in fp32 for a few
rows. Weights are widened one module at a time, and those of linear modules one slice at a time. So memory grows by a
slice of a weight and not by a second model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch.nn import functional as F

from sartor.models import quantization
from sartor.models.losses.lora_linear import rounds

SLICE_BYTES = 64 << 20


@contextmanager
def in_fp32(model: Any) -> Iterator[None]:
    """Make `model` compute in fp32 inside the `with` block.

    Call it under no_grad. Models that cast to a dtype by themselves raise when they are called.

    The parameters of a module that is not linear are replaced by fp32 copies while that module computes. They are
    restored afterwards, also when the module raised.
    """
    embedding = model.get_input_embeddings()
    embedded = {
        id(module) for module in embedding.modules()
    }  # image and audio towers and their caches are among them; they stay in 16 bits
    swap = _Swap()
    # the embedding table stays in 16 bits; its output is widened
    hooks = [embedding.register_forward_hook(lambda module, inputs, output: _wide(output))]
    linears: list[tuple[Any, Any]] = []  # modules, and the `forward` set on the instance before, if any
    try:
        for module in model.modules():
            if id(module) in embedded or isinstance(module, torch.nn.Embedding):
                continue
            if quantization.is_quantised(module) or type(module) is torch.nn.Linear:
                linears.append((module, module.__dict__.get("forward")))
                module.forward = MethodType(_linear_in_fp32, module)
            elif any(True for _ in _own_tensors(module)):
                hooks.append(module.register_forward_pre_hook(swap.widen, with_kwargs=True))
                hooks.append(module.register_forward_hook(swap.give_back))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, original_forward in linears:
            del module.forward
            if original_forward is not None:
                module.forward = original_forward
        swap.give_all_back()


class _Swap:
    """Parameters and buffers that are fp32 at present, each with its original data, most recent last."""

    def __init__(self) -> None:
        self._narrow: list[tuple[torch.Tensor, torch.Tensor]] = []

    def widen(self, module: Any, inputs: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Widen a module's own tensors and its inputs to fp32 before it computes (forward pre-hook)."""
        for tensor in _own_tensors(module):
            self._narrow.append((tensor, tensor.data))
            tensor.data = tensor.data.float()
        return _wide(inputs), _wide(kwargs)

    def give_back(self, module: Any, inputs: Any, output: Any) -> None:
        """Restore a module's own tensors after it has computed (forward hook)."""
        tensor_ids = {id(tensor) for tensor in _own_tensors(module, narrowed=False)}
        for tensor, original in self._narrow:
            if id(tensor) in tensor_ids:
                tensor.data = original
        self._narrow = [entry for entry in self._narrow if id(entry[0]) not in tensor_ids]

    def give_all_back(self) -> None:
        """Restore every widened tensor, also those of a module that raised."""
        for tensor, original in reversed(self._narrow):
            tensor.data = original
        self._narrow = []


def _own_tensors(module: Any, *, narrowed: bool = True) -> Iterator[torch.Tensor]:
    """Yield the floating-point parameters and buffers of this module, without those of its submodules.

    narrowed: true yields only 16-bit tensors, false yields all.
    """
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and tensor.is_floating_point() and (rounds(tensor.dtype) or not narrowed):
            yield tensor


def _linear_in_fp32(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """Return x W^T + bias in fp32, (..., outs), for x (..., D) of any dtype."""
    x = x.float()
    if quantization.is_quantised(linear):
        y = F.linear(x, quantization.dense_weight(linear, torch.float32))
    else:
        rows = max(1, SLICE_BYTES // (4 * linear.in_features))
        y = torch.cat([F.linear(x, part.float()) for part in linear.weight.detach().split(rows)], -1)
    return y if linear.bias is None else y + linear.bias.float()


def _wide(value: Any) -> Any:
    """Return `value` with its 16-bit float tensors in fp32; tuples, lists and dictionaries are entered."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() and rounds(value.dtype) else value
    if type(value) in (tuple, list):
        return type(value)(_wide(part) for part in value)
    if type(value) is dict:
        return {name: _wide(part) for name, part in value.items()}
    return value
