"""Base and tuned in one batch measure what each measures alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import loras
from sartor.core.errors import ModelError
from sartor.core.records import Example, Message
from sartor.evaluate import paired_measurement
from sartor.evaluate.metrics import MetricSet
from sartor.evaluate.paired_measurement import measure_losses, measure_models
from sartor.evaluate.predictions import HeldOut, losses, measure_model, model_side
from sartor.inference.local import paired_replies
from sartor.inference.local.paired_replies import PairedRow, shared_beginnings
from sartor.models import adapters
from sartor.models.base import Base, open_base
from sartor.models.kernels import cpu

SYSTEM = Message.of("system", "turn on the kitchen light " * 12)


def row(*texts: str, system: bool = False) -> Example:
    """A conversation of user and assistant in turn; a document if it is one text."""
    if len(texts) == 1:
        return Example((Message.of("assistant", texts[0]),), ())
    turns = [Message.of("assistant" if place % 2 else "user", text) for place, text in enumerate(texts)]
    return Example((*([SYSTEM] if system else []), *turns), ())


ROWS = [
    row("what colour is the sky", "the sky is blue", system=True),
    row("what colour is the sky then", "blue", system=True),
    row("turn on the light", '{"intent":"HassTurnOn"}', "and the kitchen", '{"area":"kitchen"}'),
    row("turn on the kitchen light " * 8, "yes"),
    row("the sky is blue"),
    *(row(f"what colour is light {number}", "blue " * (number % 3 + 1)) for number in range(12)),
]


@pytest.fixture
def pair(tiny_base: Path, tmp_path: Path) -> tuple[Base, Any]:
    """An fp32 base, and the model with an adapter that changes what it says."""
    try:
        cpu.load()
    except cpu.NoKernels as why:
        pytest.skip(str(why))
    base = open_base(str(tiny_base), bits=32, device=torch.device("cpu"))
    lora = loras.write_lora(tmp_path / "lora", base.model.config.to_dict(), rank=3, size=1.0)
    return base, adapters.open_adapter(base.model, lora)


def plain(base: Base, model: Any, eval_set: HeldOut, field: str = "") -> list[Any]:
    return [measure_model(base, model, eval_set, field, tuned=tuned) for tuned in (False, True)]


def test_losses_of_both_are_those_of_each(pair: tuple[Base, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a conversation all its replies count; a row without a learnt token has a loss of 0."""
    base, model = pair
    encoded = [base.chat.encode(example) for example in ROWS]
    encoded.append(replace(encoded[0], learnt=[False] * len(encoded[0].ids)))
    together = measure_losses(base, model, encoded)
    for tuned, means in enumerate(together):
        with model_side(model, tuned=bool(tuned)):
            assert means == pytest.approx(losses(base, model, encoded)[0], rel=1e-4)
    assert together[0] != together[1] and together[0][-1] == 0.0
    assert measure_losses(base, model, encoded, sides=[True]) == [together[1]]
    assert measure_losses(base, model, []) == [[], []]
    monkeypatch.setattr(paired_replies, "open_compiled", lambda *_, **__: None)
    assert measure_losses(base, model, encoded)[1] == pytest.approx(together[1], rel=1e-4)


@pytest.mark.parametrize("step_tokens", [256, 7])
def test_both_sides_say_what_each_says_alone(
    pair: tuple[Base, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_tokens: int
) -> None:
    """Also where a step reads less than a row, and few pages of the cache are free."""
    monkeypatch.setattr(paired_replies, "STEP_TOKENS", step_tokens)
    monkeypatch.setattr(paired_replies, "CACHE_TOKENS", 64)
    base, model = pair
    eval_set, fractions = HeldOut(ROWS, tmp_path), list[float]()
    both = measure_models(base, model, eval_set, ".", progress=fractions.append)
    for alone, together in zip(plain(base, model, eval_set, "."), both, strict=True):
        assert together.replies == alone.replies and together.tokens == alone.tokens
        assert together.loss == pytest.approx(alone.loss, rel=1e-4)
        assert together.confidence == pytest.approx(alone.confidence, rel=1e-3)
        assert not any(together.is_cut)
    assert both[0].replies != both[1].replies
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    assert measure_models(base, model, eval_set, "", sides=[True])[0].replies == both[1].replies


def test_decided_replies_end_early_with_the_same_scores(pair: tuple[Base, Any], tmp_path: Path) -> None:
    base, model = pair
    eval_set = HeldOut(ROWS, tmp_path)
    whole = plain(base, model, eval_set)
    # some references are what the tuned model says
    references = [text if index % 2 else "the sky" for index, text in enumerate(whole[1].replies)]
    measures = MetricSet(references, ["g"] * len(ROWS))

    def is_decided(index: int, reply: str) -> bool:
        return measures.is_decided(index, reply, ["exact_match"])

    ended = measure_models(base, model, eval_set, "", is_decided=is_decided)
    for before, after in zip(whole, ended, strict=True):
        assert measures.by_row(before)["exact_match"] == measures.by_row(after)["exact_match"]
        assert [text.startswith(cut.rstrip("\ufffd")) for text, cut in zip(before.replies, after.replies, strict=True)]
        assert all(
            is_cut or cut == text
            for text, cut, is_cut in zip(before.replies, after.replies, after.is_cut, strict=True)
        )
    assert any(ended[1].is_cut) and not all(ended[1].is_cut)
    assert set(whole[0].replies[0]) == {"\n"} and not ended[0].is_cut[0], "white space decides nothing"


def no_kernels() -> None:
    raise cpu.NoKernels("a test")


def train_whole(model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_dropout["default"] = torch.nn.Dropout(0.1)


@pytest.mark.parametrize("change", [lambda model: None, train_whole])
def test_what_the_kernels_do_not_fit_is_measured_alone(
    pair: tuple[Base, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    base, model = pair
    change(model)
    if change is not train_whole:
        monkeypatch.setattr(cpu, "load", no_kernels)
    calls = []
    monkeypatch.setattr(paired_measurement, "measure_model", lambda *rest, tuned: calls.append(tuned))
    measure_models(base, model, HeldOut(ROWS, tmp_path), "")
    assert calls == [False, True]


def test_broken_adapter_is_an_error(pair: tuple[Base, Any], tmp_path: Path) -> None:
    base, model = pair
    model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        measure_models(base, model, HeldOut(ROWS, tmp_path), "")


def test_rows_share_the_beginning_that_saves_most() -> None:
    system, long = list(range(40)), list(range(100, 300))
    texts = [[*system, 1], [*system, 2], [*long, 1], [*long, 2], [*long[:5], 9], [7]]
    rows = [PairedRow([*ids, 0], [(len(ids), 0)], len(ids)) for ids in texts]
    assert shared_beginnings(rows) == [(40, [0, 1]), (0, [5]), (0, [4]), (200, [2, 3])]
    # a row whose own tokens are predicted early shares no more than stands before them
    early = [PairedRow([*system, 1], [(9, 0)], 0), PairedRow([*system, 2], [(39, 0)], 0)]
    assert shared_beginnings(early) == [(9, [0, 1])]
