"""LoRA adapters with random factors in PEFT's directory layout, written without a model: only shapes matter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """module -> (out, in) of a Llama's linear layers."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or width // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    block = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    return {
        f"model.layers.{layer}.{name}": shape
        for layer in range(config["num_hidden_layers"])
        for name, shape in block.items()
    }


def write_lora(path: Path, config: Mapping[str, Any], *, rank: int = 16, seed: int = 0, size: float = 1.0) -> Path:
    """An all-linear adapter, alpha twice the rank. size: how far it moves what a layer says, 1 for about as far as the layer itself."""
    source = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, inner) in shapes(config).items():
        name = f"base_model.model.{module}.lora"
        tensors[f"{name}_A.weight"] = torch.randn(rank, inner, generator=source) / inner**0.5
        tensors[f"{name}_B.weight"] = torch.randn(out, rank, generator=source) * (size / (2 * rank**0.5))
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({module.rpartition(".")[2] for module in shapes(config)})
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "base_model_name_or_path": "starter",
    }
    (path / "adapter_config.json").write_text(json.dumps(said))
    return path
