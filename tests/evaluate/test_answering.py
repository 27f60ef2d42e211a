"""How sure a side was of the class that it named: the probability of the tokens that spell it, and of no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sartor.evaluate.answering import _confidences, _spelling
from sartor.evaluate.held_out import HeldOut
from sartor.evaluate.labels import span_of
from sartor.models import adapters
from sartor.models.base import Base, open_base
from seeing import said

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
    model = adapters.inject_lora(base.model, rank=2, alpha=4.0, dropout=0.0, targets="all-linear", seed=0)
    example, ids = said("what colour", reply=TEXT), base.chat.tokens(TEXT)
    asked = HeldOut([example] * 3, Path())
    given = [(ids, TEXT), ([], ""), (base.chat.tokens("no JSON"), "no JSON")]
    found = _confidences(base, model, asked, given, "sky")
    prompt = base.chat.prompt_ids(example.prompt)
    chances = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].detach().softmax(-1)
    first, last = _spelling(base.chat, ids, *span_of(TEXT, "sky"))
    wanted = 1.0
    for place in range(len(prompt) + first, len(prompt) + last):
        wanted *= float(chances[place - 1, [*prompt, *ids][place]])
    assert 0 < wanted < 1
    assert found == [pytest.approx(wanted, rel=1e-3), 0.0, 0.0]
    assert _confidences(base, model, asked, [([], "")] * 3, "sky") == [0.0] * 3
