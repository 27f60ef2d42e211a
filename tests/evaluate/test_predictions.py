"""How sure a side was of the class that it named: the probability of the tokens that spell it, and of no others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sartor.core.records import Example, Message
from sartor.evaluate.predictions import (
    MOST_REPLY_TOKENS,
    SPARE_TOKENS,
    _confidence,
    _spelling,
    reply_cap_warnings,
    reply_limit,
    reply_outputs,
)
from sartor.evaluate.reply_labels import span_of
from sartor.inference.generate import Generation
from sartor.models.base import Base, open_base

TEXT = '{"n": 1, "sky": "the sky is blue", "on": {"at": "kitchen"}}'


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return open_base(str(tiny_base), bits=32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("field", "value"), [("sky", "the sky is blue"), ("n", "1"), ("on.at", "kitchen"), (".", TEXT)]
)
def test_the_tokens_that_spell_a_label(base: Base, field: str, value: str) -> None:
    ids = base.chat.tokens(TEXT)
    first, last = _spelling(base.chat, ids, *span_of(TEXT, field))
    assert base.chat.decode(ids[first:last]).strip(' "},') == value.strip(' "},')


def test_confidence_is_the_product_over_them(base: Base) -> None:
    ids = base.chat.tokens(TEXT)
    logprobs = [-0.01 * (place + 1) for place in range(len(ids))]
    first, last = _spelling(base.chat, ids, *span_of(TEXT, "sky"))
    found = _confidence(base.chat, Generation(ids, "stop", logprobs), TEXT, TEXT, "sky")
    assert found == pytest.approx(math.exp(sum(logprobs[first:last]))) and 0 < found < 1
    assert _confidence(base.chat, Generation([], "stop"), "", "", "sky") == 0.0
    other = base.chat.tokens("no JSON")
    assert _confidence(base.chat, Generation(other, "stop", [-1.0] * len(other)), "no JSON", "no JSON", "sky") == 0.0


def test_confidence_is_of_the_answer_behind_the_reasoning(base: Base) -> None:
    text = f"<think>the sky is blue</think> {TEXT}"
    ids = base.chat.tokens(text)
    logprobs = [-0.01 * (place + 1) for place in range(len(ids))]
    (outputs,) = [reply_outputs(base.chat, [Generation(ids, "stop", logprobs)], [1.0], [1], "sky", is_opened=False)]
    start, end = (len(text) - len(TEXT) + place for place in span_of(TEXT, "sky"))
    first, last = _spelling(base.chat, ids, start, end)
    assert outputs.replies == [text] and outputs.answers == [TEXT]
    assert outputs.confidence == [pytest.approx(math.exp(sum(logprobs[first:last])))]


def asked(reply: str, reasoning: str = "") -> Example:
    last = Message("assistant", Message.of("assistant", reply).content, reasoning_content=reasoning)
    return Example((Message.of("user", "why"), last), ())


def test_reply_limit_includes_reasoning_and_skips_documents(base: Base) -> None:
    """The limit is the longest reference plus SPARE_TOKENS; a document has no prompt to reply to."""
    thought = "the sky is blue " * 20
    tokens = len(base.chat.tokenizer(f"<think>\n{thought}\n</think>\n\nyes")["input_ids"])
    assert reply_limit(base, [asked("yes", thought)]) == tokens + SPARE_TOKENS
    document = Example((Message.of("assistant", "the sky is blue " * 200),), ())
    assert reply_limit(base, [asked("yes"), document]) == reply_limit(base, [asked("yes")])
    assert reply_limit(base, [document]) == SPARE_TOKENS


def test_references_beyond_the_cap_are_counted(base: Base) -> None:
    long = asked("the sky is blue " * MOST_REPLY_TOKENS)
    assert reply_limit(base, [asked("yes"), long]) == MOST_REPLY_TOKENS
    (warning,) = reply_cap_warnings(base, [asked("yes"), long, asked("yes", "the sky is blue " * MOST_REPLY_TOKENS)])
    assert warning.reason == "cut_references" and "2 of 3 references are longer than 512 tokens" in warning.problem
    assert not reply_cap_warnings(base, [asked("yes"), Example((Message.of("assistant", long.reply),), ())])


def test_a_template_may_open_the_reasoning(base: Base) -> None:
    assert base.chat.opens_reasoning(base.chat.tokens("what is it<think>\n"))
    assert not base.chat.opens_reasoning(base.chat.tokens("<think> what is it"))
    assert base.chat.opens_reasoning([-3, -2, *base.chat.tokens("<think>")]) and not base.chat.opens_reasoning(
        [-3, -2]
    )
