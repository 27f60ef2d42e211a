"""Adapters as GGUF files, and what llama.cpp calls and wants of each family's weights.

Format: github.com/ggml-org/ggml, docs/gguf.md; names of tensors are the `gguf` package's. llama.cpp rotates neighbouring
columns of a query or key in some families, where transformers rotates the halves of a head: there the rows of `q_proj` and
`k_proj`, and so of an adapter's B, are written in another order.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft.utils.other import get_pattern_key

from sartor.core.errors import ModelError
from sartor.core.filesystem import create_file_atomic
from sartor.models import adapters

# no digit of a fp32 or bf16 factor is lost, and llama.cpp computes with adapters of any float type
ADAPTER_TYPE = gguf.GGMLQuantizationType.F32
_PREFIX = "base_model.model."
_SIDES = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b"}


@dataclass(frozen=True)
class Family:
    """What llama.cpp knows a model type of transformers as. interleaved: it rotates neighbouring columns."""

    arch: gguf.MODEL_ARCH
    interleaved: bool

    @property
    def name(self) -> str:
        """`general.architecture`."""
        return gguf.MODEL_ARCH_NAMES[self.arch]


# model_type in config.json -> the family; mistral without its sliding window is a llama to llama.cpp
FAMILIES = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, interleaved=True),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2, interleaved=False),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3, interleaved=False),
}


class Layout:
    """Names and order of one base's weights in a GGUF file, from its config.json."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises ModelError for a family that is not in FAMILIES, or whose attention llama.cpp would compute otherwise."""
        kind = str(config.get("model_type", ""))
        if kind not in FAMILIES:
            raise ModelError(
                f"a base of the model type {kind!r} cannot be written as GGUF; {', '.join(sorted(FAMILIES))} can",
                "--to peft or --to merged",
            )
        self.family = FAMILIES[kind]
        self.config = config
        self.heads = int(config["num_attention_heads"])
        self.key_heads = int(config.get("num_key_value_heads") or self.heads)
        self.head_width = int(config.get("head_dim") or config["hidden_size"] // self.heads)
        self.layers = int(config["num_hidden_layers"])
        self._names = gguf.get_tensor_name_map(self.family.arch, self.layers)
        window, kinds = config.get("sliding_window"), set(config.get("layer_types") or ())
        if "sliding_attention" in kinds or (window and kind == "mistral"):
            raise ModelError(
                f"the base's attention has a window of {window} tokens, and llama.cpp's {self.family.name} has none",
                "--to peft or --to merged",
            )

    def name(self, parameter: str) -> str:
        """llama.cpp's name of a parameter (`model.layers.0.self_attn.q_proj.weight`). Raises ModelError where it has none."""
        found = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(
                f"llama.cpp's {self.family.name} has no place for {parameter}", "use a base without it, or --to merged"
            )
        return found

    def ordered(self, parameter: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A weight (out, in), bias (out) or factor B (out, R) with its rows as llama.cpp wants them.

        Raises ModelError where the rows of a query or key are not the base's heads.
        """
        heads = {"q_proj": self.heads, "k_proj": self.key_heads}.get(parameter.split(".")[-2])
        if heads is None:
            return value
        if len(value) != heads * self.head_width:
            raise ModelError(
                f"{parameter} has {len(value)} rows; this base has {heads} heads of {self.head_width}",
                "use the base that the adapter was tuned on",
            )
        if not self.family.interleaved:
            return value
        return np.ascontiguousarray(value.reshape(heads, 2, self.head_width // 2, -1).swapaxes(1, 2).reshape(value.shape))


def read_config(base: Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json in a base's directory, or the mapping itself. Raises ModelError where it cannot be read."""
    if isinstance(base, Mapping):
        return base
    try:
        found = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{base} has no readable config.json: {error}", "give the directory of the base") from None
    if not isinstance(found, dict):
        raise ModelError(f"{base / 'config.json'} is no mapping", "give the directory of the base")
    return found


def write_adapter_gguf(adapter: Path, base: Path | Mapping[str, Any], out: Path, *, template: str = "") -> Path:
    """Write the LoRA adapter in a PEFT directory as the GGUF file `out`, which llama.cpp loads onto that base.

    base: its directory in transformers' layout, or its config.json as a mapping. template: a chat template to travel with it.
    llama.cpp adds alpha / R * B A with one alpha for all; what another scale asks for is multiplied into B. `out` appears
    whole or not at all. Raises ModelError for what llama.cpp has no form for: DoRA, biases, whole modules, other families.
    """
    config = _adapter_config(adapter)
    layout = Layout(read_config(base))
    factors = _pairs(adapter, adapters.read_weights(adapter))
    scales = {module: _scale(config, module, len(a)) for module, (a, _) in factors.items()}
    first = next(iter(factors))
    alpha = scales[first] * len(factors[first][0])
    with new_file(out, layout.family.name) as writer:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        if template:
            writer.add_chat_template(template)
        for module, (a, b) in sorted(factors.items()):
            name = layout.name(f"{module}.weight")
            if name.startswith("token_embd") or (name.startswith("output.") and layout.config.get("tie_word_embeddings")):
                raise ModelError(f"the adapter changes {module}, which is the embedding", "leave it out of method.targets")
            left = scales[module] * len(a) / alpha
            b = layout.ordered(f"{module}.weight", b if left == 1 else b * np.float32(left))
            writer.add_tensor(f"{name}.lora_a", a, raw_dtype=ADAPTER_TYPE)
            writer.add_tensor(f"{name}.lora_b", b, raw_dtype=ADAPTER_TYPE)
    return out


@contextlib.contextmanager
def new_file(out: Path, architecture: str, *, streamed: bool = False) -> Iterator[gguf.GGUFWriter]:
    """A GGUF file to fill with metadata and tensors; it takes the name `out` when it is written whole.

    streamed: whoever fills it writes the parts of the file too, a tensor at a time.
    """
    with create_file_atomic(out) as part, contextlib.closing(gguf.GGUFWriter(part, architecture)) as writer:
        yield writer
        if not streamed:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()


def _adapter_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json, of which all must be LoRA that llama.cpp can add."""
    file = adapter / adapters.CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{file} is no adapter's config: {error}", "give the directory that `sartor tune` wrote") from None
    said = {
        f"peft_type {kind}": kind != "LORA",
        "use_dora": config.get("use_dora"),
        f"bias {config.get('bias')}": config.get("bias", "none") != "none",
        "modules_to_save": config.get("modules_to_save"),
        "fan_in_fan_out": config.get("fan_in_fan_out"),
        "lora_alpha 0": not config.get("lora_alpha"),
    }
    if unfit := [what for what, is_so in said.items() if is_so]:
        raise ModelError(f"llama.cpp has no form for this adapter: {', '.join(unfit)}", "--to merged, and make a GGUF of that")
    return dict(config)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What peft multiplies B A of a module with: alpha / R, or alpha / sqrt(R) (rsLoRA)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), module), config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pairs(adapter: Path, weights: Mapping[str, torch.Tensor]) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """module -> A (R, in) and B (out, R), fp32. Raises ModelError for a tensor that is neither, or has no other half."""
    found: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
    for key, tensor in weights.items():
        suffix = next((suffix for suffix in _SIDES if key.endswith(suffix)), "")
        if not suffix or not key.startswith(_PREFIX) or tensor.ndim != 2:
            raise ModelError(f"the adapter {adapter} holds {key}, which is no factor of LoRA", "tune it again, with kind: lora")
        module = key.removeprefix(_PREFIX).removesuffix(suffix)
        found.setdefault(module, {})[_SIDES[suffix]] = tensor.float().numpy()
    for module, pair in found.items():
        if len(pair) < 2 or len(pair["lora_a"]) != pair["lora_b"].shape[1]:
            raise ModelError(f"the factors A and B of {module} in {adapter} do not belong together", "tune it again")
    if not found:
        raise ModelError(f"the adapter {adapter} holds no factors", "tune it again")
    return {module: (pair["lora_a"], pair["lora_b"]) for module, pair in found.items()}
