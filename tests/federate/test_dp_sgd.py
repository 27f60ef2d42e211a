"""DP-SGD on a tiny Llama of the real architecture: gradients by hand, noise as it is said, a canary with and without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tiny
from sartor.core.errors import ConfigError, ExtraError, ModelError
from sartor.federate.privacy import dp_sgd, privacy_attacks
from sartor.federate.privacy.accountant import PrivacyBudget, calibrated
from sartor.federate.privacy.dp_sgd import RowNoise, poisson_sample, private_updates
from sartor.models import adapters

pytest.importorskip("opacus", reason="pip install 'sartor[federated]'")


def seeded(seed: int) -> Callable[[int], bytes]:
    return np.random.default_rng(seed).bytes


def adapted(targets: Any = "all-linear", rank: int = 4) -> Any:
    return adapters.inject_lora(tiny.model(), rank=rank, alpha=8, dropout=0.0, targets=targets, seed=0)


def losses_of(model: Any) -> Callable[[Sequence[list[int]]], torch.Tensor]:
    def losses(rows: Sequence[list[int]]) -> torch.Tensor:
        ids = torch.tensor(rows)
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)

    return losses


def rows_of(count: int, seed: int = 0, length: int = 9) -> list[list[int]]:
    return np.random.default_rng(seed).integers(3, 320, (count, length)).tolist()


def learning(model: Any) -> dict[str, torch.Tensor]:
    return {name: part for name, part in model.named_parameters() if part.requires_grad}


def changed(model: Any, how: RowNoise, rows: list[list[int]], **options: Any) -> dict[str, torch.Tensor]:
    """What one SGD update of rate 1 does."""
    before = {name: part.detach().clone() for name, part in learning(model).items()}
    with private_updates(
        model, torch.optim.SGD(learning(model).values(), lr=1.0), losses_of(model), how, **options
    ) as update:
        update(rows)
    return {name: part.detach() - before[name] for name, part in learning(model).items()}


@pytest.fixture
def moved() -> Any:
    """Both factors away from zero, so that each has a gradient."""
    model = adapted()
    torch.manual_seed(1)
    with torch.no_grad():
        for part in learning(model).values():
            part.add_(0.1 * torch.randn_like(part))
    return model


def test_an_update_is_the_sum_of_each_rows_clipped_gradient(moved: Any) -> None:
    rows, clip = rows_of(5), 0.3
    wanted = {name: torch.zeros_like(part) for name, part in learning(moved).items()}
    norms = []
    for row in rows:
        moved.zero_grad()
        losses_of(moved)([row]).sum().backward()
        gradients = {name: part.grad.clone() for name, part in learning(moved).items()}
        norms.append(float(torch.sqrt(sum(part.square().sum() for part in gradients.values()))))
        for name, part in gradients.items():
            wanted[name] += part * min(1.0, clip / norms[-1])
    assert max(norms) > clip
    moved.zero_grad()
    for micro_rows in (8, 2):
        again = {name: part.detach().clone() for name, part in learning(moved).items()}
        found = changed(moved, RowNoise(clip, 0.0, batch_rows=4), rows, micro_rows=micro_rows)
        for name, part in found.items():
            assert torch.allclose(part, -wanted[name] / 4, atol=2e-7, rtol=1e-4), (micro_rows, name)
        with torch.no_grad():
            for name, part in learning(moved).items():
                part.copy_(again[name])


def test_rows_below_clip_add_fully_and_empty_batch_is_noise(moved: Any) -> None:
    """The noise has the deviation noise_multiplier * clip_norm / batch_rows."""
    how = RowNoise(clip_norm=1e6, noise_multiplier=0.0, batch_rows=2)
    both = rows_of(2)
    together = changed(adapted(), how, both)
    apart = [changed(adapted(), how, [row]) for row in both]
    assert all(torch.allclose(part, apart[0][name] + apart[1][name], atol=1e-6) for name, part in together.items())
    noise = changed(moved, RowNoise(clip_norm=0.5, noise_multiplier=2.0, batch_rows=4), [], source=seeded(3))
    values = torch.cat([part.flatten() for part in noise.values()])
    assert values.std() == pytest.approx(2.0 * 0.5 / 4, rel=0.05) and abs(values.mean()) < 0.02


def test_the_model_is_as_it_was_and_may_be_used_again(moved: Any) -> None:
    rows = rows_of(3)
    before = losses_of(moved)(rows).detach()
    modes = [module.training for module in moved.modules()]
    assert {True, False} == set(modes), "PEFT's parts are in training, the base's are not"
    optimizer = torch.optim.SGD(learning(moved).values(), lr=0.0)
    for _ in range(2):
        with private_updates(moved, optimizer, losses_of(moved), RowNoise(1.0, 1.0, 2)) as update:
            update(rows)
    assert [module.training for module in moved.modules()] == modes
    assert torch.equal(losses_of(moved)(rows).detach(), before)
    moved.zero_grad()
    losses_of(moved)(rows).sum().backward()
    assert all(getattr(part, "grad_sample", None) is None for part in moved.parameters())


def test_what_cannot_be_private_is_refused(moved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    how, losses = RowNoise(1.0, 1.0, 2), losses_of(moved)
    with (
        pytest.raises(ModelError, match="nothing of this model"),
        private_updates(tiny.model().requires_grad_(False), None, losses, how),
    ):
        pass
    some = torch.optim.SGD(list(learning(moved).values())[:1], lr=1.0)
    with pytest.raises(ModelError, match="optimiser moves 1 tensors"), private_updates(moved, some, losses, how):
        pass
    norm = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    every = torch.optim.SGD(norm.parameters(), lr=1.0)
    with pytest.raises(ModelError, match="statistics of all rows"), private_updates(norm, every, losses, how):
        pass
    whole = torch.optim.SGD(learning(moved).values(), lr=1.0)

    def packed(rows: Sequence[list[int]]) -> torch.Tensor:
        return losses([[token for row in rows for token in row]])

    refused = pytest.raises(ModelError, match="has 1 gradients for 3 rows")
    with refused, private_updates(moved, whole, packed, how) as update:
        update(rows_of(3))
    monkeypatch.setitem(__import__("sys").modules, "opacus", None)
    with pytest.raises(ExtraError, match="opacus"), private_updates(moved, whole, losses, how):
        pass


def test_poisson_sample_matches_the_accounted_fraction() -> None:
    """Batch sizes have a mean of 8 and binomial variance; the account has the fraction 0.04."""
    how, rows = RowNoise(1.0, 1.1, batch_rows=8), list(range(200))
    sizes = [len(poisson_sample(rows, how, seeded(seed))) for seed in range(300)]
    assert np.mean(sizes) == pytest.approx(8, abs=0.6) and np.var(sizes) == pytest.approx(200 * 0.04 * 0.96, rel=0.3)
    spent = how.spending("local-1", len(rows), updates=50)
    assert (spent.fraction, spent.times, spent.noise_multiplier) == (0.04, 50, 1.1)
    with pytest.raises(ConfigError, match="batch_rows is 8, and there are 4 rows"):
        poisson_sample(rows[:4], how)
    for wrong in ((0.0, 1.0, 1), (1.0, -1.0, 1), (1.0, 1.0, 0)):
        with pytest.raises(ConfigError, match="is no noise"):
            RowNoise(*wrong)


def exposed(noise: float, updates: int = 20) -> privacy_attacks.Exposure:
    """A tiny Llama learns 24 rows and one with a secret, eight times; how far the secret stands out among 128."""
    model, source = adapted(), np.random.default_rng(5)
    prompt, secrets = [40, 41, 42, 43, 44], source.integers(3, 320, (128, 4)).tolist()
    rows = rows_of(24, seed=6) + [prompt + secrets[0]] * 8
    how = RowNoise(clip_norm=0.5, noise_multiplier=noise, batch_rows=16)
    optimizer = torch.optim.AdamW(learning(model).values(), lr=2e-2)
    with private_updates(model, optimizer, losses_of(model), how, micro_rows=32, source=seeded(1)) as update:
        for place in range(updates):
            update(poisson_sample(rows, how, seeded(place)))
    with torch.no_grad():
        losses = losses_of(model)([prompt + secret for secret in secrets]).tolist()
    return privacy_attacks.exposure("secret", 8, losses[0], losses[1:])


def test_repeated_secret_is_exposed_only_without_noise() -> None:
    """Of a secret in 8 rows 7 of 7 bits are exposed; with noise for epsilon 1/8 a row fewer than 5."""
    pytest.importorskip("dp_accounting", reason="pip install 'sartor[federated]'")
    bare = exposed(0.0)
    assert bare.bits == bare.most_bits == 7.0
    noise = calibrated(
        PrivacyBudget(1 / 8, 1e-3), 20, 0.5
    )  # a row that stands there eight times is protected by eight times less
    assert exposed(noise).bits < 5, "of epsilon 1 a chance of e / 32 at most"


@pytest.mark.parametrize(("rank", "is_blind"), [(16, False), (4, True)])
def test_update_reveals_tokens_only_if_rank_exceeds_them(rank: int, is_blind: bool) -> None:
    """A first update of rank 16 reveals at least 6 of 7 tokens; rank 4 leaves the attack blind."""
    model = adapted(["v_proj"], rank)
    row = [7, 90, 200, 33, 150, 61, 280]
    model.zero_grad()
    losses_of(model)([row]).sum().backward()
    layer = model.base_model.model.model.layers[0]
    factor = layer.self_attn.v_proj
    with torch.no_grad():
        inputs = layer.input_layernorm(model.get_input_embeddings().weight)
    change = (-0.1 * factor.lora_B["default"].weight.grad).numpy()  # what one step of SGD sends
    named = privacy_attacks.from_factor(change, factor.lora_A["default"].weight.detach().numpy(), inputs.numpy())
    found = privacy_attacks.score_inversion("first update of v_proj", named, row)
    assert found.is_blind == is_blind
    if not is_blind:
        assert found.precision == 1 and found.recall >= 6 / 7, "the last token is read by nobody"


def test_the_noisy_gradient_has_no_bits_below_the_grid() -> None:
    how = RowNoise(1.0, 1.0, 1)
    part = torch.nn.Parameter(torch.zeros(500))
    part.grad = torch.rand(500)
    dp_sgd._noise([part], how, seeded(0))
    steps = part.grad.double() / dp_sgd.GRID
    assert torch.equal(steps, steps.round())
