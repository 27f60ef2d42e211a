"""4- and 8-bit base weights through bitsandbytes.

4 bits is NF4 with double quantisation (QLoRA, Dettmers et al. 2023, arXiv:2305.14314): 64 weights share a scale, and
256 scales share one. 8 bits is the vector-wise int8 of LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339): a row of the
weight has a scale. Either way a layer computes x W^T with W as `dense_weight` gives it, in the activations' own dtype.

Three things of bitsandbytes are kept from happening, all in `protect`:

- On a CPU with avx512_bf16 a `Linear4bit` in eval mode without gradients repacks its weights in place for a faster
  product and never unpacks them; every backward pass from then on reads them wrongly, so one evaluation ends learning.
- A `Linear8bitLt` quantises activations as well: on a CPU in eval mode only, so that what is measured is not what was
  trained. Its outlier columns are those of all rows of the batch together, so a row's losses move with its neighbours.
- On a CPU with avx512f its 4-bit kernel looks for the scales of a row of the weight at row * (width // 64) (seen in
  0.50.2), where a width that is no multiple of 64 has blocks that go on from a row into the next: most of the weight
  then gets scales of other rows, in the forward and in the backward pass alike. `dense_weight` gives it whole blocks.
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
    """Transformers' quantisation config for 4 or 8 bits, computing in `dtype`. Embeddings and LM head stay as they
    are.

    Raises ExtraError when bitsandbytes is not installed.
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
    """Whether a module is a linear layer of bitsandbytes (not a LoRA layer around one)."""
    return width(linear) in KINDS


def width(module: Any) -> int:
    """4 or 8 for a linear layer of bitsandbytes, else 0. Loads nothing: without the package there is no such layer."""
    layers = getattr(sys.modules.get("bitsandbytes"), "nn", None)
    if layers is None:
        return 0
    return 4 if isinstance(module, layers.Linear4bit) else 8 if isinstance(module, layers.Linear8bitLt) else 0


def bits_of(model: Any) -> int:
    """4 or 8 if a layer of `model` is quantised so, else 0."""
    return max((width(module) for module in model.modules()), default=0)


def dense_weight(linear: Any, dtype: torch.dtype) -> torch.Tensor:
    """The (out, in) weight that a quantised layer stands for, dequantised straight into `dtype`, in new memory."""
    if width(linear) == 8:
        scale = _row_scales(linear).unsqueeze(1) * (1 / 127)
        dense = torch.empty(linear.weight.shape, dtype=dtype, device=linear.weight.device)
        return torch.mul(linear.weight.data, scale, out=dense)  # in fp32, rounded once
    state = linear.weight.quant_state
    scales = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    # a block a row, or all weights in one row if the last block is short: where rows begin, a block must begin as well
    blocks, rest = divmod(linear.in_features * linear.out_features, state.blocksize)
    shape = (1, linear.in_features * linear.out_features) if rest else (blocks, state.blocksize)
    # not `functional.dequantize_4bit`: that one rounds to the dtype that the weights once had
    dense = torch.ops.bitsandbytes.dequantize_4bit(
        linear.weight.data, scales.float(), state.blocksize, state.quant_type, shape, dtype
    )
    return dense.view(state.shape)


def _row_scales(linear: Any) -> torch.Tensor:
    """(out,) largest absolute value of each row; bitsandbytes moves it from the weight to the layer's state."""
    return linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB


def protect(model: Any) -> None:
    """Keep evaluation from changing what is trained: see the module's text. Call it right after opening."""
    for module in model.modules():
        if width(module) == 4:
            module.support_avx512bf16_for_cpu = False
        if width(module) == 8 or _blocks_straddle_rows(module):
            module.forward = MethodType(_dense_forward, module)


def _blocks_straddle_rows(module: Any) -> bool:
    """Whether a CPU might multiply with the wrong scales."""
    is_cpu = width(module) == 4 and module.weight.device.type == "cpu"
    return is_cpu and module.in_features % module.weight.quant_state.blocksize != 0


def narrow_embedding(model: Any) -> None:
    """Hold an fp32 embedding that the head does not share as the bf16 it was read from; what is looked up is fp32 as
    before.

    Beside 4-bit layers a vocabulary is much of the memory. Where the weights are no bf16 values, nothing is done.
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
    return output.float()


def _dense_forward(linear: Any, x: torch.Tensor) -> torch.Tensor:
    """(..., in) -> (..., out). What `protect` puts in the place of a layer's forward; the same in training and eval
    mode.
    """
    product = _DenseProduct.apply(x, linear)
    return product if linear.bias is None else product + linear.bias.to(product.dtype)


class _DenseProduct(torch.autograd.Function):  # type: ignore[misc]  # torch is read as Any
    """x W^T for a frozen W that is dequantised in both passes: kept between them, W would stand in memory dense."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: Any) -> torch.Tensor:
        ctx.linear = linear
        return F.linear(x, dense_weight(linear, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ dense_weight(ctx.linear, gradient.dtype), None


def linear_bytes(model: Any) -> int:
    """Bytes of the weights of a base's linear layers without its LM head: codes, scales, scales of scales, tables.

    Layers that are being trained (an adapter's) do not count.
    """
    head = model.get_output_embeddings()
    frozen = [part for part in model.modules() if isinstance(part, torch.nn.Linear) and not part.weight.requires_grad]
    linear = [part for part in frozen if part is not head]
    parts = {tensor.data_ptr(): tensor for module in linear for tensor in _parts(module)}
    return sum(tensor.numel() * tensor.element_size() for tensor in parts.values())


def _parts(linear: Any) -> Iterator[torch.Tensor]:
    """Every tensor that makes a linear layer's weight."""
    yield linear.weight.data
    if width(linear) == 8:
        yield _row_scales(linear)
    if width(linear) == 4:
        state = linear.weight.quant_state
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)
