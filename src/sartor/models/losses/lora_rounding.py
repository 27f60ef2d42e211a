"""Peft's LoRA layers with both products summed before rounding.

peft's own layer rounds the frozen product to bf16 and then adds the low-rank term on that grid, where part of it is
lost (`lora_linear.py` has the reason). `round_once` gives each plain LoRA layer the forward and backward of
`lora_linear.Projection` instead, so that transformers' module computes what the fused path computes.

These keep peft's forward:
- layers that Projection does not support: DoRA, LoRA with a bias, the fused experts of a mixture;
- calls that are not plain: adapters disabled, merged or mixed in a batch, inputs of another dtype, autocast;
- factors with hooks, from which opacus takes the gradients of single rows.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from sartor.models.losses.lora_linear import Projection, Unsupported, rounds


def round_once(model: Any) -> Any:
    """Give `model`'s LoRA layers this module's forward if the base computes in 16 bits, and return it.

    Call it when the factors are in place and on their device. An fp32 base keeps peft's arithmetic to the bit.
    """
    dtype = model.get_output_embeddings().weight.dtype
    if not rounds(dtype):
        return model
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or not hasattr(layer, "lora_A"):
            continue
        try:
            layer.projection = Projection([layer], dtype, dropout=True)
        except Unsupported:
            continue
        layer.forward = MethodType(_forward, layer)
    return model


def rounded_twice(model: Any) -> int:
    """Return the number of LoRA layers of a 16-bit model that keep peft's own forward."""
    if not rounds(model.get_output_embeddings().weight.dtype):
        return 0
    return sum(isinstance(layer, LoraLayer) and not hasattr(layer, "projection") for layer in model.modules())


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Return the layer's output, (..., outs), for x (..., D)."""
    projection: Projection = layer.projection
    is_plain = not (args or kwargs or layer.disable_adapters or layer.merged_adapters)
    if not is_plain or x.dtype != projection.dtype or torch.is_autocast_enabled(x.device.type) or _is_heard(layer):
        return type(layer).forward(layer, x, *args, **kwargs)
    rows = x.reshape(-1, x.shape[-1])
    dropout = layer.lora_dropout["default"]
    is_dropping = layer.training and not isinstance(dropout, torch.nn.Identity)
    dropout_mask = dropout(torch.ones_like(rows)) if is_dropping else None
    y = _AdaptedProduct.apply(rows, dropout_mask, projection, *projection.parameters)
    return y.view(*x.shape[:-1], y.shape[-1])


def _is_heard(layer: Any) -> bool:
    """Return whether a module that this forward does not call has hooks."""
    parts = (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
    return any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in parts)


class _AdaptedProduct(torch.autograd.Function):  # type: ignore[misc]  # torch is read as Any
    """y (N, outs) = x W^T + bias + scale ((x * dropout_mask) A^T) B^T, and the gradients of x, A and B.

    A quantised W is made dense in both passes and not kept between them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dropout_mask: torch.Tensor | None, projection: Projection, *factors: torch.Tensor
    ) -> torch.Tensor:
        y, low_rank = projection.forward(x, dropout_mask=dropout_mask)
        ctx.projection = projection
        ctx.save_for_backward(x, dropout_mask, low_rank)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, dropout_mask, low_rank = ctx.saved_tensors
        projection, dy = ctx.projection, dy.contiguous()
        # lowered = scale dy B (N, R);  dx = dy W + mask * (lowered A) (N, D)
        lowered = projection.lower(dy)
        dx = projection.input_gradient(dy, lowered, dropout_mask) if ctx.needs_input_grad[0] else None
        # dA = lowered^T (x * mask) (R, D);  dB = scale dy^T low_rank (outs, R), with low_rank = (x * mask) A^T (N, R)
        gradients = projection.factor_gradients(dy, x if dropout_mask is None else x * dropout_mask, low_rank, lowered)
        return dx, None, None, *gradients
