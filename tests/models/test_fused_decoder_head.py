"""A mapped head in slices gives the losses and gradients of a whole one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sartor.models.losses import fused_decoder as heads
from sartor.models.losses.fused_decoder import mapped_losses
from sartor.models.losses.lora_linear import MappedLinear


@pytest.mark.parametrize("size", [7, 64, 1000])
@pytest.mark.parametrize("logits_bytes", [1, 1 << 20])
def test_losses_and_gradients_are_those_of_a_whole_head(
    monkeypatch: pytest.MonkeyPatch, size: int, logits_bytes: int
) -> None:
    monkeypatch.setattr(heads, "SLICE", size)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 16, generator=generator).bfloat16()
    x = (torch.randn(23, 16, generator=generator) * 4).requires_grad_()
    targets = torch.randint(0, 200, (23,), generator=generator)
    wanted = F.cross_entropy(x @ weight.float().T, targets, reduction="none")
    wanted.sum().backward()
    losses, slopes = mapped_losses(x.detach(), MappedLinear(weight, None), targets, True, logits_bytes)
    assert (
        torch.allclose(losses, wanted, atol=1e-5) and slopes is not None and torch.allclose(slopes, x.grad, atol=1e-5)
    )
    alone, none = mapped_losses(x.detach(), MappedLinear(weight, None), targets, False, logits_bytes)
    assert none is None and torch.equal(alone, losses)


def test_in_double_precision_the_gradient_is_that_of_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "SLICE", 5)
    head = MappedLinear(torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), None)
    x, targets = (
        torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0, 11, 6]),
    )
    _, slopes = mapped_losses(x, head, targets, True, 1 << 20)
    assert slopes is not None
    for row in range(3):
        for place in range(4):
            step = torch.zeros_like(x)
            step[row, place] = 1e-6
            up, down = (mapped_losses(x + sign * step, head, targets, False, 1 << 20)[0][row] for sign in (1, -1))
            assert float((up - down) / 2e-6) == pytest.approx(float(slopes[row, place]), abs=1e-7)


def test_large_logits_overflow_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "SLICE", 2)
    head = MappedLinear(torch.tensor([[1.0], [-1.0], [500.0], [-500.0]]), None)
    losses, slopes = mapped_losses(torch.tensor([[1.0], [-1.0]]), head, torch.tensor([2, 2]), True, 1 << 20)
    assert torch.equal(losses, torch.tensor([0.0, 1000.0])) and slopes is not None and bool(slopes.isfinite().all())
