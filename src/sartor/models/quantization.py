"""4- and 8-bit base weights through bitsandbytes.

4 bits is NF4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): 64 weights share a scale, and
256 scales share one. 8 bits is the vector-wise int8 of LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339): a row of the
weight has a scale. In both cases a layer computes x W^T with W from `dense_weight`, in the activations' own dtype.

`protect` prevents three behaviours of bitsandbytes:

- On a CPU with avx512_bf16 a `Linear4bit` in eval mode without gradients repacks its weights in place for a faster
product and never unpacks them. Every later backward pass reads them wrongly, so one evaluation ends learning.
- A `Linear8bitLt` quantises activations as well: on a CPU in eval mode only, so the measured model is not the trained
one. Its outlier columns are those of all rows of the batch together, so a row's losses depend on its neighbours.
- On a CPU with avx512f its 4-bit kernel looks for the scales of a row of the weight at row * (width // 64) (seen in
0.50.2). A width that is not a multiple of 64 has blocks that continue from a row into the next. Most of the weight
then gets scales of other rows, in the forward and in the backward pass. `dense_weight` gives it whole blocks.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch.nn import functional as F

from sartor.core.errors import missing_package

KINDS = {4: "nf4", 8: "int8"}


def settings(bits: int, dtype: torch.dtype) -> Any:
    """Return transformers' quantisation config for 4 or 8 bits, computing in `dtype`.

    Embeddings and LM head are not quantised. Raises ExtraError when bitsandbytes is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import bitsandbytes  # noqa: F401
    except ImportError:
        raise missing_package("bitsandbytes", "quant") from None
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def is_quantised(linear: Any) -> bool:
    """Return whether a module is a linear layer of bitsandbytes (not a LoRA layer around one)."""
    return width(linear) in KINDS


def width(module: Any) -> int:
    """Return 4 or 8 for a linear layer of bitsandbytes, else 0.

    The package is not imported: if it is not loaded, there is no such layer.
    """
    layers = getattr(sys.modules.get("bitsandbytes"), "nn", None)
    if layers is None:
        return 0
    if isinstance(module, layers.Linear4bit):
        return 4
    return 8 if isinstance(module, layers.Linear8bitLt) else 0


def bits_of(model: Any) -> int:
    """Return 4 or 8 if a layer of `model` is quantised to that width, else 0."""
    return max((width(module) for module in model.modules()), default=0)


def dense_weight(linear: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight of a quantised layer, of shape (out, in), dequantised directly into `dtype`.

    The result is new memory.
    """
    if width(linear) == 8:
        # W (out, in) = codes * row scale / 127, with row scales (out, 1)
        scale = _row_scales(linear).unsqueeze(1) * (1 / 127)
        dense = torch.empty(linear.weight.shape, dtype=dtype, device=linear.weight.device)
        return torch.mul(linear.weight.data, scale, out=dense)  # in fp32, rounded once
    state = linear.weight.quant_state
    scales = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    # One row per block, or all weights in one row if the last block is short, so that every row begins with a block
    blocks, rest = divmod(linear.in_features * linear.out_features, state.blocksize)
    shape = (1, linear.in_features * linear.out_features) if rest else (blocks, state.blocksize)
    # not `functional.dequantize_4bit`, which rounds to the dtype that the weights had before quantisation
    dense = torch.ops.bitsandbytes.dequantize_4bit(
        linear.weight.data, scales.float(), state.blocksize, state.quant_type, shape, dtype
    )
    return dense.view(state.shape)


def _row_scales(linear: Any) -> torch.Tensor:
    """Return the largest absolute value of each row, (out,).

    bitsandbytes moves it from the weight to the layer's state.
    """
    return linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB


def protect(model: Any) -> None:
    """Keep evaluation from changing what is trained. Call it right after opening.

    The module's docstring lists the behaviours of bitsandbytes that it prevents.
    """
    for module in model.modules():
        bits, is_unsafe = width(module), False
        if bits == 4:
            module.support_avx512bf16_for_cpu = False
            # a CPU might multiply with the wrong scales where blocks straddle rows
            if module.weight.device.type == "cpu":
                is_unsafe = module.in_features % module.weight.quant_state.blocksize != 0
        if bits == 8 or is_unsafe:
            module.forward = MethodType(_dense_forward, module)


def narrow_embedding(model: Any) -> None:
    """Store an fp32 embedding that the head does not share as the bf16 it was read from.

    Its output stays fp32. Beside 4-bit layers a vocabulary is a large part of the memory. If the weights are not bf16
    values, nothing is done.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = embedding.weight
    if (
        type(embedding) is not torch.nn.Embedding
        or weight.dtype != torch.float32
        or head is None
        or head.weight is weight
    ):
        return
    if all(torch.equal(part.bfloat16().float(), part) for part in weight.data.split(1024)):
        weight.data = weight.data.bfloat16()
        embedding.register_forward_hook(_widened)


def _widened(embedding: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Return the embedding's output in fp32 (forward hook)."""
    return output.float()


def _dense_forward(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """Return y (..., out) of x (..., in). `protect` sets it as the forward of a layer, in training and eval mode."""
    product = _DenseProduct.apply(x, linear)
    return product if linear.bias is None else product + linear.bias.to(product.dtype)


class _DenseProduct(torch.autograd.Function):  # type: ignore[misc]  # torch is read as Any
    """x W^T for a frozen W that is dequantised in both passes.

    Kept between them, the dense W would stay in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: Any) -> torch.Tensor:
        ctx.linear = linear
        return F.linear(x, dense_weight(linear, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # dx (..., in) = dy W, with dy (..., out) and W (out, in) dequantised again; W is frozen
        return gradient @ dense_weight(ctx.linear, gradient.dtype), None


def linear_bytes(model: Any) -> int:
    """Return the bytes of a base's linear weights, without its LM head.

    They include codes, scales, scales of scales, and tables. Layers that are being trained (an adapter's) do not
    count.
    """
    head = model.get_output_embeddings()
    frozen = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and not part.weight.requires_grad]
    linear = [part for part in frozen if part is not head]
    parts = {tensor.data_ptr(): tensor for module in linear for tensor in _parts(module)}
    return sum(tensor.numel() * tensor.element_size() for tensor in parts.values())


def _parts(linear: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor that a linear layer's weight consists of."""
    yield linear.weight.data
    if width(linear) == 8:
        yield _row_scales(linear)
    if width(linear) == 4:
        state = linear.weight.quant_state
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)
