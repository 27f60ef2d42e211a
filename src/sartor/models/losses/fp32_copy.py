"""Layers of a 16-bit model computed in fp32.

Two ways that round differently cannot be judged by each other. `in_fp32` makes transformers' own module compute in
fp32 for a
few rows: weights are widened a module at a time, linear ones a slice at a time, so memory grows by a slice of a weight
and not by a second model.
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
    """Inside, `model` computes in fp32. Call it under no_grad; models that cast by themselves raise when they are
    called.

    A parameter of a module that is not linear is replaced while that module computes, and given back afterwards, also
    when it raised.
    """
    embedding = model.get_input_embeddings()
    embedded = {
        id(module) for module in embedding.modules()
    }  # towers and their caches among them: they stay as they are
    swap = _Swap()
    # what is looked up is widened afterwards
    hooks = [embedding.register_forward_hook(lambda module, inputs, output: _wide(output))]
    linears: list[tuple[Any, Any]] = []  # modules, and the forwards that stood on themselves
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
    """Parameters and buffers that are wide now, and what they held before, the latest last."""

    def __init__(self) -> None:
        self._narrow: list[tuple[torch.Tensor, torch.Tensor]] = []

    def widen(self, module: Any, inputs: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Widen a module's own tensors and its inputs, before it computes."""
        for tensor in _own_tensors(module):
            self._narrow.append((tensor, tensor.data))
            tensor.data = tensor.data.float()
        return _wide(inputs), _wide(kwargs)

    def give_back(self, module: Any, inputs: Any, output: Any) -> None:
        """Give a module's own tensors back what they held, after it has computed."""
        tensor_ids = {id(tensor) for tensor in _own_tensors(module, narrowed=False)}
        for tensor, original in self._narrow:
            if id(tensor) in tensor_ids:
                tensor.data = original
        self._narrow = [entry for entry in self._narrow if id(entry[0]) not in tensor_ids]

    def give_all_back(self) -> None:
        """Give every tensor back what it held, also those of a module that raised."""
        for tensor, original in reversed(self._narrow):
            tensor.data = original
        self._narrow = []


def _own_tensors(module: Any, *, narrowed: bool = True) -> Iterator[torch.Tensor]:
    """Parameters and buffers of this very module that are floats; those of 16 bits alone, or all."""
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
    """Return `value`, tensors of 16-bit floats in fp32, alone or in tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() and rounds(value.dtype) else value
    if type(value) in (tuple, list):
        return type(value)(_wide(part) for part in value)
    if type(value) is dict:
        return {name: _wide(part) for name, part in value.items()}
    return value
