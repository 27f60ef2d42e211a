"""Replies are the model's own: greedy ones equal transformers', and no reply depends on who shared its batch."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from sartor.core.errors import ConfigError, ModelError
from sartor.inference.engine import Sampling
from sartor.inference.generate import Chooser, Generation, generate, sampling_probabilities
from sartor.models.adapters import inject_lora

SHAPE = {
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
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
}
NEVER = 319  # a stop that the texts below are checked not to hold


@cache
def model(name: str = "Llama") -> Any:
    """Seeded, fp64, and sharp enough that its replies wander.

    Gemma 2 in fp32: transformers' eager attention takes its softmax in fp32, where fp64's lowest number is -inf.
    """
    torch.manual_seed(0)
    own = ARCHITECTURES[name]
    config = getattr(transformers, f"{name}Config")(
        **({"vocab_size": 320, **own} if name == "GPT2" else {**SHAPE, **own})
    )
    made = (
        transformers.AutoModelForCausalLM.from_config(config)
        .eval()
        .to(torch.float32 if name == "Gemma2" else torch.float64)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return made


@pytest.fixture(scope="module")
def llama() -> Any:
    return model()


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 319) for _ in range(length)] for length in lengths]


LENGTHS = (9, 1, 30, 4, 17, 12)


def reply(
    made: Any, asked: Sequence[Sequence[int]], *, stop: Sequence[int] = (NEVER,), **more: Any
) -> list[Generation]:
    rows = {"batch_rows": more.pop("batch_rows")} if "batch_rows" in more else {}
    return generate(made, asked, stop=stop, pad=0, sampling=Sampling(**{"max_tokens": 16, **more}), **rows)


def transformers_reply(made: Any, prompt: Sequence[int], stop: Sequence[int], max_tokens: int = 16) -> list[int]:
    ids = torch.tensor([list(prompt)])
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_tokens, eos_token_id=list(stop), pad_token_id=0, bos_token_id=0
    )
    out = made.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    said = out[0, len(prompt) :].tolist()
    return said[:-1] if said[-1] in stop else said


def often(made: Any) -> list[int]:
    """Two tokens that greedy replies hold somewhere in the middle: as stops they end rows at different times."""
    replies = [one.ids for one in reply(made, prompts(*LENGTHS))]
    return [replies[0][5], replies[2][9]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_replies_are_those_of_transformers(name: str) -> None:
    made, asked = model(name), prompts(*LENGTHS)
    stop = often(made)
    replies = reply(made, asked, stop=stop)
    assert [one.ids for one in replies] == [transformers_reply(made, prompt, stop) for prompt in asked]
    assert len({one.finish for one in replies}) == 2, "the case must hold rows that leave early and rows that do not"


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch_rows", [1, 4, 6])
def test_who_shares_a_batch_changes_no_reply(llama: Any, batch_rows: int, temperature: float) -> None:
    asked, stop = prompts(*LENGTHS), often(llama)
    whole = reply(llama, asked, stop=stop, temperature=temperature, seed=4)
    assert reply(llama, asked, stop=stop, temperature=temperature, seed=4, batch_rows=batch_rows) == whole


def test_rows_that_leave_early_do_not_disturb_the_others(llama: Any) -> None:
    asked = prompts(*LENGTHS)
    whole = [one.ids for one in reply(llama, asked)]
    for stop in sorted({token for ids in whole for token in ids})[::4]:
        cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in whole]
        assert [one.ids for one in reply(llama, asked, stop=[stop])] == cut


def test_a_reply_ends_before_its_stop_token_and_says_why(llama: Any) -> None:
    asked = prompts(11)
    whole = reply(llama, asked)[0]
    assert (len(whole.ids), whole.finish) == (16, "length")
    stop = next(token for place, token in enumerate(whole.ids) if place > 2 and token not in whole.ids[:place])
    assert reply(llama, asked, stop=[stop]) == [Generation(whole.ids[: whole.ids.index(stop)], "stop")]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_reply_knows_how_likely_its_tokens_were(llama: Any, temperature: float) -> None:
    asked = prompts(*LENGTHS)
    for prompt, said in zip(asked, reply(llama, asked, temperature=temperature), strict=True):
        logits = llama(input_ids=torch.tensor([[*prompt, *said.ids]])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.log_softmax(-1)[range(len(said.ids)), said.ids]
        assert said.logprobs == pytest.approx(wanted.tolist(), abs=1e-4) and said.ids


def test_a_stop_at_once_is_an_empty_reply(llama: Any) -> None:
    asked = prompts(11, 5)
    first = [one.ids[0] for one in reply(llama, asked)]
    assert reply(llama, asked, stop=first) == [Generation([], "stop")] * 2


def test_a_stop_on_the_last_allowed_token_counts_as_a_stop(llama: Any) -> None:
    whole = reply(llama, prompts(11))[0].ids
    last = next(place for place, token in enumerate(whole) if place > 1 and token not in whole[:place])
    made = reply(llama, prompts(11), stop=[whole[last]], max_tokens=last + 1)
    assert made == [Generation(whole[:last], "stop")]


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_a_reply_holds_at_most_max_tokens(llama: Any, max_tokens: int) -> None:
    whole = [one.ids for one in reply(llama, prompts(*LENGTHS))]
    assert reply(llama, prompts(*LENGTHS), max_tokens=max_tokens) == [
        Generation(ids[:max_tokens], "length") for ids in whole
    ]


def test_sampling_is_the_same_for_a_seed_and_another_for_another(llama: Any) -> None:
    asked = prompts(*LENGTHS)
    first = reply(llama, asked, temperature=1.5, seed=1)
    assert reply(llama, asked, temperature=1.5, seed=1) == first
    assert reply(llama, asked, temperature=1.5, seed=2) != first


def test_equal_prompts_draw_replies_of_their_own(llama: Any) -> None:
    replies = reply(llama, prompts(6) * 5, temperature=2.0, seed=1)
    assert len({tuple(one.ids) for one in replies}) == 5


def test_sampling_touches_no_global_seed(llama: Any) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    reply(llama, prompts(6), temperature=1.0)
    assert torch.equal(torch.rand(1), wanted)


def test_a_temperature_of_zero_ignores_seed_and_top_p(llama: Any) -> None:
    asked = prompts(*LENGTHS)
    assert reply(llama, asked, seed=9, top_p=0.3) == reply(llama, asked)


@pytest.mark.parametrize("settings", [{"top_p": 1e-9}, {"temperature": 1e-4}], ids=str)
def test_the_narrowest_sampling_is_greedy(llama: Any, settings: dict[str, float]) -> None:
    asked = prompts(*LENGTHS)
    assert reply(llama, asked, **{"temperature": 1.0, "seed": 5, **settings}) == reply(llama, asked)


@given(st.lists(st.floats(-6, 6), min_size=2, max_size=12), st.floats(0.01, 1), st.floats(0.2, 3))
@settings(max_examples=60, deadline=None)
def test_a_sampled_token_lies_in_the_smallest_likely_set(
    logits: list[float], top_p: float, temperature: float
) -> None:
    probabilities = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(-1).tolist()
    choose = Chooser(Sampling(temperature=temperature, top_p=top_p), 20)
    for token in choose(torch.tensor([logits] * 20), range(20)):
        likelier = sum(other for other in probabilities if other > probabilities[token] + 1e-6)
        assert likelier < top_p + 1e-6


@pytest.mark.parametrize(
    "logits", [[3.0, 1.0, -2.0], [300.0, 299.0, float("-inf")], [-1e4, -2e4, -3e4], [0.0, 0.0, 0.0]]
)
@pytest.mark.parametrize(
    ("temperature", "top_p"), [(5e-324, 1.0), (1e-40, 0.5), (2.0, 5e-324), (5e-324, 5e-324), (1e-7, 1e-300)]
)
def test_smallest_sampling_parameters_leave_a_token_to_draw(
    logits: list[float], temperature: float, top_p: float
) -> None:
    """With the smallest temperature and top_p probabilities stay finite."""
    found = sampling_probabilities(torch.tensor([logits]), Sampling(temperature=temperature, top_p=top_p))
    assert found.isfinite().all() and found[0, 0] > 0
    assert logits[int(torch.multinomial(found[0], 1))] == max(logits)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    choose = Chooser(Sampling(temperature=2.0), 4000)
    drawn = choose(logits.expand(4000, -1), range(4000))
    found = torch.tensor(drawn).bincount(minlength=4) / 4000
    # four standard errors of a share of one half
    assert (found - (logits / 2).softmax(-1)).abs().max() < 4 * 0.5 / 4000**0.5


def test_replies_keep_prompt_order_and_progress_counts_them(llama: Any) -> None:
    asked, told = prompts(*LENGTHS), []
    replies = generate(llama, asked, stop=[NEVER], pad=0, sampling=Sampling(4), batch_rows=4, progress=told.append)
    assert [one.ids for one in replies] == [transformers_reply(llama, prompt, [NEVER], 4) for prompt in asked]
    assert told == [4, 2]


def test_no_prompts_give_no_replies(llama: Any) -> None:
    assert reply(llama, []) == []


def test_prompt_and_reply_beyond_the_context_are_refused(llama: Any) -> None:
    """The remedy names the largest reply that fits, and it does fit."""
    with pytest.raises(ModelError) as caught:
        reply(llama, prompts(3, 500), max_tokens=16)
    assert caught.value.problem == "a prompt of 500 tokens and a reply of 16 need 516 positions; the model has 512"
    assert caught.value.remedy == "shorten the prompt, or ask for at most 12 tokens"
    assert len(reply(llama, prompts(500), max_tokens=12)[0].ids) == 12
    with pytest.raises(ModelError) as caught:
        reply(llama, prompts(515), max_tokens=16)
    assert caught.value.remedy == "shorten the prompt by 4 tokens or more, which leaves room for a reply"
    assert len(reply(llama, prompts(515 - 4), max_tokens=1)[0].ids) == 1


def test_a_fresh_adapter_replies_as_its_base() -> None:
    asked = prompts(*LENGTHS)
    plain = reply(tiny.model(), asked)
    tuned = inject_lora(tiny.model(), rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=0).eval()
    assert reply(tuned, asked) == plain


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_tokens", 0), ("temperature", -1.0), ("top_p", 2.0), ("frequency_penalty", 3.0), ("presence_penalty", -3.0)],
)
def test_a_wrong_setting_of_sampling_is_the_one_that_is_mended(option: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        Sampling(**{option: value})
    assert re.findall(r"(\w+):", refused.value.remedy) == [option]
