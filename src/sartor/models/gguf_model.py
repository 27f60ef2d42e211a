"""A model as a GGUF file that llama.cpp runs: weights by its names and in its order, and what it must know of them.

Sources of the format: github.com/ggml-org/ggml, docs/gguf.md; of the keys, the `gguf` package; of Llama 3's stretched
rotations (`rope_freqs.weight`), llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from sartor.core.errors import ConfigError, ModelError
from sartor.models.gguf_out import Layout, new_file
from sartor.models.gguf_tokens import Vocabulary

Type = gguf.GGMLQuantizationType
# what `--quantise` names -> the type of matrices, and what the file says of itself
TYPES = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Type.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Type.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
# every token passes through the embedding and the head, so fewer bits there cost most; published files keep them wider too
_WIDE, _ENDS = Type.Q8_0, ("token_embd.weight", "output.weight")
_LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class About:
    """What the file says of itself beside its weights: `general.*` keys, the chat template, how replies are drawn."""

    name: str
    version: str
    licence: str
    template: str
    temperature: float = 0.0
    top_p: float = 1.0


def write_model_gguf(model: Any, vocabulary: Vocabulary, about: About, out: Path, kind: str = "f16") -> Path:
    """Write transformers' module `model` (in fp32, no adapter on it) as the GGUF file `out`, its matrices as `kind` (TYPES).

    `out` appears whole or not at all. Raises ModelError for a model that llama.cpp would compute otherwise, or values that the
    type cannot hold, ConfigError for an unknown type.
    """
    if kind not in TYPES:
        raise ConfigError(f"there is no type {kind!r} of GGUF weights; there are {', '.join(TYPES)}", "--quantise q8_0")
    config = model.config.to_dict()
    layout = Layout(config)
    weights = {layout.name(name): (name, value) for name, value in _parameters(model, config)}
    stretched = _rope(config, layout)
    with new_file(out, layout.family.name, streamed=True) as writer:
        _say(writer, config, layout, about)
        writer.add_file_type(TYPES[kind][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        vocabulary.write(writer, about.template)
        if stretched is not None:
            writer.add_tensor_info("rope_freqs.weight", stretched.shape, stretched.dtype, stretched.nbytes)
        kinds = {name: _stored_as(name, value, TYPES[kind][0]) for name, (_, value) in weights.items()}
        for name, (_, value) in weights.items():
            shape = gguf.quant_shape_to_byte_shape(tuple(value.shape), kinds[name])
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if stretched is not None:
            writer.write_tensor_data(stretched)
        for name, (parameter, value) in weights.items():
            # a tensor at a time: the file is never in memory beside the model
            ordered = layout.ordered(parameter, value.detach().float().cpu().numpy())
            writer.write_tensor_data(_packed(name, ordered, kinds[name]))
    return out


def _parameters(model: Any, config: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Names and weights, without a head that is the embedding again."""
    tied = bool(config.get("tie_word_embeddings"))
    return [(name, value) for name, value in model.state_dict().items() if not (tied and name == "lm_head.weight")]


def _stored_as(name: str, value: torch.Tensor, kind: Type) -> Type:
    """How one weight is stored: vectors in fp32; the ends of the model wider than 8 bits; rows that fill no block in F16."""
    if value.ndim < 2:
        return Type.F32
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if block > 1 and name in _ENDS and size < gguf.GGML_QUANT_SIZES[_WIDE][1]:
        kind = _WIDE
    return Type.F16 if value.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _packed(name: str, value: np.ndarray[Any, Any], kind: Type) -> np.ndarray[Any, Any]:
    largest = float(np.abs(value).max(initial=0))
    if not math.isfinite(largest):
        raise ModelError(f"the merged weights are not finite, in {name}", "tune again")
    if kind == Type.F16 and largest > _LARGEST_F16:
        raise ModelError(f"{name} holds {largest:.3g}, and F16 ends at {_LARGEST_F16:g}", "--quantise bf16")
    packed: np.ndarray[Any, Any] = gguf.quants.quantize(np.ascontiguousarray(value), kind)
    return packed


def _say(writer: gguf.GGUFWriter, config: Mapping[str, Any], layout: Layout, about: About) -> None:
    """The metadata that llama.cpp computes by."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(about.name)
    writer.add_version(about.version)
    writer.add_license(about.licence)
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(layout.layers)
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(layout.heads)
    writer.add_head_count_kv(layout.key_heads)
    writer.add_key_length(layout.head_width)
    writer.add_value_length(layout.head_width)
    writer.add_rope_dimension_count(layout.head_width)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    rotation = rope_of(config)
    writer.add_rope_freq_base(float(rotation.get("rope_theta", 10000.0)))
    if rotation.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotation["factor"]))
    # newer llama.cpp takes these for its defaults: greedy where the Release is greedy
    writer.add_float32("general.sampling.temp", about.temperature)
    writer.add_float32("general.sampling.top_p", about.top_p)


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions rotate: transformers 5 says it in `rope_parameters`, older configs in `rope_theta` and `rope_scaling`."""
    old = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") else {}
    found = {**old, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return {**found, "rope_type": found.get("rope_type") or found.get("type") or "default"}


def _rope(config: Mapping[str, Any], layout: Layout) -> np.ndarray[Any, Any] | None:
    """What each frequency is divided by, (head_width / 2), where Llama 3 stretches them; else None.

    Raises ModelError for a kind that is written no other way here, and for activations that llama.cpp does not use.
    """
    rotation = rope_of(config)
    kind, part = rotation["rope_type"], float(rotation.get("partial_rotary_factor") or 1)
    if kind not in ("default", "linear", "llama3") or part != 1 or config.get("hidden_act", "silu") != "silu":
        raise ModelError(
            f"the base rotates {part:.0%} of a head by {kind!r} and its activation is {config.get('hidden_act')}; written as "
            "GGUF are default, linear and llama3, over the whole head, and silu",
            "--to peft or --to merged",
        )
    if kind != "llama3":
        return None
    half = np.arange(0, layout.head_width, 2, dtype=np.float64) / layout.head_width
    waves = 2 * np.pi * float(rotation["rope_theta"]) ** half
    old, factor = float(rotation["original_max_position_embeddings"]), float(rotation["factor"])
    low, high = float(rotation["low_freq_factor"]), float(rotation["high_freq_factor"])
    smooth = np.clip((old / waves - low) / (high - low), 0, 1)  # 0: stretched whole, 1: left alone
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
