"""Weights of turns reach the loss exactly: a turn of weight 0 is context, others scale their tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import marked
import tiny
from sartor.core.errors import SourceError
from sartor.core.records import Example, Message, Origin
from sartor.edge.tuning.tuner_process import read_tokens, write_tokens
from sartor.federate.tuning.lora_task import row_means
from sartor.inference.verifiers.regular_expression import RegexVerifier
from sartor.models.chat import ChatTokenizer
from sartor.models.losses.loss_backend import LossBackend
from sartor.models.losses.transformers_backend import PackedTransformersBackend, RowTransformersBackend
from sartor.models.packing import TokenizedExample
from sartor.tune import objectives
from sartor.tune.dataset_encoding import encode_preference
from sartor.tune.recipe import Distil, Dpo, Grpo, Kto, Sft
from sartor.tune.tokenized_dataset import TokenizedDataset
from tiny_families import fast_path, rows, tuned

SOURCE = (Origin("s", "1"),)


def talk(*weights: float, template: str = tiny.CHATML) -> tuple[ChatTokenizer, Example]:
    """A conversation of one reply for each weight."""
    turns = []
    for index, weight in enumerate(weights):
        turns += [Message.of("user", f"what {index}"), replace(Message.of("assistant", f"sky {index}"), weight=weight)]
    return ChatTokenizer(tiny.tokenizer(template)), Example(tuple(turns), SOURCE)


def encoded(*weights: float, **options: Any) -> TokenizedExample:
    chat, example = talk(*weights, **options)
    return chat.encode(example)


@pytest.mark.parametrize("template", [tiny.CHATML, marked.CHATML, None])
def test_weight_0_takes_the_turn_out_of_the_mask_alone(template: Any) -> None:
    plain, masked = encoded(1, 1, 1, template=template), encoded(1, 0, 1, template=template)
    assert masked.ids == plain.ids and masked.factors is None
    starts = [index for index in range(1, len(plain.ids)) if plain.learnt[index] and not plain.learnt[index - 1]]
    ends = [index for index in range(1, len(plain.ids)) if plain.learnt[index - 1] and not plain.learnt[index]]
    expected = list(plain.learnt)
    expected[starts[1] : ends[1]] = [False] * (ends[1] - starts[1])
    assert masked.learnt == expected


def test_weights_of_1_are_no_weights() -> None:
    chat, example = talk(1, 1)
    bare = replace(example, messages=tuple(Message(turn.role, turn.content) for turn in example.messages))
    first, second = chat.encode(example), chat.encode(bare)
    assert first == second and first.factors is None
    assert TokenizedDataset([first], []).digest() == TokenizedDataset([second], []).digest()


def test_other_weights_are_factors_of_their_tokens() -> None:
    row = replace(encoded(2, 0.5), weight=3.0)
    assert row.factors is not None and set(row.token_weights) == {6.0, 1.5}
    assert row.loss_weight == sum(row.token_weights) and len(row.token_weights) == row.supervised_tokens
    plain = replace(row, factors=None)
    assert plain.loss_weight == 3.0 * plain.supervised_tokens
    assert TokenizedDataset([row], []).digest() != TokenizedDataset([plain], []).digest()


def test_document_is_weighted_whole() -> None:
    chat, _ = talk(1)
    turn = replace(Message.of("assistant", "the sky"), weight=0.5)
    assert chat.encode(Example((turn,), SOURCE, weight=4.0)).weight == 2.0


# the loss

DEVICE = torch.device("cpu")
BACKENDS = ("fast", "general", "one-row")


def backend_of(kind: str, model: Any, examples: list[TokenizedExample]) -> LossBackend:
    if kind == "general":
        return PackedTransformersBackend(model, DEVICE, "")
    return RowTransformersBackend(model, DEVICE, "") if kind == "one-row" else fast_path(model, examples)


def gradients(backend: LossBackend, examples: list[TokenizedExample]) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of an update, with the divisor of `TrainingRun._backward`."""
    losses, weights = backend.losses(examples)
    loss = objectives.sft(losses, weights, sum(row.loss_weight for row in examples))
    return float(loss.detach()), list(torch.autograd.grad(loss, backend.trained))


def two_turns(*weights: float) -> TokenizedExample:
    """A row of two learnt spans with these weights."""
    (row,) = rows(24)
    learnt = [4 <= index < 10 or 14 <= index < 24 for index in range(24)]
    factors = [1.0] * 4 + [weights[0]] * 6 + [1.0] * 4 + [weights[1]] * 10
    learnt = [is_learnt and factor > 0 for is_learnt, factor in zip(learnt, factors, strict=True)]
    factors = [factor or 1.0 for factor in factors]
    has_factors = any(factor != 1 for factor in factors)
    return TokenizedExample(row.ids, learnt, "a", factors=factors if has_factors else None)


@pytest.mark.parametrize("kind", BACKENDS)
def test_gradient_is_the_weighted_mean_over_tokens(kind: str) -> None:
    """g(a, b) = (a n_1 g_1 + b n_2 g_2) / (a n_1 + b n_2), with the gradients g_i of one turn alone."""
    model, (other,) = tuned("llama"), rows(20)
    backend = backend_of(kind, model, [two_turns(1, 1), other])
    loss, found = gradients(backend, [two_turns(2, 0.5)])
    first_loss, first = gradients(backend, [two_turns(1, 0)])
    second_loss, second = gradients(backend, [two_turns(0, 1)])
    total = 2 * 6 + 0.5 * 10
    assert loss == pytest.approx((2 * 6 * first_loss + 0.5 * 10 * second_loss) / total, rel=1e-10)
    for gradient, one, two in zip(found, first, second, strict=True):
        assert torch.allclose(gradient, (2 * 6 * one + 0.5 * 10 * two) / total, rtol=1e-8, atol=1e-12)
    with_other, _ = gradients(backend, [two_turns(2, 0.5), other])
    other_loss, _ = gradients(backend, [other])
    divisor = total + other.loss_weight
    assert with_other == pytest.approx((total * loss + other.loss_weight * other_loss) / divisor, rel=1e-6)


@pytest.mark.parametrize("kind", BACKENDS)
def test_weights_of_1_change_no_bit(kind: str) -> None:
    model, row = tuned("llama", dtype=torch.float32), two_turns(1, 1)
    backend = backend_of(kind, model, [row])
    loss, found = gradients(backend, [row])
    again, expected = gradients(backend, [replace(row, factors=[1.0] * len(row.ids))])
    assert loss == again and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_private_row_mean_is_weighted() -> None:
    model = tuned("llama")
    weighted, first, second = row_means(model, [two_turns(3, 1), two_turns(1, 0), two_turns(0, 1)], DEVICE).tolist()
    assert weighted == pytest.approx((3 * 6 * first + 10 * second) / 28, rel=1e-6)


# objectives and files


def test_preference_takes_the_weight_of_its_last_turn(tmp_path: Path) -> None:
    chat, example = talk(0, 0.5)
    pair = replace(example, weight=4.0, rejected=(Message.of("assistant", "grass"),))
    ((lesson, _),) = encode_preference(pair, Dpo(), chat, tmp_path)
    assert (lesson.weight, lesson.factors, lesson.example_id) == (2.0, None, pair.id)
    assert chat.tokenizer.decode(lesson.ids[slice(*lesson.last_reply)]) == "sky 1<|im_end|>"
    ((rated, _),) = encode_preference(replace(example, rating=-0.5), Kto(), chat, tmp_path)
    assert rated.weight == 0.25


def test_grpo_takes_every_weight_but_0_of_the_last_turn(tmp_path: Path) -> None:
    """It learns replies of the model in place of the last turn, and no other turn."""
    objective = Grpo(verifier=RegexVerifier("sky"))
    chat, example = talk(0.5, 0, 2.5)
    ((row, _),) = encode_preference(example, objective, chat, tmp_path)
    ((plain, _),) = encode_preference(talk(1, 0, 1)[1], objective, chat, tmp_path)
    assert (row.ids, row.learnt, row.factors, row.weight) == (plain.ids, plain.learnt, None, plain.weight)
    with pytest.raises(SourceError, match="the last turn has weight 0, and grpo"):
        encode_preference(talk(1, 0)[1], objective, chat, tmp_path)


def test_distillation_takes_weights_0_and_1(tmp_path: Path) -> None:
    objective = Distil(teacher="base")
    chat, example = talk(0, 1)
    ((row, _),) = encode_preference(example, objective, chat, tmp_path)
    assert row == replace(row, learnt=chat.encode(example).learnt)
    for weights in ((1, 0), (1, 0.5)):
        with pytest.raises(SourceError, match="weight 0 or 1"):
            encode_preference(talk(*weights)[1], objective, chat, tmp_path)
    assert encode_preference(talk(1, 0.5)[1], Sft(), chat, tmp_path)[0][0].factors is not None


def test_device_gets_the_weights_too(tmp_path: Path) -> None:
    weighted, plain = encoded(2, 0.5), encoded(1, 1)
    write_tokens(TokenizedDataset([weighted, plain], []), tmp_path / "tokens")
    assert read_tokens(tmp_path / "tokens").train == [weighted, plain]
    write_tokens(TokenizedDataset([plain], []), tmp_path / "plain")
    assert read_tokens(tmp_path / "plain").train == [plain]
