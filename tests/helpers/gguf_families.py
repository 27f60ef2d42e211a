"""A tiny model of each family that is written as GGUF."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tiny

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def built(kind: type, config: type, **changes: Any) -> Any:
    """A model with random weights, biases too (transformers starts those at zero)."""
    torch.manual_seed(3)
    model = kind(config(**{**SMALL, **changes})).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value, std=0.3)
    return model


FAMILIES = {
    "llama": lambda: tiny.model().requires_grad_(False),
    "llama, its own head": lambda: tiny.model(tie_word_embeddings=False, head_dim=16).requires_grad_(False),
    "llama 3": lambda: tiny.model(rope_parameters=LLAMA3).requires_grad_(False),
    "llama, stretched": lambda: tiny.model(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    ).requires_grad_(False),
    "mistral": lambda: built(MistralForCausalLM, MistralConfig, sliding_window=None, tie_word_embeddings=False),
    "qwen2": lambda: built(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True),
    "qwen3": lambda: built(Qwen3ForCausalLM, Qwen3Config, tie_word_embeddings=False, head_dim=16),
}
