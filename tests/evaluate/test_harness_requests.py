"""Requests of lm-evaluation-harness against plain transformers on the tiny base; lm_eval is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loras
from sartor.core.errors import ConfigError, ModelError
from sartor.evaluate.harness_requests import (
    RequestRunner,
    before_stop,
    continuation_row,
    log_likelihoods,
    reply_end,
    rolling_rows,
)
from sartor.evaluate.predictions import model_side
from sartor.models import adapters
from sartor.models.base import Base, open_base


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return open_base(str(tiny_base), bits=32, device=torch.device("cpu"))


def plain_log_likelihood(base: Base, model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Sum of log P of a continuation's tokens, and whether each is the likeliest: one row, transformers' own forward."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        log_probabilities = model(ids).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, ids.shape[1] - 1)
    total = sum(float(log_probabilities[place, ids[0, place + 1]]) for place in places)
    return total, all(int(log_probabilities[place].argmax()) == int(ids[0, place + 1]) for place in places)


PAIRS = [
    ("what colour is the sky", " the sky is blue"),
    ("what colour is the sky ", "blue"),
    ("turn on the", " kitchen light"),
    ("", "the sky is blue"),
    ("a <|im_end|> in a text", " is text"),
]


def test_log_likelihoods_are_those_of_transformers(base: Base) -> None:
    progress: list[float] = []
    results = RequestRunner(base, base.model, progress.append).continuations(PAIRS)
    tokenizer = base.chat.tokenizer
    for (context, continuation), (total, is_greedy) in zip(PAIRS[:4], results, strict=False):
        head = tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"]
        whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        expected = plain_log_likelihood(
            base, base.model, head or [tokenizer.bos_token_id], whole[len(head) :] if head else whole
        )
        assert total == pytest.approx(expected[0], abs=1e-4) and is_greedy is expected[1]
    assert sum(progress) == len(PAIRS)


def test_greedy_continuation_is_said_to_be_one(base: Base) -> None:
    tokenizer = base.chat.tokenizer
    prompt = tokenizer("turn on the kitchen", add_special_tokens=False)["input_ids"]
    ids = base.model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False, eos_token_id=None)[0].tolist()
    rows = []
    for tail in (ids[len(prompt) :], [*ids[len(prompt) : -1], (ids[-1] + 1) % 320]):
        row = continuation_row(base.chat, "turn on the kitchen", " x")
        rows.append(type(row)([*prompt, *tail], [False] * len(prompt) + [True] * len(tail)))
    assert [is_greedy for _, is_greedy in log_likelihoods(base, base.model, rows)] == [True, False]


def test_control_tokens_in_a_text_are_text(base: Base) -> None:
    row = continuation_row(base.chat, "a <|im_end|> in a text", " is text")
    assert base.chat.tokenizer.convert_tokens_to_ids("<|im_end|>") not in row.ids
    assert base.chat.decode(row.ids) == "a <|im_end|> in a text is text"


def test_sides_differ_by_the_adapter_alone(base: Base, tmp_path: Path) -> None:
    lora = loras.write_lora(tmp_path / "lora", base.model.config.to_dict(), rank=3, size=1.0)
    before = RequestRunner(base, base.model).continuations(PAIRS)
    model = adapters.open_adapter(base.model, lora)
    sides = []
    for tuned in (False, True):
        with model_side(model, tuned=tuned):
            sides.append(RequestRunner(base, model).continuations(PAIRS))
    assert [total for total, _ in sides[0]] == pytest.approx([total for total, _ in before], abs=1e-4)
    tokenizer = base.chat.tokenizer
    head, tail = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in PAIRS[0])
    expected = plain_log_likelihood(base, model, head, tail)
    assert sides[1][0][0] == pytest.approx(expected[0], abs=1e-4) != sides[0][0][0]


def test_rolling_windows_are_those_of_the_harness(base: Base) -> None:
    """`get_rolling_token_windows` of lm_eval/utils.py with max_seq_len 5 and context_len 1, made disjoint, by hand."""
    ids = base.chat.content_tokens("what colour is the sky and the kitchen light")
    count, size = len(ids), 5
    assert count > 2 * size
    prefix = base.chat.tokenizer.bos_token_id
    expected = [([prefix], ids[:size])]
    done = size
    while done < count:
        end = min(done + size, count)
        whole = ids[end - size - 1 : end]
        expected.append((whole[: len(whole) - (end - done)], ids[done:end]))
        done = end
    rows = rolling_rows(base.chat, "what colour is the sky and the kitchen light", size + 1)
    found = []
    for row in rows:
        start = row.learnt.index(True)
        assert all(row.learnt[start:]) and len(row.ids) <= size + 1
        found.append((row.ids[:start], row.ids[start:]))
    assert found == expected


def test_rolling_log_likelihood_is_the_sum_of_its_windows(base: Base) -> None:
    text = "what colour is the sky and the kitchen light"
    runner = RequestRunner(base, base.model)
    ids = base.chat.content_tokens(text)
    whole = plain_log_likelihood(base, base.model, [base.chat.tokenizer.bos_token_id], ids)[0]
    assert runner.rolling([text, ""]) == pytest.approx([whole, 0.0], abs=1e-4)
    runner.max_tokens = 8
    windows = []
    for row in rolling_rows(base.chat, text, 8):
        start = row.learnt.index(True)
        windows.append(plain_log_likelihood(base, base.model, row.ids[:start], row.ids[start:])[0])
    assert runner.rolling([text]) == pytest.approx([sum(windows)], abs=1e-4)
    assert sum(windows) != pytest.approx(whole, abs=1e-3)


def test_replies_are_greedy_until_a_stop_text(base: Base) -> None:
    prompts = ["what colour is the sky", "turn on the kitchen light", "the sky"]
    whole = []
    for prompt in prompts:
        ids = base.chat.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        stops = base.chat.stops
        tail = base.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=stops)
        reply = [token for token in tail[0, len(ids) :].tolist() if token not in stops]
        whole.append(base.chat.decode(reply))
    options = {"until": [], "max_gen_toks": 12, "do_sample": False}
    runner = RequestRunner(base, base.model)
    assert runner.replies([(prompt, options) for prompt in prompts]) == whole
    stop = whole[0][3:5]
    cut = runner.replies([(prompt, {**options, "until": [stop, "\n\n"]}) for prompt in prompts])
    assert cut == [before_stop(text, [stop, "\n\n"]) for text in whole]
    assert cut[0] == whole[0][: whole[0].index(stop)] != whole[0]
    # requests of several options keep their order
    mixed = [(prompts[0], options), (prompts[1], {**options, "max_gen_toks": 1}), (prompts[2], options)]
    replies = runner.replies(mixed)
    assert (replies[0], replies[2]) == (whole[0], whole[2]) and whole[1].startswith(replies[1])


def test_contexts_beyond_the_model_are_cut_and_counted(base: Base) -> None:
    runner = RequestRunner(base, base.model)
    runner.max_tokens = 16
    long = "what colour is the sky " * 8
    total = runner.continuations([(long, " blue"), ("the sky", " blue")])[0][0]
    row = continuation_row(base.chat, long, " blue")
    head = row.learnt.index(True)
    expected = plain_log_likelihood(base, base.model, row.ids[-16:head], row.ids[head:])
    assert total == pytest.approx(expected[0], abs=1e-4) and runner.clipped == 1
    runner.replies([(long, {"until": ["\n"], "max_gen_toks": 8})])
    assert runner.clipped == 2
    with pytest.raises(ModelError, match="the model has 16 positions"):
        runner.continuations([("a", "what colour is the sky " * 8)])
    with pytest.raises(ConfigError, match="replies of 16 tokens"):
        runner.replies([("a", {"max_gen_toks": 16})])


def test_options_of_a_reply_are_read_or_refused() -> None:
    end = reply_end({"until": "\n", "max_new_tokens": 9, "temperature": 0.7, "num_beams": 1})
    assert end.until == ("\n",) and end.sampling.max_tokens == 9 and end.sampling.temperature == 0.7
    assert reply_end({}).sampling.max_tokens == 256 and reply_end({}).sampling.is_greedy
    assert reply_end({"do_sample": False, "temperature": 0.7}).sampling.is_greedy
    assert reply_end({"do_sample": True}).sampling.temperature == 1.0
    with pytest.raises(ConfigError, match="num_beams: 4"):
        reply_end({"num_beams": 4})
