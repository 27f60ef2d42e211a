"""Objectives: values against the papers' formulas written out in plain Python, and gradients against finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sartor.models.losses.soft_targets import NO_BIN
from sartor.tune import objectives

N = 5


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bins(*scores: torch.Tensor) -> torch.Tensor:
    """(N, K) log-probabilities of K tokens of more: two thirds of the probability, or less."""
    return torch.stack([*scores, torch.zeros_like(scores[0])], 1).log_softmax(1)[:, :-1]


SMOOTHING = (0.0, 0.2)
GOOD = torch.tensor([True, False, True, False, False])
CHECKED: dict[str, Callable[..., torch.Tensor]] = {
    "sft": lambda a, b, c, d: objectives.sft(a, b, 3.0),
    "log_probabilities": lambda a, b, c, d: objectives.log_probabilities(a, [2, 0, 3]),
    "dpo": lambda a, b, c, d: objectives.dpo(a, b, c, d, beta=0.3),
    "dpo, smoothed": lambda a, b, c, d: objectives.dpo(a, b, c, d, beta=0.3, label_smoothing=0.2),
    "orpo": lambda a, b, c, d: objectives.orpo(-a.exp(), -b.exp()),
    "simpo": lambda a, b, c, d: objectives.simpo(a, b, beta=2.0, margin=0.7),
    "distil, reverse": lambda a, b, c, d: objectives.distil(bins(a, b), bins(c, d)),
    "distil, forward": lambda a, b, c, d: objectives.distil(bins(a, b), bins(c, d), divergence="forward"),
    "distil, jensen": lambda a, b, c, d: objectives.distil(bins(a, b), bins(c, d), divergence="jensen", mixture=0.3),
    "distil, with a temperature": lambda a, b, c, d: objectives.distil(bins(a, b), bins(c, d), temperature=2.5),
    "grpo": lambda a, b, c, d: objectives.grpo(a, b, c, d, beta=0.3),
    "grpo, without a reference": lambda a, b, c, d: objectives.grpo(a, b, None, d, beta=0.0),
    "group advantages": lambda a, b, c, d: objectives.group_advantages(torch.stack([a, b])),
    "kto": lambda a, b, c, d: objectives.kto(a, b, GOOD, 0.4, beta=0.3),
    "kto, weighed": lambda a, b, c, d: objectives.kto(
        a, b, GOOD, 0.4, beta=2, desirable_weight=1.5, undesirable_weight=0.5
    ),
}


@pytest.mark.parametrize("name", CHECKED)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    inputs = tuple(doubles(N, seed=seed) for seed in range(4))
    assert torch.autograd.gradcheck(CHECKED[name], inputs)


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_is_the_papers_formula(beta: float, smoothing: float) -> None:
    """arXiv:2305.18290, eq. 7, with its conservative form: -(1-e) log s(m) - e log s(-m)."""
    chosen, rejected, of_chosen, of_rejected = (doubles(N, seed=seed).detach() * 3 for seed in range(4))
    found = objectives.dpo(chosen, rejected, of_chosen, of_rejected, beta=beta, label_smoothing=smoothing)
    for place in range(N):
        margin = beta * math.log(
            math.exp(chosen[place] - of_chosen[place]) / math.exp(rejected[place] - of_rejected[place])
        )
        wanted = -(1 - smoothing) * math.log(sigmoid(margin)) - smoothing * math.log(sigmoid(-margin))
        assert float(found[place]) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("divergence", [0.0, 0.7])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.6)])
def test_kto_is_the_papers_formula(divergence: float, weights: tuple[float, float]) -> None:
    """arXiv:2402.01306: lambda_y - v, v = lambda_D s(beta (r - z0)) of a good reply and lambda_U s(beta (z0 - r)) of a bad one."""
    policy, reference = (doubles(N, seed=seed).detach() * 3 for seed in range(2))
    found = objectives.kto(
        policy, reference, GOOD, divergence, beta=0.5, desirable_weight=weights[0], undesirable_weight=weights[1]
    )
    for place in range(N):
        ratio = float(policy[place] - reference[place])
        if GOOD[place]:
            wanted = weights[0] - weights[0] * sigmoid(0.5 * (ratio - divergence))
        else:
            wanted = weights[1] - weights[1] * sigmoid(0.5 * (divergence - ratio))
        assert float(found[place]) == pytest.approx(wanted, rel=1e-9)


def test_orpo_is_the_papers_formula() -> None:
    """arXiv:2403.07691, eq. 4 to 7: -log s(log(odds(y_w) / odds(y_l))), odds = P / (1 - P), P the mean per token."""
    chosen, rejected = (-doubles(N, seed=seed).detach().exp() for seed in range(2))
    found = objectives.orpo(chosen, rejected)
    for place in range(N):
        odds = [math.exp(mean[place]) / (1 - math.exp(mean[place])) for mean in (chosen, rejected)]
        assert float(found[place]) == pytest.approx(-math.log(sigmoid(math.log(odds[0] / odds[1]))), rel=1e-9)


@pytest.mark.parametrize(("beta", "margin"), [(2.0, 1.0), (10.0, 0.0)])
def test_simpo_is_the_papers_formula(beta: float, margin: float) -> None:
    """arXiv:2405.14734, eq. 6: -log s(beta/|y_w| log pi(y_w) - beta/|y_l| log pi(y_l) - gamma)."""
    sums, lengths = (
        [doubles(N, seed=seed).detach() for seed in range(2)],
        [torch.arange(1, N + 1), torch.full((N,), 3)],
    )
    found = objectives.simpo(sums[0] / lengths[0], sums[1] / lengths[1], beta=beta, margin=margin)
    for place in range(N):
        rewards = [
            beta / float(length[place]) * float(total[place]) for total, length in zip(sums, lengths, strict=True)
        ]
        assert float(found[place]) == pytest.approx(-math.log(sigmoid(rewards[0] - rewards[1] - margin)), rel=1e-9)


def test_a_certain_reply_has_finite_odds() -> None:
    means = torch.tensor([0.0, -1e-9, -50.0], requires_grad=True)
    found = objectives.orpo(means, means.detach().flip(0))
    (slope,) = torch.autograd.grad(found.sum(), means)
    assert torch.isfinite(found).all() and torch.isfinite(slope).all()
    values = found.detach()
    assert float(values[0]) < 1e-6 < float(values[2])


def test_dpo_and_kto_gradients_at_reference_favour_chosen() -> None:
    """At the reference the loss of DPO is ln 2 and that of KTO is 0.5."""
    same = torch.zeros(2, dtype=torch.float64)
    chosen, rejected = same.clone().requires_grad_(), same.clone().requires_grad_()
    loss = objectives.dpo(chosen, rejected, same, same, beta=0.1)
    assert loss.tolist() == pytest.approx([math.log(2)] * 2)
    loss.sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert (chosen.grad < 0).all() and (rejected.grad > 0).all()
    policy = same.clone().requires_grad_()
    loss = objectives.kto(policy, same, torch.tensor([True, False]), 0.0, beta=0.1)
    assert loss.tolist() == [0.5, 0.5]
    loss.sum().backward()
    assert policy.grad is not None and policy.grad[0] < 0 < policy.grad[1]


def test_far_from_the_reference_nothing_overflows() -> None:
    far = torch.tensor([1e5, -1e5], requires_grad=True)
    nought = torch.zeros(2)
    for found in (
        objectives.dpo(far, nought, nought, nought, beta=1.0),
        objectives.kto(far, nought, torch.tensor([True, False]), 0.0, beta=1.0),
    ):
        (slope,) = torch.autograd.grad(found.sum(), far)
        assert torch.isfinite(found).all() and torch.isfinite(slope).all()


def test_divergence_is_mean_log_ratio_clamped_at_zero() -> None:
    """It has no gradient, and is 0 without rows."""
    policy, reference = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([0.0, 1.0])
    found = objectives.divergence(policy, reference)
    assert float(found) == 1.5 and not found.requires_grad
    assert float(objectives.divergence(reference, policy.detach())) == 0.0
    assert float(objectives.divergence(torch.zeros(0), torch.zeros(0))) == 0.0


def test_a_reply_is_as_probable_as_its_tokens_together() -> None:
    losses = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    assert objectives.log_probabilities(losses, [1, 3]).tolist() == [-0.5, -7.0]


def test_how_an_update_is_cut_changes_no_weighted_mean() -> None:
    losses, weights = doubles(6).detach().abs(), doubles(6, seed=1).detach().abs()
    total = float(weights.sum())
    parts: list[Any] = [objectives.sft(losses[part], weights[part], total) for part in (slice(0, 2), slice(2, 6))]
    assert float(sum(parts)) == pytest.approx(float((losses * weights).sum() / weights.sum()))


DIVERGENCES = {
    "reverse": lambda q, p: sum(a * math.log(a / b) for a, b in zip(q, p, strict=True)),
    "forward": lambda q, p: sum(b * math.log(b / a) for a, b in zip(q, p, strict=True)),
    "jensen": lambda q, p: sum(
        0.3 * b * math.log(b / (0.3 * b + 0.7 * a)) + 0.7 * a * math.log(a / (0.3 * b + 0.7 * a))
        for a, b in zip(q, p, strict=True)
    ),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distil_is_the_papers_formula(divergence: Any) -> None:
    """arXiv:2306.13649, section 2 and eq. 1, over two tokens and the rest of the vocabulary."""
    student, teacher = (bins(doubles(N, seed=seed), doubles(N, seed=seed + 1)).detach() for seed in (0, 2))
    found = objectives.distil(student, teacher, divergence=divergence, mixture=0.3)
    for place in range(N):
        q, p = ([float(value) for value in side[place].exp()] for side in (student, teacher))
        q, p = [*q, 1 - sum(q)], [*p, 1 - sum(p)]
        assert float(found[place]) == pytest.approx(DIVERGENCES[divergence](q, p), rel=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_temperature_flattens_both_sides(divergence: Any, temperature: float) -> None:
    """arXiv:1503.02531, section 2: probabilities to the power 1 / T, scaled to 1, and T^2 times their divergence."""
    student, teacher = (bins(doubles(N, seed=seed), doubles(N, seed=seed + 1)).detach() for seed in (0, 2))
    found = objectives.distil(student, teacher, divergence=divergence, mixture=0.3, temperature=temperature)
    for place in range(N):
        q, p = ([float(value) for value in side[place].exp()] for side in (student, teacher))
        q, p = ([value ** (1 / temperature) for value in (*side, 1 - sum(side))] for side in (q, p))
        q, p = ([value / sum(side) for value in side] for side in (q, p))
        expected = temperature**2 * DIVERGENCES[divergence](q, p)
        assert float(found[place]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distil_of_all_tokens_is_the_whole_divergence_and_fewer_bins_are_a_lower_bound(divergence: Any) -> None:
    """Data processing: joining tokens into a tail can only lose information."""
    student, teacher = (doubles(N, 12, seed=seed).detach().log_softmax(1) for seed in (0, 1))
    values = []
    for count in (12, 6, 1):
        ids = teacher.topk(count).indices
        parts = student.gather(1, ids), teacher.gather(1, ids)
        values.append(objectives.distil(*parts, divergence=divergence, mixture=0.3))
    q, p = student.exp().tolist(), teacher.exp().tolist()
    wanted = [DIVERGENCES[divergence](*pair) for pair in zip(q, p, strict=True)]
    assert values[0].tolist() == pytest.approx(wanted, abs=1e-6)
    assert bool((values[0] + 1e-9 >= values[1]).all()) and bool((values[1] + 1e-9 >= values[2]).all())
    assert bool((values[2] >= 0).all())


def test_distil_of_equals_is_zero_and_absent_bins_count_nothing() -> None:
    same = bins(doubles(N), doubles(N, seed=1)).detach().requires_grad_()
    loss = objectives.distil(same, same.detach())
    (slope,) = torch.autograd.grad(loss.sum(), same)
    assert loss.tolist() == pytest.approx([0.0] * N, abs=1e-12)
    assert float(slope.abs().max()) < 1e-9
    other = bins(doubles(N, seed=2), doubles(N, seed=3)).detach()
    absent = torch.full((N, 2), NO_BIN, dtype=other.dtype)
    padded = torch.cat([other, absent], 1)
    student = torch.cat([same, doubles(N, 2, seed=4)], 1)
    assert objectives.distil(student, padded).tolist() == pytest.approx(objectives.distil(same, other).tolist())


def test_distil_of_certain_tokens_is_finite() -> None:
    student = torch.tensor([[0.0, -200.0], [-200.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-200.0, 0.0], [-200.0, 0.0]])
    for divergence in DIVERGENCES:
        loss = objectives.distil(student, teacher, divergence=divergence)  # type: ignore[arg-type]
        (slope,) = torch.autograd.grad(loss.sum(), student)
        assert torch.isfinite(loss).all() and torch.isfinite(slope).all()
        assert loss.tolist()[0] > 0.3 > abs(loss.tolist()[1])


def test_grpo_is_the_papers_formula() -> None:
    """arXiv:2402.03300, eq. 3 inside its clip and eq. 4: -(ratio A - beta (q - log q - 1)), q = reference / policy."""
    policy, old, reference, advantages = (doubles(N, seed=seed).detach() for seed in range(4))
    found = objectives.grpo(policy, old, reference, advantages, beta=0.04)
    for index in range(N):
        ratio = math.exp(float(policy[index]) - float(old[index]))
        of_reference = math.exp(float(reference[index]) - float(policy[index]))
        expected = -(ratio * float(advantages[index]) - 0.04 * (of_reference - math.log(of_reference) - 1))
        assert float(found[index]) == pytest.approx(expected)


def test_grpo_of_the_sampling_policy_has_the_policy_gradient() -> None:
    """Where old is the policy itself, the gradient is -A, and that of k3 is beta (1 - reference / policy)."""
    policy, reference = doubles(N), doubles(N, seed=1).detach()
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0, -0.25], dtype=torch.float64)
    objectives.grpo(policy, policy.detach(), reference, advantages, beta=0.1).sum().backward()
    expected = -advantages + 0.1 * (1 - (reference - policy.detach()).exp())
    assert policy.grad is not None and torch.allclose(policy.grad, expected)


def test_kl_estimate_is_zero_for_equals_and_unbiased() -> None:
    scores = torch.tensor([[0.3, -1.0, 0.5], [1.0, 0.2, -0.4]], dtype=torch.float64).log_softmax(1)
    policy, reference = scores
    assert torch.equal(objectives.kl_estimate(policy, policy), torch.zeros(3, dtype=torch.float64))
    estimates = objectives.kl_estimate(policy, reference)
    assert (estimates >= 0).all()
    exact = (policy.exp() * (policy - reference)).sum()
    assert float((policy.exp() * estimates).sum()) == pytest.approx(float(exact))


def test_equal_rewards_have_no_advantage() -> None:
    rewards = torch.tensor([[0.1, 0.1, 0.1], [1.0, 0.0, 0.5]], dtype=torch.float64)
    found = objectives.group_advantages(rewards)
    assert found[0].tolist() == [0.0, 0.0, 0.0] and found[1].tolist() == pytest.approx([0.5, -0.5, 0.0])
