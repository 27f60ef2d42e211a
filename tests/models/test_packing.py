"""A pack's losses and gradients are those of its examples one by one; a model for which they are not is found out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tiny
from sartor.models import packing
from sartor.models.losses import transformers_backend
from sartor.models.packing import BLOCKED_ATTENTION_TOKENS, TokenizedExample

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
HEADS = {
    **SMALL,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
GPT2 = {
    "vocab_size": 320,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 2048,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
# architecture -> what its config needs. All of their attention goes through transformers' AttentionInterface or its masks.
EXACT: dict[str, dict[str, Any]] = {
    "Llama": HEADS,
    "Llama, a query head per key head": {**HEADS, "num_key_value_heads": 4},
    "Llama, one key head": {**HEADS, "num_key_value_heads": 1},
    "Mistral": {**HEADS, "sliding_window": 8},
    "Gemma2": {**HEADS, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "Gemma3Text": {**HEADS, "head_dim": 8, "sliding_window": 8},
    "Qwen2": {**HEADS, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "Qwen3": {**HEADS, "head_dim": 16},
    "Phi3": HEADS,
    "GPT2": GPT2,
    "Mixtral": {**HEADS, "num_local_experts": 2},
    "DeepseekV3": {**HEADS, **MLA, **EXPERTS, "num_key_value_heads": 4, "first_k_dense_replace": 1},
}
# with state or positions outside attention: convolutions, recurrences, ALiBi without position ids
LEAKY: dict[str, dict[str, Any]] = {
    "Mamba": {**SMALL, "state_size": 4},
    "Mamba2": {**SMALL, "num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 1},
    "RecurrentGemma": {**HEADS, "lru_width": 32, "attention_window_size": 64},
    "Lfm2": {**HEADS, "layer_types": ["conv", "full_attention"]},
    "Bloom": {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": 320, "d_model": 32, "n_heads": 4, "n_layers": 2},
}


# exact for short rows, or not at all
OTHER: dict[str, dict[str, Any]] = {
    "GptOss": {
        **HEADS,
        "head_dim": 8,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "Llama4Text": {
        **HEADS,
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 64,
    },
}
# 0.1 where transformers draws weights with 0.02: as sharp as a trained model, so that what differs shows in the losses
SPREAD = 0.1


@cache
def model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A seeded model of an architecture. Shared: a test leaves it as it was."""
    torch.manual_seed(0)
    config = getattr(transformers, name.split(",")[0] + "Config")(**{**EXACT, **LEAKY, **OTHER}[name])
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(SPREAD / 0.02)
    return made.to(dtype)


def rows(*lengths: int, seed: int = 0) -> list[TokenizedExample]:
    """Random rows; about two in three of their tokens are learnt, always the last."""
    draw = random.Random(seed)
    return [
        TokenizedExample(
            [draw.randrange(3, 320) for _ in range(length)],
            [draw.random() < 0.66 for _ in range(length - 1)] + [True],
            str(number),
        )
        for number, length in enumerate(lengths)
    ]


def random_lengths(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.choice([1, 2, 3, draw.randrange(4, 90)]) for _ in range(draw.randrange(2, 9))] + [
        draw.randrange(2, 40)
    ]


def packed_losses(model: Any, examples: Sequence[TokenizedExample]) -> torch.Tensor:
    with transformers_backend.packing(model):
        return transformers_backend.pack_losses(model, packing.pack(examples))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_packed_losses_equal_those_of_the_rows_one_by_one(name: str, seed: int) -> None:
    made, examples = model(name), rows(*random_lengths(seed), seed=seed)
    difference = packed_losses(made, examples) - transformers_backend.row_losses(made, examples, "cpu")
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "Qwen2"])
@torch.no_grad()
def test_row_longer_than_blocked_attention_packs_exactly(name: str) -> None:
    """Rows at and above the limit of the blocked kernel, between short ones."""
    made, examples = model(name), rows(5, BLOCKED_ATTENTION_TOKENS + 70, 30, BLOCKED_ATTENTION_TOKENS, 1)
    difference = packed_losses(made, examples) - transformers_backend.row_losses(made, examples, "cpu")
    assert difference.abs().max() < 1e-5


def gradients(made: Any, losses: torch.Tensor) -> torch.Tensor:
    made.zero_grad()
    losses.mean().backward()
    return torch.cat([parameter.grad.flatten() for parameter in made.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("lengths", [(7, 3, 40, 12, 1, 25), (BLOCKED_ATTENTION_TOKENS + 10, 9)], ids=str)
@pytest.mark.parametrize(
    ("name", "tolerance"),
    # Gemma 2's own attention takes its softmax in fp32 whatever the dtype
    [("Llama", 1e-9), ("Qwen2", 1e-9), ("Gemma2", 1e-6)],
    ids=["Llama", "Qwen2", "Gemma2"],
)
def test_packed_gradients_equal_those_of_the_rows_one_by_one(
    name: str, tolerance: float, lengths: tuple[int, ...]
) -> None:
    made, examples = model(name, torch.float64), rows(*lengths)
    packed = gradients(made, packed_losses(made, examples))
    plain = gradients(made, transformers_backend.row_losses(made, examples, "cpu"))
    assert len(packed) == len(plain) == sum(parameter.numel() for parameter in made.parameters())
    assert (packed - plain).norm() <= tolerance * plain.norm()


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_other_rows_of_a_pack_change_not_one_bit(name: str) -> None:
    made, (first, second, third) = model(name), rows(17, 9, 30)
    other = TokenizedExample([token ^ 1 for token in first.ids], first.learnt)
    one, two = packed_losses(made, [first, second, third]), packed_losses(made, [other, second, third])
    own = first.supervised_tokens
    assert torch.equal(one[own:], two[own:])
    assert not torch.equal(one[:own], two[:own])


@torch.no_grad()
def test_only_supervised_rows_reach_the_lm_head() -> None:
    made, seen = tiny.model(), []
    examples = [*rows(20, 30), TokenizedExample([5] * 40, [False] * 39 + [True])]
    made.lm_head.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    losses = packed_losses(made, examples)
    supervised = sum(example.supervised_tokens for example in examples)
    assert [shape[-2] for shape in seen] == [supervised] == [len(losses)]


def test_a_token_is_predicted_from_its_own_row_alone() -> None:
    pack = packing.pack(
        [
            TokenizedExample([7, 8, 9], [True, False, True], "a", 2.0),
            TokenizedExample([4], [True], "b"),
            TokenizedExample([5, 6], [True, True], "c"),
        ]
    )
    assert pack.ids.tolist() == [[7, 8, 9, 4, 5, 6]]
    assert pack.positions.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert (pack.predict.tolist(), pack.targets.tolist(), pack.weights.tolist()) == ([1, 4], [9, 6], [2.0, 1.0])
    assert (pack.tokens, pack.supervised_tokens, pack.example_ids) == (6, 2, ("a", "b", "c"))


@given(st.lists(st.integers(1, 700), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_attention_groups_hold_each_token_once(lengths: list[int]) -> None:
    """With padding there are at most twice as many queries as tokens."""
    groups = packing.pack([TokenizedExample([0] * length, [True] * length) for length in lengths]).rows
    assert sorted(place for group in groups for place in group.into.tolist()) == list(range(sum(lengths)))
    assert sum(group.queries.numel() for group in groups) < 2 * sum(lengths) + 1
    for group in groups:
        assert torch.equal(group.queries.flatten()[group.scatter], group.into)


@given(st.data(), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_fill_takes_every_row_once_in_order_within_capacity(data: st.DataObject, capacity: int) -> None:
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=40))
    groups = packing.group_by_capacity(lengths, capacity)
    assert [index for group in groups for index in group] == list(range(len(lengths)))
    assert all(group and sum(lengths[index] for index in group) <= capacity for group in groups)
    # no group is cut short: its follower's first row had no room in it
    assert all(
        sum(lengths[index] for index in group) + lengths[after[0]] > capacity
        for group, after in zip(groups, groups[1:], strict=False)
    )


def test_packing_puts_the_attention_back_also_after_an_error() -> None:
    made = tiny.model()
    before = made.config._attn_implementation
    with pytest.raises(ZeroDivisionError), transformers_backend.packing(made):
        assert made.config._attn_implementation == "sartor_packed"
        _ = 1 / 0
    assert made.config._attn_implementation == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_a_model_that_packs_exactly_is_said_to(name: str, dtype: torch.dtype) -> None:
    exact, difference = transformers_backend.packs_exactly(model(name, dtype), rows(40, 7, 25), "cpu")
    assert exact, difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LEAKY)
def test_a_model_that_leaks_between_rows_is_found_out(name: str, dtype: torch.dtype) -> None:
    exact, difference = transformers_backend.packs_exactly(model(name, dtype), rows(40, 7, 25), "cpu")
    assert not exact
    assert difference > 0


def test_model_with_unknown_attention_sinks_is_not_packed() -> None:
    """GPT-OSS has attention sinks, which packing does not compute."""
    assert not transformers_backend.packs_exactly(model("GptOss"), rows(40, 7, 25), "cpu")[0]


def test_a_difference_that_only_long_rows_show_is_found_out() -> None:
    """Llama 4 attends within chunks, which its mask says and its attention function is not told."""
    assert not transformers_backend.packs_exactly(model("Llama4Text"), [*rows(40, 7, 25), *rows(200)], "cpu")[0]


@pytest.mark.parametrize("unsupervised", [2, 3])
def test_a_leak_is_found_out_behind_rows_that_teach_nothing(unsupervised: int) -> None:
    idle = [TokenizedExample([5, 6, 7], [False] * 3)] * unsupervised
    examples = [*rows(30)[: 3 - unsupervised], *idle, *rows(40, 25, seed=1)]
    assert not transformers_backend.packs_exactly(model("Mamba"), examples, "cpu")[0]


class Stubborn(nn.Module):
    """A module whose own forward takes none of packing's arguments, or fails in a way of its own."""

    def __init__(self, error: type[Exception] | None) -> None:
        super().__init__()
        self.inner, self.error = tiny.model(), error

    @property
    def config(self) -> Any:
        return self.inner.config

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def set_attn_implementation(self, name: str) -> None:
        self.inner.set_attn_implementation(name)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, **more: Any) -> Any:
        if more and self.error:
            raise self.error("rows")
        return self.inner(input_ids=input_ids, use_cache=use_cache)


@pytest.mark.parametrize(
    "error",
    [TypeError, ValueError, KeyError, RuntimeError, NotImplementedError, AttributeError, IndexError, AssertionError],
)
def test_a_model_that_fails_when_packed_is_left_unpacked(error: type[Exception]) -> None:
    made = Stubborn(error)
    assert transformers_backend.packs_exactly(made, rows(12, 8), "cpu") == (False, float("inf"))
    assert made.config._attn_implementation == "sdpa"


def test_a_model_that_ignores_the_rows_is_left_unpacked() -> None:
    assert not transformers_backend.packs_exactly(Stubborn(None), rows(12, 8), "cpu")[0]
