"""Log-probabilities of chosen tokens: the three backends against the model's own logits, with their gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
from sartor.models import adapters
from sartor.models.losses import transformers_backend
from sartor.models.losses.loss_backend import LossBackend, LossOptions
from sartor.models.losses.token_scores import token_log_probabilities, top_tokens
from sartor.models.losses.transformers_backend import RowTransformersBackend
from sartor.models.packing import SoftTargets, TokenizedExample

CPU = torch.device("cpu")
ROWS = [
    TokenizedExample([5, 9, 30, 41, 7, 2], [False, False, False, True, True, True]),
    TokenizedExample([5, 9, 30, 8, 77, 101, 2], [False, False, True, False, True, True, True]),
]
COUNT = sum(row.supervised_tokens for row in ROWS)
BACKENDS = ("fast", "general", "one-row")


@pytest.fixture(scope="module")
def model() -> Any:
    tuned = adapters.inject_lora(tiny.model(), rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return tuned.eval()


def backend_of(model: Any, name: str, **options: Any) -> LossBackend:
    if name == "one-row":
        return RowTransformersBackend(model, CPU, "")
    chosen = transformers_backend.choose_loss_backend(model, ROWS, CPU, LossOptions(fast=name == "fast", **options))
    assert chosen.name == name
    return chosen


def expected(model: Any) -> torch.Tensor:
    """(S, V) log-probabilities by the model's own forward pass, a row at a time."""
    parts = []
    for row in ROWS:
        scores = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        parts += [scores[place - 1] for place in range(1, len(row.ids)) if row.learnt[place]]
    return torch.stack(parts)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", BACKENDS)
def test_scores_and_gradients_are_those_of_the_models_own_logits(model: Any, name: str, share: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, tiny.SIZE, (COUNT, 5), generator=generator)
    weights = torch.randn(COUNT, 5, generator=generator)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = token_log_probabilities(backend_of(model, name, share=share), ROWS, ids)
    wanted = expected(model).gather(1, ids)
    assert torch.allclose(found, wanted, atol=1e-5)
    gradients = [torch.autograd.grad((side * weights).sum(), parameters) for side in (found, wanted)]
    for actual, own in zip(*gradients, strict=True):
        assert torch.allclose(actual, own, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", BACKENDS)
def test_top_tokens_are_the_likeliest_and_the_rows_own(model: Any, name: str) -> None:
    with torch.no_grad():
        scores = expected(model)
    top = top_tokens(backend_of(model, name), ROWS, 4, 200)
    values, ids = scores[:, :200].topk(4)
    assert top.ids.tolist() == ids.tolist()
    assert torch.allclose(top.log_probabilities, values, atol=1e-5)
    own = [token for row in ROWS for token, on in zip(row.ids[1:], row.learnt[1:], strict=True) if on]
    assert torch.allclose(top.targets, scores[range(COUNT), own], atol=1e-5)


def test_the_fused_scores_agree_with_its_losses_from_stored_activations(model: Any, tmp_path: Any) -> None:
    frozen = adapters.inject_lora(
        tiny.model(), rank=4, alpha=8, dropout=0.0, targets="all-linear", seed=0, top_layers=1
    ).eval()
    backend = backend_of(frozen, "fast", reuse_bytes=1 << 20, store=tmp_path)
    losses, _ = backend.losses(ROWS)
    own = [token for row in ROWS for token, on in zip(row.ids[1:], row.learnt[1:], strict=True) if on]
    scores = token_log_probabilities(backend, ROWS, torch.tensor(own)[:, None])
    assert torch.allclose(-losses, scores[:, 0], atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_soft_targets_are_losses_beside_hard_ones(model: Any, name: str) -> None:
    """A row with soft targets has KL(target || model) of K tokens and the tail; its neighbours keep their losses."""
    count, bins = ROWS[0].supervised_tokens, 5
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(tiny.SIZE, generator=generator)[:bins] for _ in range(count)])
    targets = torch.randn(count, tiny.SIZE, generator=generator).log_softmax(-1).gather(1, ids)
    rows = [ROWS[1], replace(ROWS[0], soft=SoftTargets(ids, targets)), ROWS[1]]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses, _ = backend_of(model, name).losses(rows)
    scores = expected(model)
    own = [token for token, on in zip(ROWS[1].ids[1:], ROWS[1].learnt[1:], strict=True) if on]
    hard = -scores[count:][range(len(own)), own]
    q = scores[:count].gather(1, ids)
    p_rest, q_rest = (1 - side.exp().sum(-1) for side in (targets, q))
    soft = (targets.exp() * (targets - q)).sum(-1) + p_rest * (p_rest.log() - q_rest.log())
    wanted = torch.cat([hard, soft, hard])
    assert torch.allclose(losses, wanted, atol=1e-4)
    factors = torch.randn(len(wanted), generator=generator)
    gradients = [torch.autograd.grad((side * factors).sum(), parameters) for side in (losses, wanted)]
    for actual, reference in zip(*gradients, strict=True):
        assert torch.allclose(actual, reference, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_of_soft_targets_alone_cost_nothing_at_their_own_model(model: Any, name: str) -> None:
    backend = backend_of(model, name)
    with torch.no_grad():
        top = top_tokens(backend, ROWS[:1], 8, tiny.SIZE)
        row = replace(ROWS[0], soft=SoftTargets(top.ids, top.log_probabilities))
        losses, _ = backend.losses([row])
    assert float(losses.abs().max()) < 1e-5
