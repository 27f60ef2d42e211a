"""How sure a side was of the class that it named: the probability of the tokens that spell it, and of no others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from sartor.evaluate.predictions import _confidence, _spelling
from sartor.evaluate.reply_labels import span_of
from sartor.inference.generate import Generation
from sartor.models.base import Base, open_base

TEXT = '{"n": 1, "sky": "the sky is blue", "on": {"at": "kitchen"}}'


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return open_base(str(tiny_base), bits=32, device=torch.device("cpu"))


@pytest.mark.parametrize(("field", "value"), [("sky", "the sky is blue"), ("n", "1"), ("on.at", "kitchen"), (".", TEXT)])
def test_the_tokens_that_spell_a_label(base: Base, field: str, value: str) -> None:
    ids = base.chat.tokens(TEXT)
    first, last = _spelling(base.chat, ids, *span_of(TEXT, field))
    assert base.chat.decode(ids[first:last]).strip(' "},') == value.strip(' "},')


def test_confidence_is_the_product_over_them(base: Base) -> None:
    ids = base.chat.tokens(TEXT)
    logprobs = [-0.01 * (place + 1) for place in range(len(ids))]
    first, last = _spelling(base.chat, ids, *span_of(TEXT, "sky"))
    found = _confidence(base.chat, Generation(ids, "stop", logprobs), TEXT, "sky")
    assert found == pytest.approx(math.exp(sum(logprobs[first:last]))) and 0 < found < 1
    assert _confidence(base.chat, Generation([], "stop"), "", "sky") == 0.0
    other = base.chat.tokens("no JSON")
    assert _confidence(base.chat, Generation(other, "stop", [-1.0] * len(other)), "no JSON", "sky") == 0.0
