"""The rows of the contract of tuning methods: each method with small options, and what holds of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers

import tiny
from sartor.core import config
from sartor.tune.methods.targets import Placement
from sartor.tune.recipe import Method, Recipe

IDS = torch.tensor([[5, 9, 100, 42, 7, 300, 12]])
FAMILIES = ("llama", "qwen2")


class MethodRow(NamedTuple):
    """A method of the contract.

    options: of the recipe. fresh: most that its fresh adapter may change of a logit. is_fast: whether the fast path
    computes it. stored: method by which its file is known.
    """

    options: dict[str, Any]
    fresh: float
    is_fast: bool
    stored: str

    @property
    def kind(self) -> str:
        """The method's name in a recipe."""
        return str(self.options["kind"])

    @property
    def method(self) -> Method:
        """The options as a recipe holds them."""
        return config.load(Recipe, {"base": "x", "data": "y", "method": self.options}).method


ROWS = {
    row.kind: row
    for row in (
        MethodRow({"kind": "lora", "rank": 4, "alpha": 8}, 0.0, True, "lora"),
        MethodRow({"kind": "rslora", "rank": 4, "alpha": 4}, 0.0, True, "rslora"),
        MethodRow({"kind": "dora", "rank": 4, "alpha": 8}, 1e-5, False, "dora"),
        MethodRow({"kind": "pissa", "rank": 4, "alpha": 4}, 1e-4, True, "lora"),
        MethodRow({"kind": "oft", "block_size": 8}, 0.0, False, "oft"),
        MethodRow({"kind": "miss", "rank": 4}, 0.0, False, "miss"),
        MethodRow({"kind": "ia3"}, 0.0, False, "ia3"),
        MethodRow({"kind": "full"}, 0.0, False, "full"),
    )
}


def base_of(family: str) -> Any:
    """A tiny frozen base: a Llama with a tied head, or a Qwen 2 with biases and a head of its own."""
    if family == "llama":
        return tiny.model().requires_grad_(False)
    torch.manual_seed(0)
    settings = transformers.Qwen2Config(
        vocab_size=tiny.SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return transformers.Qwen2ForCausalLM(settings).eval().requires_grad_(False)


def placed(method: Method, model: Any, seed: int = 0) -> Any:
    """The model with the method on it, in eval mode."""
    targets = method.targets
    return method.inject(model, Placement(targets.modules, targets.top, seed)).eval()


def trained(model: Any, steps: int = 3) -> Any:
    """The model after a few steps towards fixed tokens."""
    model.train()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """The logits of fixed tokens."""
    return model(input_ids=IDS).logits
