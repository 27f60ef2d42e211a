"""A tiny model with LoRA of each family that the fast path knows, and packed rows for it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from sartor.models import adapters
from sartor.models.losses import loss_backend, transformers_backend
from sartor.models.losses.loss_backend import LossOptions
from sartor.models.packing import TokenizedExample

V = 97

SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# model_type -> class, and what makes its peculiarities show at this size
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {}),
    "gemma2": (
        "Gemma2",
        {
            "sliding_window": 6,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3_text": ("Gemma3", {"sliding_window": 6, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", {"sliding_window": 9}),
}


def exact_norms(module: torch.nn.Module) -> None:
    """Transformers' norms compute in fp32 even in an fp64 model; a proof to 1e-10 needs them in fp64."""
    for part in module.modules():
        if type(part).__name__.endswith("RMSNorm"):
            offset = 1.0 if "Gemma" in type(part).__name__ else 0.0
            eps = getattr(part, "variance_epsilon", None) or part.eps
            part.forward = lambda x, p=part, o=offset, e=eps: (
                x * torch.rsqrt(x.square().mean(-1, keepdim=True) + e) * (o + p.weight)
            )


def tuned(kind: str, dtype: torch.dtype = torch.float64, top: int | None = None, **changes: Any) -> Any:
    """A tiny model of the kind with LoRA whose B is not 0."""
    name, extra = MODELS[kind]
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    model = (
        getattr(transformers, f"{name}ForCausalLM")(config(**{**SHAPE, **extra, **changes}))
        .to(dtype)
        .requires_grad_(False)
    )
    for part, weight in model.named_parameters():
        if "norm" in part or part.endswith("bias"):
            weight.add_(torch.randn_like(weight) * 0.1)
    made = adapters.inject_lora(
        model, rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=0, top_layers=top
    ).eval()
    for part, weight in made.named_parameters():
        if "lora" in part:
            weight.data = weight.data.to(torch.float64 if dtype == torch.float64 else torch.float32)
            if "lora_B" in part:
                weight.data.normal_(std=0.1)
    if dtype == torch.float64:
        exact_norms(made)
    return made


def rows(*lengths: int, head: int = 0, seed: int = 0) -> list[TokenizedExample]:
    """Rows of so many tokens, about half supervised; the first `head` tokens are common to all that are longer."""
    rng = random.Random(seed)
    common = [rng.randrange(V) for _ in range(head)]
    made = []
    for place, length in enumerate(lengths):
        ids = (common + [rng.randrange(V) for _ in range(length)])[:length]
        learnt = [rng.random() < 0.5 for _ in ids]
        learnt[-1] = True
        made.append(TokenizedExample(ids, learnt, str(place), weight=rng.choice([0.5, 1.0, 2.0])))
    return made


def fast_path(model: Any, examples: Sequence[TokenizedExample], **wish: Any) -> loss_backend.FusedBackend:
    path = transformers_backend.choose_loss_backend(
        model, examples, torch.device("cpu"), LossOptions(identity="base", **wish)
    )
    assert isinstance(path, loss_backend.FusedBackend), path.reason
    return path
